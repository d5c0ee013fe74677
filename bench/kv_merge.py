"""Merging KV heads: what is lost untrained, how fast recovery is, what each part is worth, time and memory.

    bash bench/setup.sh
    .venv/bin/python bench/kv_merge.py --json docs/measured/kv_merging.json --recovery-steps 240 \\
        cut ablation context mixed recovery embedded steps care

Parts, each a key of the JSON: `cut` takes SmolLM2-135M from 3 KV heads to 1 by `kv_cut.py`, averaged, calibrated and
refined; `ablation` switches each part of the method off in turn; `context` is what the length of the calibration's
rows does at longer distances; `mixed` adds text of the other kind to the calibration set of `cut`; `recovery` counts
the steps of SFT until the loss is within 0.3 of the base's; `embedded` cuts the embedded Qwen3-VL (QK-norm) from 4 to
2 and to 1, untrained and after 50 steps; `steps` compares 4 to 2 to 1 with 4 to 1 for the same number of steps; `care`
puts a peer's low-rank K and V (bench/care.py) beside ours, at as many cached numbers and on the ablation's tokens. They
run in an order in which each finds what it needs of `cut`. What earlier calls with the same --tokens and --refine wrote
to RUNS/kv isn't made again, but for `cut`, which is timed. All of it takes an hour and a half on two quiet CPU cores.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from care import decompose
from knockout import SMOLLM2, TINY, chat_rows, log
from materials import EMBEDDED, MODELS, ROOT, embedded_data, result_file, run, smollm2, write_texts

from prunekit.checkpoint import open_checkpoint, read_json, write_json
from prunekit.data.batches import calibrate
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.surgery import kv_fit, kv_merge
from prunekit.surgery.kv import plan_kv

TESTS = ("wikipedia-test", "docstrings")
ONCE = ("--repeat", 0)  # rows as they are: what saying them twice is worth, bench/tasks.py measures


def command(*words: object, **environment: str) -> tuple[float, float]:
    """Run one of our commands; (seconds, peak of the memory that is not a map of a file, MB)."""
    begun = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"error: {words} ended with {process.returncode}")
    return time.perf_counter() - begun, peak / 1e6


def losses(folder: Path, texts: dict[str, Path], tokens: int) -> dict[str, dict[str, float]]:
    """token_acc and loss on texts that nothing was fitted to."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    data = {name: calibrate(model, checkpoint, texts[name], tokens, 512) for name in TESTS}
    return {name: score_batches(model, [*each.fit, *each.held_out]) for name, each in data.items()}


def cut_flags(args: argparse.Namespace, texts: dict[str, Path]) -> dict[str, list[object]]:
    calib = ["--calib", texts["wikipedia-train"], "--calib-tokens", args.tokens, "--max-length", 512, *ONCE]
    return {"mean": [], "calibrated": calib, "refined": [*calib, "--refine", args.refine]}


def cut(args: argparse.Namespace) -> dict[str, Any]:
    folder, texts = smollm2(args.runs / "smollm2-bf16", "bfloat16"), write_texts(args.runs)
    result = {"calibration_tokens": args.tokens, "refine_steps": args.refine}
    result["base"] = losses(folder, texts, args.test_tokens)
    load = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from prunekit.model.load import load_model; "
    load += f"from prunekit.checkpoint import open_checkpoint; load_model(open_checkpoint({str(folder)!r}))"
    result["loading_the_model_mb"] = command("-c", load)[1]
    for way, flags in cut_flags(args, texts).items():
        out = args.work / way
        seconds, peak = command("kv_cut.py", "--model", folder, "--out", out, "--kv-heads", 1, "--overwrite", *flags)
        result[way] = losses(out, texts, args.test_tokens) | {"seconds": seconds, "peak_mb": peak}
        add_excess(result, way)
        log(way, result[way])
    return result


def add_excess(result: dict[str, Any], way: str) -> None:
    """To the losses of a way of merging: what they are above the base's, and that as a share of averaging's."""
    for name in TESTS:
        found = result[way][name]
        found["excess"] = found["loss"] - result["base"][name]["loss"]
        found["of_mean"] = found["excess"] / result["mean"][name]["excess"]


