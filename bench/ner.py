"""A token classifier on its way to serving: dense, one layer dropped and distilled, 15% zeros, INT8, in one table.

    bash bench/setup.sh && .venv/bin/python bench/ner.py --json docs/measured/ner.json --figure docs/measured/ner.png

The model is Rampart (a BERT of 6 layers that tags personal data), fine-tuned on one half of presidio-evaluator's
sentences (`dense`); F1 is measured on the other half: other sentences, other identities. Every stage is a command of
the README, and stages whose folder exists in RUNS/ner are skipped, so that an interrupted run goes on. Prints JSON;
takes half an hour on two CPU cores.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from materials import ner_data, rampart, result_file
from materials import run as run_command

from prunekit.checkpoint import open_checkpoint, statistics, write_json
from prunekit.ner import evaluate
from prunekit.report import draw_f1
from prunekit.serving.measure import Measuring, measure_served, served_table, where_zeros_save_nothing
from prunekit.tagger.rows import read_rows


def run(out: Path, script: str, *arguments: object) -> Path:
    """Run a script of the repository that writes OUT, unless OUT is there."""
    if not out.exists():
        print("+", script, *arguments, "--out", out, file=sys.stderr, flush=True)
        run_command(sys.executable, script, *arguments, "--out", out)
    return out


def scan_layers(folder: Path, work: Path, data: Path, rows: int) -> list[dict]:
    """F1 of the model without each of its layers, untrained, on rows of its training half; kept in WORK/scan.json."""
    kept, texts = work / "scan.json", read_rows(data)[:rows]
    scores = json.loads(kept.read_text()) if kept.exists() else []
    for layer in range(len(scores), statistics(open_checkpoint(folder))["num_hidden_layers"]):
        cut = run(work / f"without-{layer}", "manual_select.py", "--model", folder, "--text", layer)
        scores.append({"layer": layer, "f1": evaluate(cut, texts)["f1"]})
        print(scores[-1], file=sys.stderr, flush=True)
        write_json(kept, scores)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning the dense model (default: 3)")
    parser.add_argument("--distil-steps", type=int, default=250, help="of the student (default: 250)")
    parser.add_argument("--scan-rows", type=int, default=300, help="to choose the layer on (default: 300)")
    parser.add_argument("--sparsity", type=float, default=0.15)
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each batch for (default: 3)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=result_file, help="also write the result here")
    parser.add_argument("--figure", type=result_file, help="also draw the table of F1 here")
    args = parser.parse_args()

    args.runs = args.runs.absolute()
    packaged, data = rampart(args.runs / "rampart"), ner_data(args.runs)
    work = args.runs / "ner" / f"{args.epochs}-{args.distil_steps}-{args.scan_rows}-{args.sparsity}"
    train = ["--dataset", data["ner-train"], "--report_to", "none", "--learning_rate"]
    dense = run(work / "dense", "ner_run.py", "--model", packaged, *train, 5e-5, "--num_train_epochs", args.epochs)
    scan = scan_layers(dense, work, data["ner-train"], args.scan_rows)
    layer = max(scan, key=lambda score: score["f1"])["layer"]
    dropped = work / f"without-{layer}"
    student = run(
        work / "student", "ner_run.py", "--model", dropped, "--teacher", dense, "--hidden-weight", 1, *train, 1e-4,
        "--max_steps", args.distil_steps,
    )  # fmt: skip

    def zeros(folder: Path, out: str) -> Path:
        return run(work / out, "sparsify.py", "--model", folder, "--sparsity", args.sparsity)

    pruned, student_pruned = zeros(dense, "dense-15"), zeros(student, "student-15")
    served = [dense, pruned, dropped, student, student_pruned]
    for name, folder, form in (
        ("dense-onnx", dense, "onnx"),
        ("dense-int8", dense, "onnx-int8"),
        ("dense-15-int8", pruned, "onnx-int8"),
        ("student-15-int8", student_pruned, "onnx-int8"),
    ):
        served.append(run(work / name, "deploy.py", "--model", folder, "--format", form))
    how = Measuring(data["ner-test"], seconds=args.seconds, rounds=args.rounds)
    rows = measure_served(served, how)
    for row in rows:
        row["model"] = Path(row["model"]).name
    by_name = {row["model"]: row for row in rows}
    base, small = by_name["dense"], by_name["dense-int8"]
    result = {
        "model": "Rampart 1.4 (BERT, 6 layers, hidden 384), fine-tuned",
        "threads": how.threads or len(os.sched_getaffinity(0)),
        "length": how.length,
        "packaged_f1": evaluate(packaged, read_rows(data["ner-test"]))["f1"],
        "scan": scan,
        "layer": layer,
        "rows": rows,
        "points_lost": {name: 100 * (base["f1"] - row["f1"]) for name, row in by_name.items()},
        "int8_file": small["bytes"] / base["bytes"],
        "int8_speed": {
            size: base["batches"][size]["latency"] / small["batches"][size]["latency"] for size in ("1", "32")
        },
    }  # fmt: skip
    print(served_table(rows), *where_zeros_save_nothing(rows), sep="\n", file=sys.stderr)
    if args.figure:
        names = ["dense", "dense-15", "student", "student-15", "student-15-int8"]
        draw_f1([(name, by_name[name]) for name in names], args.figure)
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
