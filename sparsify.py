"""Set single weights of a checkpoint to zero: those with the lowest scores.

    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5 --score wanda --calib data/train.jsonl
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5 --calib data/train.jsonl \\
        --layer-importance activation --power 0.5
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --pattern 2:4 --modules 'mlp|o_proj' \\
        --score wanda --calib data/train.jsonl --refit

The projections of all layers are meant, experts included, or those that --modules names. --sparsity counts over them:
with --scope global (default) one threshold goes through all, with layer each tensor gets the same share, with row each
output of each tensor (default for wanda). --layer-importance gives important layers less of it and the others more, the
sum as asked. --threshold zeroes every weight whose score is below it. Magnitudes are read tensor by tensor; other scores
and importances need the model in memory and --calib, and so does --refit: the weights that stay then make up for those
that went, layer by layer. Train on with the zeros kept: sparse_run.sh.
"""

import argparse
from pathlib import Path
from typing import Any

from prunekit.arguments import finite_float
from prunekit.checkpoint import statistics
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import PruneKitError, run_script
from prunekit.knockout.ranking import knockout_importance, read_ranking
from prunekit.surgery.script import open_input, parse_surgery, surgery_parser
from prunekit.surgery.zeros import (
    NO_GAIN,
    SCOPES,
    SCORES,
    Sparsification,
    Wish,
    apply_sparsify,
    check_shared_out,
    magnitude,
    parse_pattern,
    plan_sparsify,
    select,
    sparsity_record,
    with_importance,
)


def wish_of(arguments: argparse.Namespace) -> Wish:
    """What the user asks for, with defaults that depend on each other; PruneKitError where wishes contradict."""
    scope = arguments.scope
    if scope is None:
        scope = "row" if arguments.score == "wanda" else "layer" if arguments.layer_importance else "global"
    elif arguments.sparsity is None:
        raise PruneKitError("--scope says how a --sparsity is shared out; leave it out")
    if (arguments.layer_importance == "knockout") != bool(arguments.ranking):
        raise PruneKitError("--layer-importance knockout and --ranking need each other")
    needed = (
        arguments.refit or arguments.score != "magnitude" or arguments.layer_importance in ("gradient", "activation")
    )
    if needed != bool(arguments.calib):
        raise PruneKitError(
            "this score, importance or refit needs data: --calib data/train.jsonl"
            if needed
            else "--calib: magnitudes and rankings need no data; leave it out"
        )
    pattern = parse_pattern(arguments.pattern) if arguments.pattern else None
    return Wish(
        arguments.threshold, arguments.sparsity, pattern, scope, arguments.score, arguments.modules, arguments.power,
        arguments.max_sparsity,
    )  # fmt: skip


def prepare(plan: Sparsification, arguments: argparse.Namespace) -> tuple[Sparsification, dict[str, Any] | None]:
    """The selected plan, and what its history shall say of calibration."""
    scores, settings, metrics, kind = magnitude, {}, None, arguments.layer_importance
    if kind == "knockout":
        ranking = read_ranking(Path(arguments.ranking), plan.source)
        plan = with_importance(plan, knockout_importance(plan.source, ranking))
    if arguments.calib:
        model, data = model_and_calibration(plan.source, arguments)
        from prunekit.surgery import (
            zeros_scores as weight_scores,  # torch: seconds, after all that can be checked without it
        )

        settings |= {
            "calib": str(arguments.calib),
            "calibration_data": [data.record],
            "calibration_tokens": data.tokens,
        }
        inputs = (plan.source, model, data, plan.weights)
        if kind in weight_scores.IMPORTANCE:
            plan = with_importance(plan, weight_scores.IMPORTANCE[kind](*inputs))
        if arguments.score in weight_scores.SCORES_OF:
            scores = weight_scores.SCORES_OF[arguments.score](*inputs)
    if kind:
        settings |= {"layer_importance": kind, "ranking": arguments.ranking}
    plan = select(plan, scores)
    if arguments.refit:
        from prunekit.surgery.zeros_fit import refit

        plan, metrics = refit(plan, model, data)
        settings["refit"] = True
        if metrics:
            print("refitted: held-out loss {held_out_loss_dense:.4f} -> {held_out_loss:.4f}".format(**metrics))
    return plan, {"settings": settings, "metrics": metrics or None} if settings else None


def print_result(plan: Sparsification) -> None:
    found = sparsity_record(plan.zeros, plan.sizes, statistics(plan.source)["parameters"])
    shares = found["tensors"].values()
    print(
        f"{found['zeros']:,} of {found['weights']:,} weights zero, {found['sparsity']:.2%} (before: "
        f"{plan.zeros_before:,}); {min(shares):.1%} to {max(shares):.1%} of a tensor, "
        f"{found['of_all_parameters']:.1%} of all parameters"
    )
    print(f"note: {NO_GAIN}")


def main() -> None:
    parser = surgery_parser(__doc__)
    parser.add_argument("--sparsity", type=finite_float, metavar="S", help="share of the weights to be zero, like 0.5")
    parser.add_argument("--threshold", type=finite_float, metavar="T", help="zero what scores below T")
    parser.add_argument("--pattern", metavar="N:M", help="of M neighbouring inputs keep N, like 2:4")
    parser.add_argument("--scope", choices=SCOPES, help="(default: global; row for wanda)")
    parser.add_argument("--score", choices=SCORES, default="magnitude", help="(default: magnitude)")
    parser.add_argument("--modules", metavar="REGEX", help="found in the names of the projections meant")
    parser.add_argument("--layer-importance", choices=("gradient", "activation", "knockout"))
    parser.add_argument("--ranking", metavar="JSON", help="ranking.json of knockout_check.sh, for knockout")
    parser.add_argument(
        "--power", type=finite_float, default=1.0, help="of importance: lower ones even out (default: 1)"
    )
    parser.add_argument(
        "--max-sparsity", type=finite_float, default=0.95, metavar="S", help="of a layer (default: 0.95)"
    )
    parser.add_argument(
        "--refit", action="store_true", help="the weights that stay, so that each layer writes what it did"
    )
    add_calibration_arguments(parser.add_argument_group("calibration"))
    arguments = parse_surgery(parser)

    checkpoint = open_input(arguments)
    plan = plan_sparsify(checkpoint, wish_of(arguments))
    if arguments.layer_importance:
        check_shared_out(plan.wish)
    plan, calibration = prepare(plan, arguments)
    print_result(plan)
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    apply_sparsify(plan, arguments.out, arguments.overwrite, arguments.max_shard_bytes, calibration)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_script(main)
