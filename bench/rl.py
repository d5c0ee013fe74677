"""What RL does for the demo's model, over several seeds: mean reward and exact match, with their spread.

    bash demo.sh && .venv/bin/python bench/rl.py --json docs/measured/rl.json

Runs rl_run.sh on the demo's merged model as demo.sh does, once for each seed, and measures the hard rows that RL was
for, the Cyrillic ones that it is to keep, and the eight skills, all held out. Prints JSON; takes minutes a seed on
two CPU cores. What earlier calls made of the same model in RUNS/rl isn't made again.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from materials import result_file, run

from prunekit.checkpoint import fingerprint, open_checkpoint, read_json, write_json

FLAGS = (
    "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --logging_steps 5 --learning_rate 1e-4 "
    "--max_completion_length 16"
)
REWARDS = "ocr_cer ocr_prefix=0.5 ocr_perfect ocr_rambling=0.5"
MEASURED = ("reward", "exact_match", "cer")


def scores(folder: Path, data: Path, file: Path) -> dict[str, dict[str, float]]:
    """By data set, what `python -m prunekit.evaluate` finds."""
    if not file.exists():
        words = ["-m", "prunekit.evaluate", "--model", folder, "--dataset"]
        words += [data / f"{name}.jsonl" for name in ("rl_val", "cyrillic_val", "test")]
        words += ["--batch-size", 128, "--max-new-tokens", 24, "--limit", 800]
        words += ["--plugins", "plugins/ocr_rewards.py", "--rewards", *REWARDS.split(), "--json", file]
        run(sys.executable, *words)
    found = read_json(file)[0]["datasets"].items()
    return {name: {key: each[key] for key in MEASURED} for name, each in found}


def spread(before: dict[str, Any], seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each data set and measure: before RL, the mean and the standard deviation of what the seeds changed."""
    found: dict[str, Any] = {}
    for name, each in before.items():
        changes = {key: [seed[name][key] - value for seed in seeds] for key, value in each.items()}
        found[name] = {
            key: {
                "before": each[key],
                "change": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
            for key, values in changes.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder to work in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60, help="of RL (default: 60, as the demo)")
    parser.add_argument("--json", type=result_file, help="also write the result here")
    args = parser.parse_args()
    if not (args.demo / "merged/config.json").exists():
        parser.error(f"{args.demo / 'merged'}: isn't there; bash demo.sh makes it")

    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"GPUS": "", "OMP_NUM_THREADS": "1", "CPU_PROCESSES": "2"}
    demo = args.demo.absolute()
    folder = args.runs.absolute() / "rl" / fingerprint(open_checkpoint(demo / "merged"))
    folder.mkdir(parents=True, exist_ok=True)
    before = scores(demo / "merged", demo / "data", folder / "before.json")
    seeds = []
    for seed in args.seeds:
        out = folder / f"{args.steps}-steps-seed-{seed}"
        if not out.exists():
            settings = {
                "MODEL": demo / "merged",
                "DATASET": demo / "data/rl_mixed.jsonl",
                "VAL_DATASET": "",
                "OUTPUT": out,
            }
            steps = ["--max_steps", args.steps, "--save_steps", args.steps, "--seed", seed]
            run("bash", "rl_run.sh", *FLAGS.split(), *steps, **{name: str(value) for name, value in settings.items()})
        seeds.append(scores(out, demo / "data", folder / f"{out.name}.json"))
        print(f"seed {seed}: {seeds[-1]}", file=sys.stderr, flush=True)
    result = {"steps": args.steps, "seeds": dict(zip(map(str, args.seeds), seeds, strict=True))}
    result |= spread(before, seeds)
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
