"""What healing the seams gives back: loss of SmolLM2-135M with 3, 5 and 8 of 30 layers removed, without and with it.

    bash bench/setup.sh && .venv/bin/python bench/heal.py --json docs/measured/heal.json

The layers are chosen greedily on training text (prunekit/knockout/search.py). Calibration is on the training half of
Wikipedia articles; loss (nats per token) is measured on the other half, and on text of another kind (docstrings).
Prints JSON; takes half an hour on two CPU cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from materials import result_file, smollm2, write_texts

from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.data.batches import Calibration, calibrate
from prunekit.knockout.removal import Removal, list_removals
from prunekit.knockout.scanner import Job
from prunekit.knockout.search import Scan, find_path
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.surgery.in_memory import removed
from prunekit.surgery.layers import plan_layers
from prunekit.surgery.layers_fit import fit_layers


def greedy(folder: Path, texts: Path, tokens: int, count: int) -> list[int]:
    """The `count` text layers whose removal, one after the other, costs least loss on these texts."""
    candidates = list_removals(open_checkpoint(folder), "all", "none")
    path = find_path(Scan(Job(str(folder), str(texts), tokens, 512), None), candidates, count, None, None)
    return [Removal.parse(name).layer for name in path[-1]["removed"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration (default: 32768)")
    parser.add_argument("--scan-tokens", type=int, default=3072)
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 5, 8], help="numbers of layers to remove")
    parser.add_argument("--layers", type=int, nargs="+", help="skip the scan: the cheapest, in this order")
    parser.add_argument("--json", type=result_file, help="also write the result here")
    args = parser.parse_args()
    if args.layers and len(args.layers) < max(args.counts):
        parser.error(f"--layers: are {len(args.layers)}, and --counts wants {max(args.counts)} of them: name more")

    checkpoint = open_checkpoint(smollm2(args.runs / "smollm2-bf16", "bfloat16"))
    texts = write_texts(args.runs)

    def batches(name: str, tokens: int) -> Calibration:
        return calibrate(model, checkpoint, texts[name], max_tokens=tokens)

    model = load_model(checkpoint)
    tests = {name: batches(name, args.test_tokens) for name in ("wikipedia-test", "docstrings")}
    data = batches("wikipedia-train", args.tokens)

    def losses() -> dict[str, float]:
        return {name: score_batches(model, [*t.fit, *t.held_out])["loss"] for name, t in tests.items()}

    base = losses()
    order = args.layers or greedy(checkpoint.path, texts["wikipedia-train"], args.scan_tokens, max(args.counts))
    result = {
        "model": "SmolLM2-135M-Instruct, bf16",
        "threads": torch.get_num_threads(),
        "calibration_tokens": data.tokens,
        "order": order,
        "base": base,
        "removals": [],
    }
    for count in args.counts:
        model = load_model(checkpoint)
        plan = plan_layers(checkpoint, text=order[:count])
        with removed(model, plan):
            without = losses()
        start = time.perf_counter()
        seams = fit_layers(plan, model, data).seams
        seconds = time.perf_counter() - start
        with removed(model, plan):
            healed = losses()
        recovered = {name: (without[name] - healed[name]) / (without[name] - base[name]) for name in base}
        result["removals"].append(
            {
                "layers": sorted(order[:count]),
                "without": without,
                "healed": healed,
                "recovered": recovered,
                "seconds": seconds,
                "seams": seams,
            }
        )
        print(f"{count} layers: {without} -> {healed}, recovered {recovered}", file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
