"""Set single weights of a checkpoint to zero: those with the lowest scores.

    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5 --score wanda \\
        --calib data/train.jsonl
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --sparsity 0.5 --calib data/train.jsonl \\
        --layer-importance activation --power 0.5
    python sparsify.py --model checkpoints/base --out checkpoints/sparse --pattern 2:4 --modules 'mlp|o_proj' \\
        --score wanda --calib data/train.jsonl --refit

The projections of all layers are meant, experts included, or those that --modules names. --sparsity counts over them:
with --scope global (default) one threshold goes through all, with layer each tensor gets the same share, with row each
output of each tensor (default for wanda). --layer-importance gives important layers less of it and the others more, the
sum as asked. --threshold zeroes every weight whose score is below it. Magnitudes are read tensor by tensor; other
scores and importances need the model in memory and --calib, and so does --refit: the weights that stay then make up for
those that went, layer by layer. Train on with the zeros kept: sparse_run.sh.
"""

from pathlib import Path

from prunekit.arguments import finite_float
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import run_script
from prunekit.knockout.ranking import knockout_importance, read_ranking
from prunekit.surgery.script import need_room, open_input, parse_surgery, save, surgery_parser
from prunekit.surgery.zeros import cut_zeros, plan_zeros, say_zeros, with_importance
from prunekit.surgery.zeros_wish import IMPORTANCES, SCOPES, SCORES, wish_of


def main() -> None:
    parser = surgery_parser(__doc__)
    parser.add_argument("--sparsity", type=finite_float, metavar="S", help="share of the weights to be zero, like 0.5")
    parser.add_argument("--threshold", type=finite_float, metavar="T", help="zero what scores below T")
    parser.add_argument("--pattern", metavar="N:M", help="of M neighbouring inputs keep N, like 2:4")
    parser.add_argument("--scope", choices=SCOPES, help="(default: global; row for wanda)")
    parser.add_argument("--score", choices=SCORES, default="magnitude", help="(default: magnitude)")
    parser.add_argument("--modules", metavar="REGEX", help="found in the names of the projections meant")
    parser.add_argument("--layer-importance", choices=IMPORTANCES)
    parser.add_argument("--ranking", metavar="JSON", help="ranking.json of knockout_check.sh, for knockout")
    parser.add_argument("--power", type=finite_float, help="of importance: lower ones even out (default: 1)")
    parser.add_argument("--max-sparsity", type=finite_float, metavar="S", help="of a layer (default: 0.95)")
    parser.add_argument(
        "--refit", action="store_true", help="the weights that stay, so that each layer writes what it did"
    )
    add_calibration_arguments(parser.add_argument_group("calibration"))
    arguments = parse_surgery(parser)

    checkpoint = open_input(arguments)
    plan = plan_zeros(checkpoint, wish_of(arguments))
    if arguments.ranking:
        ranking = read_ranking(Path(arguments.ranking), checkpoint)
        plan = with_importance(plan, knockout_importance(checkpoint, ranking))
    need_room(checkpoint, arguments)
    if arguments.calib:
        model, data = model_and_calibration(checkpoint, arguments)
        from prunekit.surgery.zeros_fit import fit_zeros  # torch: seconds, after all that can be checked without it

        cut = fit_zeros(plan, model, data)
        if cut.metrics:
            print("refitted: held-out loss {held_out_loss_dense:.4f} -> {held_out_loss:.4f}".format(**cut.metrics))
    else:
        cut = cut_zeros(plan)
    print(say_zeros(cut))
    save(cut, arguments)


if __name__ == "__main__":
    run_script(main)
