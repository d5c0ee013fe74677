"""Remove attention heads and MLP neurons from every text layer of a checkpoint: narrower layers, as many as before.

    python width_cut.py --model checkpoints/base --out checkpoints/narrow --head-share 0.5 --neuron-share 0.75 \\
        --calib data/train.jsonl
    python width_cut.py --model checkpoints/base --out checkpoints/narrow --heads 16 --score magnitude
    python width_cut.py --model checkpoints/gpt2 --out checkpoints/masked --heads 6 --calib data/train.jsonl

Numbers and shares are of what stays, in each layer. Every KV head keeps the same number of query heads; --kv-groups
drops KV heads with all their query heads. What is left loads in transformers and vLLM as any other checkpoint. Where
the config can't say it (GPT-2, BERT: head size is hidden / heads), or with --mask, heads are zeroed where o_proj reads
them: that saves no time, but training only what is left works on it (plugins/head_rates.py). With --calib, heads and
neurons are scored on your data, each layer behind the cut ones before it, and o_proj and down_proj are refitted there;
it needs the model in memory. Without it, the weights alone decide. With --mask and --across-layers important layers
keep more heads and neurons than others, as many in all.
"""

from functools import partial
from pathlib import Path

from prunekit.arguments import positive_int, share
from prunekit.checkpoint.records import HEADS
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import run_script
from prunekit.model.load import load_model
from prunekit.surgery.script import (
    NOTHING_WRITTEN,
    open_input,
    parse_surgery,
    save,
    show_plan,
    surgery_parser,
    warn_of_zeros,
)
from prunekit.surgery.width import SCORES, cut_width, plan_width, refits


def main() -> None:
    parser = surgery_parser(__doc__)
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--heads", type=positive_int, metavar="N", help="query heads that each layer keeps")
    heads.add_argument("--head-share", type=share, metavar="S", help="share of them that it keeps, like 0.5")
    parser.add_argument(
        "--kv-groups",
        type=positive_int,
        metavar="N",
        help="KV heads that each layer keeps, with their query heads",
    )
    neurons = parser.add_mutually_exclusive_group()
    neurons.add_argument("--neurons", type=positive_int, metavar="N", help="neurons that each MLP (or expert) keeps")
    neurons.add_argument(
        "--neuron-share",
        type=share,
        metavar="S",
        help="share of them that it keeps, rounded to a multiple of 8",
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        help="what decides: weights (default without --calib); what is written (default with it); entropy or variance "
        "of attention (neurons then by activation); gradient x value, on the uncut model",
    )
    parser.add_argument("--mask", action="store_true", help="zero what would go, and keep all shapes")
    parser.add_argument(
        "--across-layers",
        action="store_true",
        help="numbers are means: important layers keep more, others less; with --mask and --score taylor",
    )
    add_calibration_arguments(parser.add_argument_group("calibration"))
    arguments = parse_surgery(parser)
    score = arguments.score or ("activation" if arguments.calib else "magnitude")
    if score != "magnitude" and not arguments.calib:
        parser.error(f"--score {score} needs --calib")
    if arguments.across_layers and score != "taylor":
        parser.error("--across-layers needs --score taylor: no other can be compared between layers")

    checkpoint = open_input(arguments)
    numbers = (arguments.heads, arguments.head_share, arguments.neurons, arguments.neuron_share)
    plan = plan_width(checkpoint, *numbers, arguments.kv_groups, arguments.mask, arguments.across_layers)
    show_plan(checkpoint, plan.outline, arguments, plan.notes)
    if arguments.calib:
        if refits(plan):
            warn_of_zeros(checkpoint)
        model, data = model_and_calibration(checkpoint, arguments)
        from prunekit.surgery.width_fit import fit_width  # torch: seconds, after all that can be checked without it

        again = partial(load_model, checkpoint, arguments.device, arguments.dtype)
        cut = fit_width(plan, model, data, score, again)
        if cut.metrics:
            print("held-out loss {held_out_loss_uncut:.4f} -> {held_out_loss:.4f}".format(**cut.metrics))
    elif arguments.dry_run:
        print(NOTHING_WRITTEN)
        return
    else:
        cut = cut_width(plan)
    if (entry := save(cut, arguments)) and plan.heads:
        from prunekit.report import draw_heads  # matplotlib

        draw_heads(entry, Path(arguments.out) / HEADS)


if __name__ == "__main__":
    run_script(main)
