"""What loop.sh comes to on the embedded model, and how much of its time is its own: JSON.

    python examples/tiny_vl/tiny_vl.py data --out runs/tiny_vl --share 0.2
    python bench/loop.py --data runs/tiny_vl --out runs/loop --json docs/measured/loop.json

Its own time is all that isn't a scan, a cut, a training or an evaluation: those write theirs to OUT/small.loop/seconds.
With --log FILE it says this of a loop that has ended, whose last line there was "SECONDS s".
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from prunekit.checkpoint import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "MODEL": "examples/tiny_vl/model", "TARGET_PARAMS": "0.7", "KEEP": "0.97", "CALIB_TOKENS": "2000",
    "RECOVER_STEPS": "40", "DISTIL_STEPS": "10", "LONGER_STEPS": "80", "EVALUATE_ARGS": "--batch-size 96",
    "RECOVER_ARGS": "--eval_steps 40 --save_steps 40",
    "DISTIL_ARGS": "--eval_steps 10 --save_steps 10 --max_completion_length 16",
}  # fmt: skip
FLAGS = (
    "--per_device_train_batch_size 32 --per_device_eval_batch_size 96 --gradient_accumulation_steps 1 "
    "--learning_rate 1e-4 --logging_steps 5"
)


def run(data: Path, out: Path) -> float:
    """Seconds of a loop on the embedded model; exit code 3 is an end, too."""
    env = os.environ | SETTINGS | {"GPUS": "", "OMP_NUM_THREADS": "1", "OUTPUT": str(out / "small")}
    env |= {"DATASET": str(data / "train.jsonl"), "VAL_DATASET": str(data / "val.jsonl")}
    begun = time.monotonic()
    code = subprocess.run(["bash", "loop.sh", *FLAGS.split()], cwd=ROOT, env=env, stdout=sys.stderr).returncode
    if code not in (0, 3):
        sys.exit(f"loop.sh ended with exit code {code}")
    return time.monotonic() - begun


def summary(folder: Path, seconds: float) -> dict:
    """What a loop's folder tells: its rounds, and the seconds of its stages beside those of all."""
    loop = read_json(folder / "loop.json")
    base, kept = loop["base"], ("round", "from", "share", "good", "kept", "sizes", "tries", "candidates")
    lines = [line.split(maxsplit=2) for line in (folder / "seconds").read_text().splitlines()]
    stages = sum(int(line[1]) for line in lines)
    rounds = [{key: each[key] for key in kept if key in each} for each in loop["rounds"]]
    return {
        "settings": loop["settings"], "base": base, "rounds": rounds,
        "seconds": seconds, "seconds_of_stages": stages, "own_share": (seconds - stages) / seconds,
        "stages": [{"round": int(line[0]), "seconds": int(line[1]), "what": re.sub(r"\S*/", "", line[2])}
                   for line in lines],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/tiny_vl"), help="what tiny_vl.py data wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), help="folder of the loop")
    parser.add_argument("--log", type=Path, help="of a loop that has ended there")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    if args.log:
        seconds = float(re.findall(r"(\d+) s\s*$", args.log.read_text())[-1])
    else:
        seconds = run(args.data.resolve(), args.out.resolve())
    result = summary(args.out / "small.loop", seconds)
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
