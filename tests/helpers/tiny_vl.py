"""The script that makes the tiny Qwen3-VL of many skills, as modules, and runs of it that take seconds."""

import importlib.util
import os
import subprocess
import sys

import helpers.tiny_ocr  # noqa: F401 - the module that these import by its name
from helpers.paths import ROOT

FOLDER = ROOT / "examples/tiny_vl"


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # by name for its worker processes
    spec.loader.exec_module(module)
    return module


skills = _load("skills", FOLDER / "skills.py")
network = _load("network", FOLDER / "network.py")
tiny_vl = _load("tiny_vl", FOLDER / "tiny_vl.py")

# A training of seconds: few questions a step, often a state, hardly anything to measure.
SHORT = """
import sys
sys.path.insert(0, {folder!r})
import tiny_vl
from prunekit.errors import run_script
tiny_vl.QUESTIONS, tiny_vl.REVIEW = 4, 2
tiny_vl.DATASETS = {{name: (8, *rest) for name, (_, *rest) in tiny_vl.DATASETS.items()}}
run_script(tiny_vl.main)
"""


def start_training(out, *flags, processes=1):
    """`train --out OUT` of 8 steps as a process of its own; what it prints is to be read from its stdout."""
    script = out.with_name(f"{out.name}_script.py")
    script.write_text(SHORT.format(folder=str(FOLDER)))
    run = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *run, str(script), "train", "--out", str(out), "--steps", "8", "--no-compile"]
    command += ["--micro-batches", str(2 // processes), "--save-every", "2", "--measure-every", "100", *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
