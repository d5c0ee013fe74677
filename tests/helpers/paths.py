"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "examples/tiny_ocr/model"  # reads words; quick
TINY_VL = ROOT / "examples/tiny_vl/model"  # has many skills
TOUR = ROOT / "examples/tour.ipynb"
