"""What half of the experts cost: a tiny Qwen3-MoE of 16 experts a layer, cut to 12 and 8 in several ways.

    bash bench/setup.sh && .venv/bin/python bench/experts.py --json docs/measured/experts.json

The model is bench/tiny_moe.py's, which is trained first if it isn't there. Experts are chosen, and what is left is
refitted, on calib.jsonl; losses (nats a token) are on rows of test.jsonl, from files that neither training nor
calibration saw, each with the standard error of the rows' difference to the uncut model, and of their difference to
REAP without a refit. Prints JSON, that of other numbers of experts in --json kept; takes some minutes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from materials import known_result, result_file
from tiny_moe import tiny_moe

from prunekit.checkpoint import history, open_checkpoint, write_json
from prunekit.data.batches import Calibration, calibrate
from prunekit.errors import run_script
from prunekit.model.load import load_model
from prunekit.model.scores import score_batch
from prunekit.surgery.cut import write_cut
from prunekit.surgery.experts import plan_experts
from prunekit.surgery.experts_fit import fit_experts

WAYS = {  # by name: score, and whether what is left is refitted
    "REAP": ("reap", False),
    "frequency": ("frequency", False),
    "random": ("random", False),
    "REAP, refitted": ("reap", True),
    "error": ("error", False),
    "error, refitted": ("error", True),
}


def row_losses(folder: Path, data: Calibration) -> list[tuple[float, int]]:
    """Of each row (nats, tokens)."""
    model, found = load_model(open_checkpoint(folder)), []
    for batch in [*data.fit, *data.held_out]:
        _, losses, rows = score_batch(model, batch)
        for row in range(len(batch["input_ids"])):
            of_row = losses[rows == row]
            found.append((float(of_row.double().sum()), len(of_row)))
    return found


def difference(own: list[tuple[float, int]], other: list[tuple[float, int]]) -> tuple[float, float]:
    """Nats a token that these rows lose over those, and its standard error (of a ratio of means, over rows)."""
    tokens = sum(count for _, count in own)
    gaps = [a[0] - b[0] for a, b in zip(own, other, strict=True)]
    mean = sum(gaps) / tokens
    rest = [gap - mean * count for gap, (_, count) in zip(gaps, own)]
    return mean, statistics.stdev(rest) * len(rest) ** 0.5 / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--minutes", type=float, default=10, help="of the model's training, if it is to be trained")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration (default: 32768)")
    parser.add_argument("--test-tokens", type=int, default=32_768)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 12], help="that each layer keeps")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=result_file, help="also write the result here")
    args = parser.parse_args()
    known = {"cuts": {}} | known_result(args.json, {"tokens": args.tokens, "test_tokens": args.test_tokens})
    folder = tiny_moe(args.runs / "tiny-moe", args.minutes)
    base, work = open_checkpoint(folder / "model"), args.runs / "experts"
    model = load_model(base)
    data = calibrate(model, base, folder / "calib.jsonl", args.tokens)
    tests = calibrate(model, base, folder / "test.jsonl", args.test_tokens)
    uncut = row_losses(base.path, tests)
    tokens = sum(count for _, count in uncut)
    result = known | {
        "model": f"Qwen3-MoE of {sum(p.numel() for p in model.parameters()):,} parameters, fp32",
        "calibration_tokens": data.tokens,
        "test_tokens": tokens,
        "test_rows": len(uncut),
        "threads": torch.get_num_threads(),
        "uncut": sum(nats for nats, _ in uncut) / tokens,
    }
    for count in args.experts:
        rows: dict[str, list[tuple[float, int]]] = {}
        cuts = result["cuts"][str(count)] = {}
        for way in ("REAP", *(way for way in args.ways if way != "REAP")):
            score, refitted = WAYS[way]
            out = work / f"{count}-{way}".replace(", ", "-")
            start = time.process_time()
            cut = fit_experts(plan_experts(base, count), load_model(base), data, score, refitted, quiet=True)
            write_cut(cut, out, overwrite=True)
            seconds = round(time.process_time() - start, 1)
            rows[way] = row_losses(out, tests)
            above, error = difference(rows[way], uncut)
            less, less_error = difference(rows[way], rows["REAP"])
            cuts[way] = {
                "parameters": history(out)[-1]["parameters"],
                "loss": sum(nats for nats, _ in rows[way]) / tokens,
                "above_uncut": above,
                "standard_error": error,
                "above_reap": less,
                "above_reap_error": less_error,
                "of_reap": above / difference(rows["REAP"], uncut)[0],
                "cpu_seconds": seconds,
            }
            print(count, way, json.dumps(cuts[way]), file=sys.stderr, flush=True)
            if args.json:
                write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
