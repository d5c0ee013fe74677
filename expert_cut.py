"""Drop experts of every mixture-of-experts layer of a checkpoint, and refit those that stay.

    python expert_cut.py --model Qwen3-30B-A3B --out checkpoints/experts --experts 64 --calib data/train.jsonl
    python expert_cut.py --model Qwen3-30B-A3B --experts 96 --calib data/train.jsonl --dry-run

Every such layer keeps the same number, so that the result is a plain checkpoint with a smaller num_experts; a token
goes to as many experts as before. Layer by layer, behind the cut ones, experts go without which the layer errs least on
your data, as it routes then; then the down projections of the others, and the router, are refitted to what the uncut
layer writes. It takes the memory of one layer and of the data's states, and some disk beside OUT.
"""

import tempfile
from pathlib import Path

from prunekit.arguments import positive_int
from prunekit.checkpoint import scratch_folder
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import run_script
from prunekit.surgery.experts import SCORES, plan_experts
from prunekit.surgery.script import open_input, parse_surgery, save, show_plan, surgery_parser, warn_of_zeros


def main() -> None:
    parser = surgery_parser(__doc__)
    parser.add_argument(
        "--experts", type=positive_int, required=True, metavar="N", help="experts that each layer keeps"
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        default=SCORES[0],
        help="what decides: the layer's error without an expert (default), REAP's router-weighted norm, how often an "
        "expert is chosen, or chance, to compare with",
    )
    parser.add_argument("--no-refit", action="store_true", help="drop experts, and leave the others as they are")
    add_calibration_arguments(parser.add_argument_group("calibration"))
    arguments = parse_surgery(parser)
    if not arguments.calib:
        parser.error("--calib is needed: experts are chosen on data")

    checkpoint = open_input(arguments)
    plan = plan_experts(checkpoint, arguments.experts)
    show_plan(checkpoint, plan.outline, arguments, plan.notes)
    if not arguments.no_refit:
        warn_of_zeros(checkpoint)
    with scratch_folder(Path(arguments.out or Path(tempfile.gettempdir()) / "expert_cut")) as scratch:
        model, data = model_and_calibration(checkpoint, arguments, scratch)
        # torch: seconds, after all that can be checked without it
        from prunekit.model.offload import on_disk
        from prunekit.surgery.experts_fit import fit_experts

        cut = fit_experts(plan, model, data, arguments.score, not arguments.no_refit, on_disk(scratch))
    print(f"calibrated on {data.tokens:,} tokens")
    print("held-out loss {held_out_loss_uncut:.4f} -> {held_out_loss:.4f}".format(**cut.metrics))
    save(cut, arguments)


if __name__ == "__main__":
    run_script(main)
