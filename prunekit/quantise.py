"""Quantise a checkpoint for serving: FP8, INT8 or 4-bit weights in the text layers, as vLLM and transformers load them.

    python -m prunekit.quantise --model checkpoints/rl --out checkpoints/rl-fp8 --method fp8
    python -m prunekit.quantise --model checkpoints/rl --out checkpoints/rl-int4 --method gptq --calib data/train.jsonl

`quantise.sh` calls this, beside the llm-compressor that lib/llm_compressor.sh installs. fp8, int8 and int4 need no data
and little memory, and run on a CPU; gptq rounds to 4 bits on your rows, layer by layer.
"""

import argparse
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, check_beside, positive_int
from prunekit.checkpoint import Checkpoint, check_out, new_folder, open_checkpoint
from prunekit.checkpoint.records import COMMAND
from prunekit.data.batches import BESIDE_CALIB, add_calibration_arguments, model_and_calibration, read_calibration
from prunekit.errors import run_script
from prunekit.serving.quantise import (
    SCHEMES,
    SWIFT,
    QuantisePlan,
    need_llm_compressor,
    plan_quantise,
    publish_quantised,
    quantise,
)


def said(plan: QuantisePlan) -> str:
    """What will be done, in words."""
    before = plan.source.nbytes
    group = f", a scale for each {plan.group} inputs" if plan.group else ", a scale for each row"
    return (
        f"{plan.method} ({SCHEMES[plan.method]}): {len(plan.modules)} projections of the text layers get "
        f"{plan.bits} bits{group}; about {plan.nbytes / 1e6:,.1f} MB of {before / 1e6:,.1f}, {plan.nbytes / before:.0%}"
    )


def publish(args: argparse.Namespace, source: Checkpoint) -> None:
    """What swift export wrote in a run's folder, as OUT."""
    command = args.written.parent / COMMAND
    with new_folder(args.out, args.overwrite, source.nbytes) as folder:
        records = (command,) if command.is_file() else ()
        entry = publish_quantised(source, args.written, folder, {"method": args.method}, records)
    tell(args.out, entry)


def tell(out: Path, entry: dict[str, Any]) -> None:
    print(f"wrote {out}: {entry['bytes'] / 1e6:,.1f} MB of {entry['bytes_before'] / 1e6:,.1f}")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--method", required=True, choices=(*SCHEMES, *SWIFT))
    parser.add_argument("--group", type=positive_int, help="inputs that share a scale, of 4 bits (default: 128 to 32)")
    parser.add_argument("--written", type=Path, help="publish what ms-swift wrote there, in this run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder at OUT")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    add_calibration_arguments(parser.add_argument_group("calibration, of gptq"))
    args = parser.parse_args()
    source = open_checkpoint(args.model)
    check_out(args.out, source.path, overwrite=args.overwrite)
    if (args.method in SWIFT) != bool(args.written):
        parser.error(f"--method {args.method}: --written is what swift export wrote, for {' and '.join(SWIFT)} alone")
    if bool(args.calib) != (args.method == "gptq"):
        parser.error("--calib names the rows that --method gptq rounds by, and it alone")
    check_beside(parser, args, "calib", [name for name in BESIDE_CALIB if name != "device"])
    if args.written:
        publish(args, source)
        return
    plan = plan_quantise(source, args.method, args.group)
    print(said(plan))
    if args.dry_run:
        if args.calib:
            read_calibration(args.calib)  # what is bad is named now, too
        return
    need_llm_compressor()
    calibrated: Any = None
    if args.method == "gptq":
        model, data = model_and_calibration(source, args, batch_tokens=1)  # a row a batch: no padding is counted
        calibrated = model, [*data.fit, *data.held_out], data.record
    tell(args.out, quantise(plan, args.out, args.overwrite, args.device or "cpu", calibrated))


if __name__ == "__main__":
    run_script(main)
