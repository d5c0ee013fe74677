"""What a recovery learns from, at equal steps and at equal time: answers, or a teacher live, cached, on-policy, inside.

    bash bench/setup.sh
    .venv/bin/python bench/distil_training.py --json docs/measured/distil_training.json

Students: the embedded model after the demo's cuts, with one KV head, and SmolLM2-135M without the 5 layers that cost it
least. Each method takes the same steps, rows and rate: `sft` the answers; `on-policy` reverse KL to the whole model on
the student's own answers; `live` the same on the data's answers; `cached` from the teacher's top 8 and tail; both with
forward KL, too; `hidden` live and with a term for hidden states (bench/hidden_states.py). At each of `--points`
checkpoints the loss (nats a token) on held-out rows, of the training's kind and of another; and seconds a step,
without what a start takes.

Prints JSON; takes an hour on two CPU cores. What earlier calls made in RUNS/distil isn't made again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from materials import EMBEDDED, MODELS, conversations, embedded_data, result_file, run, smollm2, write_texts

from prunekit.checkpoint import open_checkpoint, read_json, write_json
from prunekit.data.batches import calibrate
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches

CUT = ["--text", "4", "6", "--vision", "5", "7", "--drop-taps", "1", "--heal"]  # as demo.sh has it
ORDER = [17, 14, 13, 16, 18]  # SmolLM2's cheapest layers, by bench/heal.py
METHODS = {
    "sft": ("full_run.sh", {}, []),
    "on-policy": ("distil.sh", {"LMBDA": "1"}, []),
    "live": ("distil.sh", {"LMBDA": "0", "BETA": "1"}, []),
    "cached": ("distil.sh", {"CACHE": "{case}/cache", "BETA": "1"}, []),
    "live forward": ("distil.sh", {"LMBDA": "0", "BETA": "0"}, []),
    "cached forward": ("distil.sh", {"CACHE": "{case}/cache", "BETA": "0"}, []),
    "hidden": (
        "distil.sh",
        {"LMBDA": "0", "BETA": "1", "HIDDEN_STATES": "1.0"},
        ["--external_plugins", "bench/hidden_states.py"],
    ),
}
FLAGS = "--gradient_accumulation_steps 1 --warmup_ratio 0.05 --eval_strategy no --save_total_limit 20 --logging_steps 1"


def embedded(args: argparse.Namespace, case: Path) -> dict[str, Any]:
    data = embedded_data(args.runs / "tiny_vl")
    calib = ["--calib", data / "train.jsonl", "--calib-tokens", 12_000]
    if not (case / "pruned").exists():
        words = ["--model", EMBEDDED, "--out", case / "pruned", *CUT]
        run(sys.executable, "manual_select.py", *words, *calib, log=case / "pruned.log")
    if not (case / "student").exists():
        words = ["--out", case / "student", "--kv-heads", 1, *calib, "--refine", 120]
        run(sys.executable, "kv_cut.py", "--model", case / "pruned", *words, log=case / "student.log")
    tests = {"test": data / "test.jsonl", "cyrillic": data / "cyrillic_val.jsonl"}
    flags = ["--per_device_train_batch_size", 16, "--learning_rate", "4e-4", "--max_length", 512]
    return {"teacher": EMBEDDED, "train": data / "train.jsonl", "tests": tests, "answer": 16, "flags": flags}


def text(args: argparse.Namespace, case: Path) -> dict[str, Any]:
    teacher, texts = smollm2(args.runs / "smollm2-bf16", "bfloat16"), write_texts(args.runs)
    if not (case / "student").exists():
        words = ["--model", teacher, "--out", case / "student", "--text", *ORDER]
        run(sys.executable, "manual_select.py", *words, log=case / "student.log")
    tests = {name: conversations(texts[name], case / f"{name}.jsonl") for name in ("wikipedia-test", "docstrings")}
    train = conversations(texts["wikipedia-train"], case / "train.jsonl")
    flags = ["--per_device_train_batch_size", 4, "--learning_rate", "1e-4", "--max_length", 512]
    return {"teacher": teacher, "train": train, "tests": tests, "answer": 128, "flags": flags}


CASES = dict(zip(MODELS, (embedded, text), strict=True))


def losses(folder: Path, tests: dict[str, Path], tokens: int) -> dict[str, dict[str, float]]:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    found = {name: calibrate(model, checkpoint, path, tokens, 512) for name, path in tests.items()}
    return {name: score_batches(model, [*each.fit, *each.held_out]) for name, each in found.items()}


def train(case: Path, name: str, setting: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A method's curve. Its checkpoints are in CASE/NAME-STEPS.run."""
    script, environment, more = METHODS[name]
    steps = setting["steps"]
    output = case / f"{name}-{steps}"
    environment = {key: value.format(case=case) for key, value in environment.items()}
    result: dict[str, Any] = {}
    if not output.exists():
        words = ["bash", script, *FLAGS.split(), *setting["flags"], *more]
        words += ["--max_steps", steps, "--save_steps", max(1, steps // args.points)]
        if script == "distil.sh":
            words += ["--max_completion_length", setting["answer"]]
        settings = {
            "MODEL": str(case / "student"),
            "TEACHER": str(setting["teacher"]),
            "DATASET": str(setting["train"]),
            "VAL_DATASET": f"{next(iter(setting['tests'].values()))}#16",
            "OUTPUT": str(output),
            "KEEP_RUN": "1",
        }
        begun = time.time()
        run(*words, log=case / f"{output.name}.log", **settings, **environment)
        if "CACHE" in environment:
            filled = max(file.stat().st_mtime for file in Path(environment["CACHE"]).glob("filled-*"))
            if filled > begun:  # or another method has filled it
                result["filling_seconds"] = round(filled - begun, 1)
    log = [json.loads(line) for line in (output / "logging.jsonl").open()]
    result["seconds_a_step"] = [line["train_speed(s/it)"] for line in log if "train_speed(s/it)" in line][-1]
    work = output.with_name(f"{output.name}.run")
    folders = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    result["curve"] = [
        {"step": int(folder.name.split("-")[1])} | losses(folder, setting["tests"], args.test_tokens)
        for folder in folders
    ]
    print(f"  {name:10} {result['seconds_a_step']:.2f} s a step  {result['curve'][-1]}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: both")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 60], help="of each model's runs (default: 200 60)")
    parser.add_argument("--points", type=int, default=4, help="checkpoints that are measured (default: 4)")
    parser.add_argument("--test-tokens", type=int, default=16_384, help="of each kind (default: 16384)")
    parser.add_argument("--json", type=result_file, help="write the result here, too, beside other models'")
    args = parser.parse_args()

    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"GPUS": "", "OMP_NUM_THREADS": "1", "CPU_PROCESSES": "2"}
    args.runs = args.runs.absolute()
    result = read_json(args.json) if args.json and args.json.exists() else {}
    wanted = {model: steps for model, steps in zip(MODELS, args.steps, strict=True) if model in args.models}
    for model, steps in wanted.items():
        if (known := result.setdefault(model, {"steps": steps})["steps"]) != steps:
            parser.error(f"{args.json} has {known} steps of {model}, not {steps}: name those, or another --json")
    for model, steps in wanted.items():
        case = args.runs / "distil" / model
        case.mkdir(parents=True, exist_ok=True)
        setting = CASES[model](args, case) | {"steps": steps}
        rows = {
            name: losses(folder, setting["tests"], args.test_tokens)
            for name, folder in (("teacher", setting["teacher"]), ("student", case / "student"))
        }
        print(f"{model}: {rows}", file=sys.stderr, flush=True)
        found = result[model] | rows
        for name in args.methods:
            found[name] = found.get(name, {}) | train(case, name, setting, args)
            result[model] = found
            if args.json:
                write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
