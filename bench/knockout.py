"""The fast scan: its time and memory, what a race leaves out, what predicts trained knockouts, which sets are good.

    bash bench/setup.sh
    .venv/bin/python bench/knockout.py --json docs/measured/knockout.json --test-tokens 4096 \\
        speed memory race predict sets

Parts, each a key of the JSON: `speed` compares a full scan of SmolLM2-135M (30 layers, 8k tokens) with 30 plain
evaluations, with saving, loading and evaluating every pruned copy, and with one training of 100 steps for each layer;
`memory` its peak with that of a plain evaluation; `race` the time and finalists of --race with the full scan's;
`predict` ranks removals by each metric of the scan and by trained knockouts, of the embedded model and of SmolLM2;
`sets` removes 3, 5 and 8 layers chosen in five ways. All of it takes two hours on two CPU cores.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from materials import EMBEDDED, MODELS, embedded_data, result_file, smollm2, write_texts
from transformers import AutoModelForCausalLM

from prunekit.checkpoint import open_checkpoint, read_json, write_json
from prunekit.data.batches import calibrate, read_calibration
from prunekit.knockout.removal import Removal, list_removals
from prunekit.knockout.scanner import Job, load_scanner
from prunekit.knockout.search import HealedScan, Scan, find_path
from prunekit.knockout.trained import Sweep, Training, run_name
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.report import style
from prunekit.scan import describe
from prunekit.surgery.cut import write_cut
from prunekit.surgery.in_memory import removed
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.layers_fit import fit_layers

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 8192
PREDICTORS = ("token_acc", "loss", "kl", "block_influence")
TINY = [
    "--torch_dtype",
    "float32",
    "--fp16",
    "false",
    "--bf16",
    "false",
    "--use_cpu",
    "true",
    "--gradient_checkpointing",
    "false",
    "--dataloader_num_workers",
    "0",
    "--check_model",
    "false",
    "--add_version",
    "false",
    "--seed",
    "42",
    "--report_to",
    "none",
    "--tuner_type",
    "full",
    "--freeze_vit",
    "false",
    "--freeze_aligner",
    "false",
    "--gradient_accumulation_steps",
    "1",
    "--logging_steps",
    "5",
]


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(seconds, result)"""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def chat_rows(texts: Path, folder: Path, characters: int) -> Path:
    """The texts as answers without a question, as ms-swift's messages."""
    target = folder / f"{texts.stem}-messages-{characters}.jsonl"
    rows = [json.loads(line)["text"][:characters] for line in texts.open()]
    message = ({"messages": [{"role": "assistant", "content": row}]} for row in rows)
    target.write_text("".join(json.dumps(row) + "\n" for row in message))
    return target


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    return statistics.correlation(ranks(one), ranks(other))


