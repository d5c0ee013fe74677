"""Merge KV heads to any divisor of the present count, down to 1 (MQA).

    python kv_cut.py --model checkpoints/pruned --out checkpoints/kv2 --kv-heads 2 --calib data/train.jsonl
    python kv_cut.py --model checkpoints/pruned --out checkpoints/kv2 --kv-heads 2

With --calib, heads that go together are chosen, aligned and folded into the projections around them, so that attention
stays nearly what it was; --refine fits each layer's attention further. It takes the memory of one layer and some disk
beside OUT. Without --calib, neighbours are averaged, and recovery (full_run.sh) has to learn attention again.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from prunekit.calibration import add_calibration_arguments, model_and_calibration
from prunekit.checkpoint import check_out, open_checkpoint, scratch_folder, statistics
from prunekit.errors import run_script
from prunekit.inspect import comparison
from prunekit.kv_heads import METHODS, KVMerge, apply_kv_merge, plan_kv_merge


def calibrate_plan(plan: KVMerge, arguments: argparse.Namespace) -> tuple[KVMerge, dict[str, Any]]:
    """The plan with its tensors, and what its history shall say of them."""
    with scratch_folder(Path(arguments.out or Path(tempfile.gettempdir()) / "kv_cut")) as scratch:
        batch_tokens = 1024 if arguments.refine else 4096  # more steps on the same tokens, for the same time
        model, data = model_and_calibration(plan.source, arguments, scratch, batch_tokens)
        from prunekit.kv_merge import (
            calibrate_merge,
        )  # torch: seconds, after all that can be checked without it
        from prunekit.offload import on_disk

        plan, losses = calibrate_merge(plan, model, data, arguments.refine, on_disk(scratch))
    print("held-out loss {held_out_loss_unmerged:.4f} -> {held_out_loss:.4f}".format(**losses))
    settings = {
        "calib": str(arguments.calib),
        "calibration_tokens": data.tokens,
        "refine_steps": arguments.refine,
    }
    return plan, {"settings": settings, "metrics": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder to read")
    parser.add_argument("--out", help="checkpoint folder to write; not needed with --dry-run")
    parser.add_argument("--kv-heads", type=int, required=True, metavar="N", help="KV heads to keep")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="calibrated (default with --calib), the mean of neighbours (default without), or their first head",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, help="largest weight file (default: sharded like the input)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    group = parser.add_argument_group("calibration")
    add_calibration_arguments(group)
    group.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="of Adam on each layer's attention, to what the uncut one writes (default: 0; 100 is much)",
    )
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        parser.error("--out is needed (or --dry-run)")
    method = arguments.method or ("calibrated" if arguments.calib else "mean")
    if (method == "calibrated") != bool(arguments.calib):
        parser.error("--method calibrated and --calib need each other")
    if arguments.refine < 0 or (arguments.refine and not arguments.calib):
        parser.error("--refine takes a positive number of steps, and --calib")

    checkpoint = open_checkpoint(arguments.model)
    if arguments.out:
        check_out(arguments.out, checkpoint.path, overwrite=arguments.overwrite)
    plan = plan_kv_merge(checkpoint, arguments.kv_heads, method)
    print(comparison(statistics(checkpoint), statistics(plan.result)))
    calibration = None
    if method == "calibrated":
        plan, calibration = calibrate_plan(plan, arguments)
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    limit = arguments.max_shard_gb
    apply_kv_merge(
        plan, arguments.out, arguments.overwrite, None if limit is None else int(limit * 1e9), calibration
    )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_script(main)