def neighbours(cost: torch.Tensor, groups: int) -> list[tuple[int, ...]]:
    size = len(cost) // groups
    return [tuple(range(start, start + size)) for start in range(0, len(cost), size)]


def mean_keys(moments: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ones = torch.ones_like(energy, dtype=moments.dtype)
    return ones / len(ones), ones, energy.sum(0)


plan_layer = kv_merge.plan_layer


def mean_values(moments: kv_merge.Moments, kv_heads: int, query_heads: int) -> kv_merge.Maps:
    maps = plan_layer(moments, kv_heads, query_heads)
    count, width, _ = moments.readers.shape
    eye = torch.eye(width, dtype=maps.v.dtype)
    values = torch.zeros(kv_heads, width, count, width, dtype=maps.v.dtype)
    for number, group in enumerate(maps.groups):
        values[number][:, list(group)] = eye[:, None] / len(group)
    order = [head for group in maps.groups for head in group]
    queries = torch.arange(query_heads).view(count, -1)[order].flatten()
    maps.v, maps.o = values.flatten(2).flatten(0, 1), torch.kron(torch.eye(query_heads)[:, queries], eye)
    return maps


# What takes the place of each part where it is switched off
OFF: dict[str, dict[str, object]] = {
    "grouping": {"choose_groups": neighbours},
    "basis of slow pairs": {"SLOW": -1.0},
    "alignment of K": {"SLOW": -1.0, "shared_keys": mean_keys},
    "basis of V": {"plan_layer": mean_values},
    "gains": {"GAINS": (False,)},
    "correction of errors": {"MADE_UP_KV": 0.0},
    "refit of o": {"fit_output": lambda *_: 0.0},
}


def ablation(args: argparse.Namespace) -> dict[str, Any]:
    cases, files = {}, {}
    if "smollm2" in args.models:
        files |= (texts := write_texts(args.runs))
        folder = smollm2(args.runs / "smollm2-bf16", "bfloat16")
        cases["smollm2 3 to 1"] = folder, 1, texts["wikipedia-train"], TESTS
    if "embedded" in args.models:
        data = embedded_data(args.runs / "tiny_vl")
        files["val"] = data / "val.jsonl"
        for kv_heads in (2, 1):
            cases[f"embedded 4 to {kv_heads}"] = EMBEDDED, kv_heads, data / "train.jsonl", ("val",)
    result = dict(args.known)
    for case, (folder, kv_heads, calib, tests) in cases.items():
        checkpoint = open_checkpoint(folder)
        without = [None, *OFF, "all of it"]
        if kv_heads == 1:
            without.remove("grouping")
        if "embedded" not in case:
            without.remove("gains")
        result[case] = {}
        for refine, part in [(0, part) for part in without] + [(args.refine, None)]:
            parts = {"all of it": list(OFF), None: []}.get(part, [part])
            model = load_model(checkpoint)
            data = calibrate(model, checkpoint, calib, args.ablation_tokens, 512, 1024)
            judged = {name: calibrate(model, checkpoint, files[name], args.test_tokens, 512) for name in tests}
            with contextlib.ExitStack() as patches:
                for what, value in ((what, value) for name in parts for what, value in OFF[name].items()):
                    module = kv_merge if hasattr(kv_merge, what) else kv_fit
                    patches.enter_context(mock.patch.object(module, what, value))
                kv_fit.fit_kv(plan_kv(checkpoint, kv_heads, "calibrated"), model, data, refine)
            name = f"refined, {refine} steps" if refine else f"without {part}" if part else "all"
            result[case][name] = {
                test: score_batches(model, [*each.fit, *each.held_out]) for test, each in judged.items()
            }
            log(case, name, result[case][name])
    return result


def joined(source: Path, runs: Path, characters: int = 16_000) -> Path:
    """The texts of a file, joined to rows of at least so many characters."""
    rows, row = [], ""
    for line in source.open():
        row += json.loads(line)["text"] + "\n\n"
        if len(row) >= characters:
            rows.append({"text": row})
            row = ""
    found = runs / f"{source.stem}-joined.jsonl"
    found.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return found


def context(args: argparse.Namespace) -> dict[str, Any]:
    """Loss on rows of 512 and of 4096 tokens, by the length of the rows that the merge was calibrated on."""
    texts, lengths, result = write_texts(args.runs), (512, 4096), {}
    checkpoint = open_checkpoint(smollm2(args.runs / "smollm2-bf16", "bfloat16"))
    train, test = (joined(texts[name], args.runs) for name in ("wikipedia-train", "wikipedia-test"))
    cases = [("unmerged", 0, 0.0)]
    cases += [
        (f"{slow} {length}", length, value)
        for length in lengths
        for slow, value in (("slow pairs,", kv_fit.SLOW), ("without,", -1.0))
    ]
    for name, length, slow in cases:
        model = load_model(checkpoint)
        judged = {seen: calibrate(model, checkpoint, test, args.test_tokens, seen) for seen in lengths}
        if length:
            data = calibrate(model, checkpoint, train, args.ablation_tokens, length)
            with mock.patch.object(kv_fit, "SLOW", slow):
                kv_fit.fit_kv(plan_kv(checkpoint, 1, "calibrated"), model, data)
        result[name] = {
            str(seen): score_batches(model, [*each.fit, *each.held_out])["loss"] for seen, each in judged.items()
        }
        log(name, result[name])
    return result


def mixed(args: argparse.Namespace) -> dict[str, Any]:
    """`refined` with and without an eighth of the calibration's rows from docstrings of modules that aren't judged."""
    texts, folder = write_texts(args.runs), smollm2(args.runs / "smollm2-bf16", "bfloat16")
    rows = args.tokens // 512
    some, others = texts["wikipedia-train"].open().readlines(), texts["docstrings"].open().readlines()
    half, share = len(others) // 2, rows // 8
    calib, judged = args.runs / "kv-mixed.jsonl", args.runs / "kv-mixed-test.jsonl"
    random.Random(0).shuffle(some)
    calib.write_text("".join(some[: rows - share] + random.Random(0).sample(others[:half], share)))
    judged.write_text("".join(others[half:]))
    flags = ["--calib-tokens", args.tokens, "--max-length", 512, "--refine", args.refine, *ONCE]
    both = args.work / "mixed"
    if not both.exists():
        command("kv_cut.py", "--model", folder, "--out", both, "--kv-heads", 1, "--calib", calib, *flags)
    tests = texts | {"docstrings": judged}
    found = {
        "base": folder,
        "mean": args.work / "mean",
        "wikipedia": args.work / "refined",
        "an eighth docstrings": both,
    }
    result: dict[str, Any] = {"calibration_tokens": args.tokens, "refine_steps": args.refine}
    for way, path in found.items():
        result[way] = losses(path, tests, args.test_tokens)
        if way != "base":
            add_excess(result, way)
        log(way, result[way])
    return result


def train(model: Path, out: Path, steps: int, flags: list[str], stop_at: float | None = None) -> list[dict[str, float]]:
    """ms-swift's evaluations during an SFT into `out`, which is ended once eval_loss is at most `stop_at`."""
    words = [
        Path(sys.executable).parent / "swift",
        "sft",
        "--model",
        model,
        "--output_dir",
        out,
        "--max_steps",
        steps,
    ]
    words += ["--model_type", open_checkpoint(model).config["model_type"], *flags]
    words += ["--external_plugins", ROOT / "plugins" / "images_and_answers.py"]

    def evaluations() -> list[dict[str, float]]:
        if not (out / "logging.jsonl").exists():
            return []
        rows = [json.loads(line) for line in (out / "logging.jsonl").open() if line.endswith("}\n")]
        found = [row for row in rows if "eval_loss" in row]
        return [
            {
                "step": int(re.match(r"\d+", row["global_step/max_steps"])[0]),
                "loss": row["eval_loss"],
                "token_acc": row["eval_token_acc"],
            }
            for row in found
        ]  # fmt: skip

    if len(done := evaluations()) and (done[-1]["step"] == steps or (stop_at and done[-1]["loss"] <= stop_at)):
        return done
    out.mkdir(parents=True, exist_ok=True)
    (out / "logging.jsonl").unlink(missing_ok=True)
    with (out / "log").open("w") as text:
        process = psutil.Popen(list(map(str, words)), cwd=ROOT, stdout=text, stderr=text)
        while process.poll() is None:
            time.sleep(1)
            if (done := evaluations()) and stop_at and done[-1]["loss"] <= stop_at:
                for each in [*process.children(recursive=True), process]:
                    each.kill()
    done = evaluations()
    if not done or (done[-1]["step"] < steps and not (stop_at and done[-1]["loss"] <= stop_at)):
        sys.exit(f"error: the training failed; see {out / 'log'}")
    return done


def recovery(args: argparse.Namespace) -> dict[str, Any]:
    folder, texts = smollm2(args.runs / "smollm2-bf16", "bfloat16"), write_texts(args.runs)
    data = chat_rows(texts["wikipedia-train"], args.runs, 2000)
    few = args.runs / "wikipedia-test-24.jsonl"
    few.write_text("".join(chat_rows(texts["wikipedia-test"], args.runs, 2000).open().readlines()[::25][:24]))
    flags = [
        *SMOLLM2, "--dataset", str(data), "--val_dataset", str(few), "--learning_rate", args.recovery_rate,
        "--eval_strategy", "steps", "--eval_steps", "10", "--per_device_train_batch_size", "2", "--save_strategy", "no",
        "--optim", "adamw_torch", "--warmup_steps", "5",
    ]  # fmt: skip
    base = train(folder, args.work / "recovery-base", 1, [*flags, "--learning_rate", "0", "--eval_steps", "1"])[-1]
    wanted = base["loss"] + 0.3
    result: dict[str, Any] = {
        "base": base,
        "wanted_loss": wanted,
        "flags": " ".join(map(str, flags)).replace(f"{args.runs}/", ""),
    }
    limit = args.recovery_steps
    for way in ("refined", "calibrated", "mean"):
        curve = train(args.work / way, args.work / f"recovery-{way}-{args.recovery_rate}", limit, flags, wanted)
        reached = [row["step"] for row in curve if row["loss"] <= wanted]
        result[way] = {"steps": reached[0] if reached else None, "curve": curve}
        log(way, result[way]["steps"], curve[-1])
        if way == "calibrated" and reached:
            limit = max(limit, 4 * reached[0])
    return result


def judge(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """token_acc, and exact match of real greedy generation, on 400 held-out questions of eight skills."""
    file = args.work / "scores" / f"{model.parent.name}-{model.name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        words = [
            "-m",
            "prunekit.evaluate",
            "--model",
            model,
            "--dataset",
            embedded_data(args.runs / "tiny_vl") / "test.jsonl",
            "--by",
            "skill",
            "--limit",
            400,
        ]
        command(*words, "--batch-size", 128, "--max-new-tokens", 24, "--json", file)
    (scores,) = read_json(file)[0]["datasets"].values()
    found = {key: scores[key] for key in ("token_acc", "loss", "exact_match", "cer")}
    return found | {"skills": {skill: each["exact_match"] for skill, each in scores["groups"].items()}}


def recovered(model: Path, steps: int, args: argparse.Namespace, rate: str = "1e-3") -> Path:
    """A checkpoint trained for some steps on the questions that the embedded model knows."""
    out = args.work / f"{model.name}-{steps}-{rate}"
    if not out.exists():
        data = embedded_data(args.runs / "tiny_vl")
        flags = [*TINY, "--learning_rate", rate, "--max_steps", steps, "--save_steps", steps, "--eval_steps", steps]
        flags += ["--per_device_train_batch_size", 16, "--per_device_eval_batch_size", 150]
        settings = {"MODEL": model, "OUTPUT": out, "DATASET": data / "train.jsonl", "VAL_DATASET": data / "val.jsonl"}
        environment = {name: str(path) for name, path in settings.items()}
        run("bash", "full_run.sh", *flags, log=out.with_name(f"{out.name}.log"), GPUS="", **environment)
    return out


def merged(model: Path, kv_heads: int, way: str, args: argparse.Namespace) -> Path:
    out = args.work / f"{model.name}-{kv_heads}-{way}"
    if not out.exists():
        calib = ["--calib", embedded_data(args.runs / "tiny_vl") / "train.jsonl", "--calib-tokens", args.tokens, *ONCE]
        flags = {"mean": [], "calibrated": calib, "refined": [*calib, "--refine", args.refine]}[way]
        command("kv_cut.py", "--model", model, "--out", out, "--kv-heads", kv_heads, *flags)
    return out


def embedded(args: argparse.Namespace) -> dict[str, Any]:
    result = {"base": judge(EMBEDDED, args)}
    for kv_heads in (2, 1):
        for way in ("mean", "calibrated", "refined"):
            folder = merged(EMBEDDED, kv_heads, way, args)
            result[f"{kv_heads} {way}"] = {
                "untrained": judge(folder, args),
                "after_50": judge(recovered(folder, 50, args), args),
            }
            log(kv_heads, way, result[f"{kv_heads} {way}"])
    return result


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """The same number of steps: all behind one cut, or half of them between two. A refined model needs a low rate."""
    result: dict[str, Any] = {"learning_rate": (rate := "2e-4")}
    for count in (50, 200):
        one = recovered(merged(EMBEDDED, 1, "refined", args), count, args, rate)
        half = recovered(merged(EMBEDDED, 2, "refined", args), count // 2, args, rate)
        two = recovered(merged(half, 1, "refined", args), count // 2, args, rate)
        result[str(count)] = {"in one go": judge(one, args), "4 to 2 to 1": judge(two, args)}
        log(count, result[str(count)])
    return result


def care(args: argparse.Namespace) -> dict[str, Any]:
    """CARE's K and V of rank 64, uniform and adjusted, beside ours at as many cached numbers, on the same tokens."""
    folder, texts = smollm2(args.runs / "smollm2-bf16", "bfloat16"), write_texts(args.runs)
    calib, tokens = texts["wikipedia-train"], args.ablation_tokens
    flags = ["--kv-heads", 1, "--calib", calib, "--calib-tokens", tokens, "--max-length", 512, *ONCE]
    result: dict[str, Any] = {"calibration_tokens": tokens, "base": losses(folder, texts, args.test_tokens)}
    ways = {"uniform": None, "adjusted": None, "ours": [], "ours, refined": ["--refine", args.refine]}
    for way, more in ways.items():
        out = args.work / f"care-{tokens}" / way.replace(", ", "-")
        if not out.exists():
            if more is None:
                decompose(folder, out, calib, tokens, 64, way == "adjusted")
            else:
                command("kv_cut.py", "--model", folder, "--out", out, *flags, *more)
        result[way] = losses(out, texts, args.test_tokens)
        for name in TESTS:
            result[way][name]["excess"] = result[way][name]["loss"] - result["base"][name]["loss"]
        log(way, result[way])
    return result


PARTS = {
    "care": care,
    "cut": cut,
    "ablation": ablation,
    "context": context,
    "mixed": mixed,
    "recovery": recovery,
    "embedded": embedded,
    "steps": steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--tokens", type=int, default=65_536, help="of calibration (default: 65536)")
    parser.add_argument(
        "--ablation-tokens", type=int, default=16_384, help="the same, for the ablation (default: 16384)"
    )
    parser.add_argument("--test-tokens", type=int, default=16_384, help="to judge on, of each kind (default: 16384)")
    parser.add_argument("--refine", type=int, default=200, help="steps a layer (default: 200)")
    parser.add_argument("--recovery-steps", type=int, default=200, help="at most (default: 200)")
    parser.add_argument("--recovery-rate", default="3e-4", help="learning rate (default: 3e-4)")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="of `ablation`; the other's figures stay"
    )
    parser.add_argument("--json", type=result_file, help="also write the results here, beside those of other parts")
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")
    args.runs = args.runs.absolute()
    args.work = args.runs / "kv" / f"{args.tokens}-{args.refine}"
    args.work.mkdir(parents=True, exist_ok=True)
    if {"mixed", "recovery"} & {*args.parts} and "cut" not in args.parts and not (args.work / "refined").exists():
        parser.error(f"mixed and recovery need what cut makes in {args.work}: name it, too")
    result = read_json(args.json) if args.json and args.json.exists() else {}
    result |= {"model": "SmolLM2-135M-Instruct, bf16", "threads": torch.get_num_threads()}
    for part in (part for part in PARTS if part in args.parts):
        args.known = result.get(part, {})
        result[part] = PARTS[part](args)
        if args.json:
            write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
