"""Merge KV heads to any divisor of the present count, down to 1 (MQA).

    python kv_cut.py --model checkpoints/pruned --out checkpoints/kv2 --kv-heads 2 --calib data/train.jsonl
    python kv_cut.py --model checkpoints/pruned --out checkpoints/kv2 --kv-heads 2

With --calib, heads that go together are chosen, aligned and folded into the projections around them, so that attention
stays nearly what it was; --refine fits each layer's attention further. It takes the memory of one layer and some disk
beside OUT. Give rows as long as those that you serve (see --max-length); half of those without pictures say all twice
(--repeat), since of text as it is written little tells heads that look back from heads that don't. Without --calib,
neighbours are averaged, and recovery (full_run.sh) has to learn attention again.
"""

import argparse
import tempfile
from pathlib import Path

from prunekit.arguments import check_beside, fraction, natural, positive_int
from prunekit.checkpoint import scratch_folder
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import run_script
from prunekit.surgery.kv import METHODS, KVCut, KVPlan, check_refinable, cut_kv, plan_kv
from prunekit.surgery.script import open_input, parse_surgery, save, show_plan, surgery_parser, warn_of_zeros


def fit(plan: KVPlan, arguments: argparse.Namespace) -> KVCut:
    """The plan fitted on calibration data, and what came of it printed."""
    with scratch_folder(Path(arguments.out or Path(tempfile.gettempdir()) / "kv_cut")) as scratch:
        batch_tokens = 1024 if arguments.refine else 4096  # more steps on the same tokens, for the same time
        model, data = model_and_calibration(plan.source, arguments, scratch, batch_tokens, arguments.repeat)
        # torch: seconds, after all that can be checked without it
        from prunekit.model.offload import on_disk
        from prunekit.surgery.kv_fit import fit_kv

        cut = fit_kv(plan, model, data, arguments.refine, on_disk(scratch))
    longest = cut.settings["longest_row"]
    print(f"calibrated on {data.tokens:,} tokens, in rows of up to {longest:,}: farther than that it is worse")
    print("held-out loss {held_out_loss_unmerged:.4f} -> {held_out_loss:.4f}".format(**cut.metrics))
    return cut


def main() -> None:
    parser = surgery_parser(__doc__)
    parser.add_argument("--kv-heads", type=positive_int, required=True, metavar="N", help="KV heads to keep")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="calibrated (default with --calib), the mean of neighbours (default without), or their first head",
    )
    group = parser.add_argument_group("calibration")
    add_calibration_arguments(group)
    group.add_argument(
        "--refine",
        type=natural,
        default=0,
        metavar="STEPS",
        help="of Adam on each layer's attention, to what the uncut one writes (default: 0; 200 is much)",
    )
    group.add_argument(
        "--repeat",
        type=fraction,
        default=0.5,
        metavar="SHARE",
        help="of the rows without pictures, says all twice, so that heads that look back are kept (default: 0.5)",
    )
    arguments = parse_surgery(parser)
    method = arguments.method or ("calibrated" if arguments.calib else "mean")
    if (method == "calibrated") != bool(arguments.calib):
        parser.error("--method calibrated and --calib need each other")
    check_beside(parser, arguments, "calib", ("refine", "repeat"))

    checkpoint = open_input(arguments)
    plan = plan_kv(checkpoint, arguments.kv_heads, method)
    if arguments.refine:
        check_refinable(plan)
    show_plan(checkpoint, plan.outline, arguments, plan.notes)
    warn_of_zeros(checkpoint)
    save(fit(plan, arguments) if arguments.calib else cut_kv(plan), arguments)


if __name__ == "__main__":
    run_script(main)