def speed(args: argparse.Namespace) -> dict[str, Any]:
    folder = smollm2(args.runs / "smollm2-bf16", "bfloat16")
    texts = write_texts(args.runs)
    job = Job(str(folder), str(texts["wikipedia-test"]), TOKENS, 512)
    scanner = load_scanner(job)
    runs = list_removals(scanner.checkpoint, "all", "none")
    evaluate = lambda: score_batches(scanner.model, scanner.batches)  # noqa: E731

    def forward(**labels: bool) -> None:
        for batch in scanner.batches:
            names = ("input_ids", "attention_mask", *labels)
            with torch.inference_mode():
                scanner.model(**{name: batch[name] for name in names}, use_cache=False)

    evaluate()
    plain, forwards, with_loss, scans = [], [], [], []
    for _ in range(args.repeat):
        plain.append(timed(evaluate)[0])
        forwards.append(timed(forward)[0])
        with_loss.append(timed(lambda: forward(labels=True))[0])
        scanner.references.clear()
        scans.append(timed(lambda: [scanner.measure([], runs, i) for i in range(len(scanner.batches))])[0])
        plain.append(timed(evaluate)[0])
        log(f"scan {scans[-1]:.1f} s, an evaluation {plain[-1]:.1f} s, a forward pass {forwards[-1]:.1f} s")
    scan, one, forward_pass, loss_pass = map(statistics.median, (scans, plain, forwards, with_loss))

    def save_load_evaluate(layer: int) -> None:
        with tempfile.TemporaryDirectory(dir=args.runs) as work:
            write_cut(cut_layers(plan_layers(scanner.checkpoint, text=[layer])), Path(work) / "cut")
            score_batches(load_model(open_checkpoint(Path(work) / "cut")), scanner.batches)

    def by_transformers(layer: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        del model.model.layers[layer]
        model.config.num_hidden_layers -= 1
        with tempfile.TemporaryDirectory(dir=args.runs) as work:
            model.save_pretrained(work)
            score_batches(AutoModelForCausalLM.from_pretrained(work, dtype=torch.bfloat16), scanner.batches)

    def by_commands(layer: int) -> None:
        with tempfile.TemporaryDirectory(dir=args.runs) as work:
            cut = Path(work) / "cut"
            surgery = ["manual_select.py", "--model", folder, "--out", cut, "--text", str(layer)]
            judging = [
                "-m",
                "prunekit.evaluate",
                "--model",
                cut,
                "--dataset",
                messages,
                "--template",
                "chatml",
            ]
            judging += ["--dtype", "bfloat16", "--no-generate"]
            for command in (surgery, judging):
                subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

    rows = chat_rows(texts["wikipedia-test"], args.runs, 2000).open().readlines()
    messages = args.runs / "wikipedia-test-8k.jsonl"
    messages.write_text("".join(rows[: sum(len(batch["labels"]) for batch in scanner.batches)]))
    loops = {"ours": save_load_evaluate, "transformers": by_transformers, "commands": by_commands}
    naive = {}
    for name, loop in loops.items():
        naive[name] = statistics.median(timed(loop, layer)[0] for layer in range(2, len(runs), 6))
        log(f"save, load, evaluate by {name}: {naive[name]:.1f} s a layer")
    result = {
        "tokens": sum(int((batch["labels"] != -100).sum()) for batch in scanner.batches),
        "layers": len(runs),
        "scan_seconds": scan,
        "evaluation_seconds": one,
        "forward_pass_seconds": forward_pass,
        "forward_pass_with_loss_seconds": loss_pass,
        "scan_over_evaluations": scan / (len(runs) * one),
        "scan_over_forward_passes": scan / (len(runs) * forward_pass),
        "scan_over_forward_passes_with_loss": scan / (len(runs) * loss_pass),
        "naive_seconds_a_layer": naive,
        "naive_over_scan": {name: seconds * len(runs) / scan for name, seconds in naive.items()},
    }
    data = chat_rows(texts["wikipedia-train"], args.runs, 2000)
    few = args.runs / "wikipedia-train-few.jsonl"
    few.write_text("".join(data.open().readlines()[:16]))
    records = train(
        folder,
        [runs[13]],
        data,
        few,
        args.runs / "speed-trained",
        1,
        SMOLLM2 + ["--max_steps", str(args.steps), "--eval_steps", str(args.steps)],
    )
    if records[0]["error"]:
        sys.exit(f"error: the training failed: {records[0]['error']}")
    shutil.rmtree(args.runs / "speed-trained")
    seconds = records[0]["seconds"] * 100 / args.steps
    return result | {"trained_knockout_seconds": seconds, "trained_over_scan": seconds * len(runs) / scan}


SMOLLM2 = [
    *TINY, "--torch_dtype", "bfloat16", "--bf16", "true", "--template", "chatml", "--learning_rate", "5e-5",
    "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "4", "--max_length", "512",
    "--dataset_num_proc", "1", "--lr_scheduler_type", "constant",
]  # fmt: skip


def train(
    model: Path, runs: list, data: Path, validation: Path, out: Path, jobs: int, arguments: list[str]
) -> list[dict]:
    """Records of trained knockouts; those that an earlier call did aren't repeated."""
    model_type = open_checkpoint(model).config["model_type"]
    plugins = ["--external_plugins", str(ROOT / "plugins" / "images_and_answers.py")]
    flags = (*plugins, "--dataset", str(data), "--val_dataset", str(validation), *arguments)
    sweep = Sweep(Training(model, model_type, out, flags, "bench"), [], jobs)
    done = sweep.finished(runs)
    with contextlib.closing(sweep.do_all([run for run in runs if run_name(run) not in done])) as records:
        for record in records:
            log(f"{record['name']}: {record['error'] or record['token_acc']} ({record['seconds']:.0f} s)")
            done[record["name"]] = record
    return [done[run_name(run)] for run in runs]


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of two processes that do nothing else, in MB of resident memory."""
    folder = smollm2(args.runs / "smollm2-bf16", "bfloat16")
    data = write_texts(args.runs)["wikipedia-test"]
    peaks = {}
    for what in ("evaluate", "scan"):
        command = [sys.executable, __file__, f"peak-{what}", "--runs", str(args.runs)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[what] = json.loads(done.stdout)["peak_mb"]
        log(f"{what} of {folder.name} on {data.name}: {peaks[what]} MB at its peak")
    return peaks | {"scan_over_evaluate": peaks["scan"] / peaks["evaluate"]}


def peak(args: argparse.Namespace, what: str) -> dict[str, Any]:
    job = Job(str(args.runs / "smollm2-bf16"), str(args.runs / "wikipedia-test.jsonl"), TOKENS, 512)
    scanner = load_scanner(job)
    if what == "evaluate":
        score_batches(scanner.model, scanner.batches)
    else:
        runs = list_removals(scanner.checkpoint, "all", "none")
        for index in range(len(scanner.batches)):
            scanner.measure([], runs, index)
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def race(args: argparse.Namespace) -> dict[str, Any]:
    folder = smollm2(args.runs / "smollm2-bf16", "bfloat16")
    data = str(write_texts(args.runs)["wikipedia-test"])
    full_job = Job(str(folder), data, TOKENS, 128)
    candidates = list_removals(open_checkpoint(folder), "all", "none")
    result = {"tokens": TOKENS, "rows_of": 128, "finalists": {}}
    full = Scan(full_job, None, quiet=True)
    full_seconds, _ = timed(lambda: full.measure([], candidates, range(full.batches), "scan"))
    scores = {str(k): full.score([], str(k)) for k in candidates}
    order = sorted(scores, key=lambda name: scores[name]["loss"])
    fair_job = Job(str(folder), data, TOKENS, 128, fair_batches=True)
    load_scanner(fair_job)
    for keep in (5, 10):
        scan = Scan(fair_job, None, quiet=True)
        weights = {str(k): 1.0 for k in candidates}
        seconds, (best, undecided) = timed(scan.race, [], candidates, keep, weights, args.race_share)
        result["finalists"][keep] = {
            "race": best,
            "full_scan": order[:keep],
            "agree": len(set(best) & set(order[:keep])),
            "undecided": sorted(undecided),
            "seconds": seconds,
            "share_of_full": seconds / full_seconds,
            "losses": {
                name: {
                    "full": scores[name]["loss"],
                    "race": (score := scan.score([], name))["loss"],
                    "error": score["standard_error"]["loss"],
                }
                for name in dict.fromkeys([*best, *order[:keep]])
            },
        }  # fmt: skip
        found = result["finalists"][keep]
        log(
            f"best {keep}: {found['agree']} agree, {found['share_of_full']:.2f} of the full scan's {full_seconds:.0f} s"
        )
    return result | {"full_seconds": full_seconds}


def predict(args: argparse.Namespace) -> dict[str, Any]:
    cases = {}
    if "embedded" in args.models:
        data = embedded_data(args.runs / "tiny_vl")
        flags = [
            *TINY, "--learning_rate", "2e-4", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size",
            "120", "--max_steps", "40", "--eval_steps", "20",
        ]  # fmt: skip
        cases["embedded"] = EMBEDDED, data / "train.jsonl", data / "val.jsonl", flags, 2, None, 4096
    if "smollm2" in args.models:
        texts = write_texts(args.runs)
        train_rows = chat_rows(texts["wikipedia-train"], args.runs, 900)
        every = chat_rows(texts["wikipedia-test"], args.runs, 900)
        few = args.runs / "wikipedia-test-few.jsonl"
        few.write_text("".join(every.open().readlines()[::24][:20]))
        flags = [*SMOLLM2, "--max_length", "256", "--max_steps", "20", "--eval_steps", "20"]
        cases["smollm2"] = smollm2(args.runs / "smollm2-bf16", "bfloat16"), train_rows, few, flags, 1, "chatml", 256
    result = dict(args.known)
    for name, (model, data, validation, arguments, jobs, template, length) in cases.items():
        removals = list_removals(open_checkpoint(model), "all", "all")
        records = train(model, [None, *removals], data, validation, args.runs / f"trained-{name}", jobs, arguments)
        scan = Scan(Job(str(model), str(validation), None, length, template=template), None)
        scan.measure([], removals, range(scan.batches), "scan")
        scanned = {entry["name"]: entry for entry in describe(scan, removals, None, set(), "all")["removals"]}
        trained = {record["name"]: record["token_acc"] for record in records}
        names = [str(removal) for removal in removals if trained[str(removal)] is not None]
        result[name] = {
            "layers": len(names),
            "flags": " ".join(arguments),
            "baseline": {"trained": trained["baseline"], "scanned": scan.score([], "baseline")["token_acc"]},
            "spearman": {
                metric: spearman(
                    [scanned[n][metric] * (1 if metric == "token_acc" else -1) for n in names],
                    [trained[n] for n in names],
                )
                for metric in PREDICTORS
            },
            "removals": {n: {"trained": trained[n]} | {m: scanned[n][m] for m in PREDICTORS} for n in names},
        }
        log(name, result[name]["spearman"])
    return result


def sets(args: argparse.Namespace) -> dict[str, Any]:
    folder = smollm2(args.runs / "smollm2-bf16", "bfloat16")
    checkpoint, texts = open_checkpoint(folder), write_texts(args.runs)
    counts = (3, 5, 8)
    job = Job(str(folder), str(texts["wikipedia-train"]), args.choice_tokens, 256)
    candidates = list_removals(checkpoint, "all", "none")
    scan = Scan(job, args.runs / f"sets-records-{args.choice_tokens}.jsonl")
    scan.measure([], candidates, range(scan.batches), "scan")
    removals = describe(scan, candidates, None, set(), "all")["removals"]
    chosen, seconds = {}, {}
    for metric in ("loss", "token_acc", "block_influence"):
        sign = -1 if metric == "token_acc" else 1
        chosen[metric] = [e["layer"] for e in sorted(removals, key=lambda e: sign * e[metric])]
    seconds["greedy"], path = timed(find_path, scan, candidates, max(counts), None, None)
    chosen["greedy"] = [Removal.parse(name).layer for name in path[-1]["removed"]]
    log("greedy", chosen["greedy"])
    # Of the better third only, and on few tokens: each candidate is healed, and each set from the start
    hopeful = [k for k in candidates if k.layer in sorted(chosen["loss"][: len(candidates) // 3])]
    records = args.runs / f"sets-records-{args.choice_tokens}-healed.jsonl"
    healed = HealedScan(job, records, read_calibration(texts["wikipedia-train"]), args.choice_tokens * 3 // 2)
    seconds["greedy_healed"], path = timed(find_path, healed, hopeful, args.healed_layers, None, None)
    chosen["greedy_healed"] = [Removal.parse(name).layer for name in path[-1]["removed"]]
    log("greedy, healed", chosen["greedy_healed"])
    load_scanner.cache_clear()

    model = load_model(checkpoint)
    tests = {}
    for name in ("wikipedia-test", "docstrings"):
        found = calibrate(model, checkpoint, texts[name], max_tokens=args.test_tokens)
        tests[name] = [*found.fit, *found.held_out]
    data = calibrate(model, checkpoint, texts["wikipedia-train"], max_tokens=args.test_tokens)

    def losses() -> dict[str, float]:
        return {name: score_batches(model, batches)["loss"] for name, batches in tests.items()}

    base, rows = losses(), []
    for count in counts:
        for way, layers in chosen.items():
            if len(layers) < count:
                continue
            plan = plan_layers(checkpoint, text=layers[:count])
            with removed(model, plan):
                row = {
                    "layers_removed": count,
                    "chosen_by": way,
                    "layers": sorted(layers[:count]),
                    "loss": losses(),
                }
            if way in ("loss", "greedy", "greedy_healed") and count <= args.healed_layers:
                fit_layers(plan, model, data)
                with removed(model, plan):
                    row["loss_healed"] = losses()
                model = load_model(checkpoint)
            rows.append(row)
            log(row)
    return {
        "choice_tokens": args.choice_tokens,
        "seconds": seconds,
        "order": {way: layers[: max(counts)] for way, layers in chosen.items()},
        "base": base,
        "rows": rows,
    }


WAYS = {
    "loss": "independent, by loss",
    "token_acc": "independent, by token_acc",
    "block_influence": "independent, by block influence",
    "greedy": "greedy",
    "greedy_healed": "greedy, each candidate healed",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """What predicts trained knockouts, and what sets chosen in five ways cost."""
    figure, axes = style.new_figure(3, 12.6, 3.6)
    cases = result["predict"].items()
    for axis, (name, case) in zip(axes[0], cases):
        trained = [entry["trained"] for entry in case["removals"].values()]
        scanned = [entry["token_acc"] for entry in case["removals"].values()]
        axis.plot([0, 1], [0, 1], color=style.GRID, linewidth=1)
        axis.scatter(scanned, trained, s=14, color=style.LINES[0])
        axis.set_title(f"{name}: Spearman {case['spearman']['token_acc']:.3f}")
        axis.set_xlabel("token_acc without a layer, scanned")
        axis.set_ylabel("trained")
        top = max(*trained, *scanned) * 1.04
        axis.set_xlim(0, top)
        axis.set_ylim(0, top)
    axis, rows = axes[0][2], result["sets"]["rows"]
    for colour, (way, label) in zip((*style.LINES, style.MUTED), WAYS.items()):
        mine = [row for row in rows if row["chosen_by"] == way]
        counts = [row["layers_removed"] for row in mine]
        axis.plot(
            counts,
            [row["loss"]["wikipedia-test"] for row in mine],
            "o-",
            markersize=3,
            color=colour,
            label=label,
        )
        healed = [row["loss_healed"]["wikipedia-test"] for row in mine if "loss_healed" in row]
        axis.plot(counts[: len(healed)], healed, "o--", markersize=3, color=colour)
    axis.axhline(result["sets"]["base"]["wikipedia-test"], color=style.INK, linewidth=0.8, linestyle=":")
    axis.set_title("SmolLM2: loss of sets (dashed: healed)")
    axis.set_xlabel("layers removed of 30")
    axis.set_xticks([3, 5, 8])
    axis.set_ylim(top=min(axis.get_ylim()[1], 6.5))
    axis.legend(frameon=False, fontsize=7)
    style.save_figure(figure, path)


PARTS = {"speed": speed, "memory": memory, "race": race, "predict": predict, "sets": sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "peak-scan", "peak-evaluate"], metavar="PART")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--repeat", type=int, default=3, help="scans timed (default: 3)")
    parser.add_argument("--steps", type=int, default=100, help="of the training that is timed (default: 100)")
    parser.add_argument("--race-share", type=float, default=0.3)
    parser.add_argument("--choice-tokens", type=int, default=2048, help="to choose sets on (default: 2048)")
    parser.add_argument("--test-tokens", type=int, default=8192, help="to judge sets on, of each kind (default: 8192)")
    parser.add_argument("--healed-layers", type=int, default=8, help="longest set to heal (default: 8)")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="of `predict`; the other's figures stay"
    )
    parser.add_argument("--json", type=result_file, help="also write the results here, beside those of other parts")
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.parts[0].startswith("peak-"):
        print(json.dumps(peak(args, args.parts[0].removeprefix("peak-"))))
        return
    result = read_json(args.json) if args.json and args.json.exists() else {}
    result |= {"model": "SmolLM2-135M-Instruct, bf16", "threads": torch.get_num_threads()}
    for part in args.parts:
        args.known = result.get(part, {})
        result[part] = PARTS[part](args)
        if args.json:
            write_json(args.json, result)
    if args.json and {"predict", "sets"} <= result.keys():
        draw(result, args.json.with_suffix(".png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
