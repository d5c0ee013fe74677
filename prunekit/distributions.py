"""Draw how a model's weights are distributed, layer by layer, before and after some became zero.

    python -m prunekit.distributions checkpoints/base --sparsity 0.5 --out weights.png
    python -m prunekit.distributions checkpoints/base checkpoints/sparse --out weights.png
    python -m prunekit.distributions checkpoints/sparse --out weights.png

One folder is drawn as it is, or with --sparsity, --pattern or --threshold beside what sparsify.py would make of it by
magnitude; two of the same layers as before and after, whatever lies between them. A threshold is drawn where size alone
chose what became zero: with a scope of layers each tensor has its own, of which the lowest and the highest are drawn;
Wanda and 2:4 have none. Weights are those of all layers' projections, or those that --modules names; they are read a
tensor at a time.
"""

from prunekit.arguments import Parser, finite_float, new_file
from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError, run_script
from prunekit.report.distributions import draw_distributions, weight_distributions
from prunekit.surgery.zeros import cut_zeros, plan_zeros
from prunekit.surgery.zeros_wish import SCOPES, Wish, parse_pattern


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("after", nargs="?", help="checkpoint folder with the same layers")
    parser.add_argument("--out", type=new_file, required=True, metavar="PNG")
    parser.add_argument("--sparsity", type=finite_float, metavar="S", help="as sparsify.py's")
    parser.add_argument("--pattern", metavar="N:M", help="as sparsify.py's")
    parser.add_argument("--threshold", type=finite_float, metavar="T", help="as sparsify.py's")
    parser.add_argument("--scope", choices=SCOPES, help="of a --sparsity (default: global)")
    parser.add_argument("--modules", metavar="REGEX", help="found in the names of the projections meant")
    args = parser.parse_args()

    model = open_checkpoint(args.model)
    wanted = [name for name in ("sparsity", "pattern", "threshold") if getattr(args, name) is not None]
    if args.after and wanted:
        raise PruneKitError(f"--{wanted[0]}: {args.after} is what is drawn beside {args.model}; leave one of them out")
    if args.scope and args.sparsity is None:
        raise PruneKitError("--scope says how a --sparsity is shared out; leave it out")
    if args.after:
        found = weight_distributions(model, open_checkpoint(args.after), args.modules)
    elif wanted:
        pattern = parse_pattern(args.pattern) if args.pattern else None
        scope = args.scope or "global"
        plan = plan_zeros(model, Wish(args.threshold, args.sparsity, pattern, scope, modules=args.modules))
        cut = cut_zeros(plan)
        found = weight_distributions(model, cut.result, args.modules, cut.zeroed)
    else:
        found = weight_distributions(model, modules=args.modules)
    draw_distributions(found, args.out)
    for column, parts in found.columns.items():
        levels = [level for part in parts.values() for level in part.thresholds]
        zeros = sum(part.zeros_after if found.compared else part.zeros for part in parts.values())
        share = zeros / sum(part.weights_after if found.compared else part.weights for part in parts.values())
        between = f", threshold {min(levels):.4g} to {max(levels):.4g}" if levels else ""
        print(f"{column}: {share:.1%} zero{between}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
