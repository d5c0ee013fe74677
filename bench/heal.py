"""What healing the seams gives back: loss of SmolLM2-135M with 3, 5 and 8 of 30 layers removed, without and with it.

    bash bench/setup.sh && .venv/bin/python bench/heal.py --json docs/heal.json

The layers are chosen greedily on training text: all single removals are scored, the cheapest stays removed, the twelve
next cheapest are scored again with it gone, and so on. Calibration is on the training half of Wikipedia articles; loss
(nats per token) is measured on the other half, and on text of another kind (docstrings). Prints JSON; takes a quarter
of an hour on two CPU cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from materials import smollm2, write_texts
from tqdm import tqdm

from prunekit.calibration import Calibration, calibrate, load_model
from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.evaluate import score_batches
from prunekit.heal import heal
from prunekit.layers import plan_removal
from prunekit.stacks import removed


def greedy(model, checkpoint, batches: list[dict], count: int) -> list[int]:
    """The `count` text layers whose removal, one after the other, costs least loss on these batches."""
    chosen: list[int] = []
    layers = list(range(checkpoint.config["num_hidden_layers"]))
    for step in range(count):
        losses = {}
        for layer in tqdm(layers, desc=f"scan {step + 1} of {count}", disable=None):
            with removed(model, plan_removal(checkpoint, text=[*chosen, layer])):
                losses[layer] = score_batches(model, batches)["loss"]
        chosen.append(min(losses, key=losses.get))
        layers = [layer for layer in sorted(losses, key=losses.get) if layer not in chosen][:12]
        print(f"removed {chosen}: loss {losses[chosen[-1]]:.3f}", file=sys.stderr, flush=True)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration (default: 32768)")
    parser.add_argument("--scan-tokens", type=int, default=3072)
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[3, 5, 8], help="numbers of layers to remove"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="skip the scan: the cheapest, in this order")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()

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
    scan = batches("wikipedia-train", args.scan_tokens)
    order = args.layers or greedy(model, checkpoint, [*scan.fit, *scan.held_out], max(args.counts))
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
        plan = plan_removal(checkpoint, text=order[:count])
        with removed(model, plan):
            without = losses()
        start = time.perf_counter()
        _, seams = heal(plan, model, data)
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
