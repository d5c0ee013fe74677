"""For a target, the cheapest set of cuts that was measured: the choice that loop.sh makes, for who cuts by hand.

    python -m prunekit.plan --model checkpoints/base --target-params 0.8 --ranking runs/sets/ranking.json
    python -m prunekit.evaluate --model checkpoints/base trials/narrow trials/kv4 --dataset data/val.jsonl \\
        --no-generate --json runs/trials.json
    python -m prunekit.plan --model checkpoints/base --target-params 0.8 --target-kv 0.5 \\
        --ranking runs/sets/ranking.json --trials runs/trials.json
    python -m prunekit.speed checkpoints/base --parts --batches 1 --json runs/speed.json
    python -m prunekit.plan --model checkpoints/base --target-speed 1.5 --speed runs/speed.json \\
        --trials runs/trials.json

Layers come from a greedy path (knockout_check.sh with GREEDY=8 HEAL=1, or a scan.json), all else from an evaluation of
MODEL and of folders that expert_cut.py, width_cut.py, kv_cut.py and vocab_cut.py made from it: both on the same rows.
What a cut costs is what it adds to the loss there. A speed is estimated from where the base's seconds go; with --base,
measure it beside MODEL (prunekit.speed BASE MODEL --parts). Prints what there is to choose from, what is cheapest for
the target, and the lines that cut it.
"""

from pathlib import Path

from prunekit.arguments import Parser, new_file, positive_float, share
from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.errors import PruneKitError, quoted, run_script
from prunekit.loop.candidates import cut_lines, from_path, from_trials, sizes
from prunekit.loop.choice import absolute_targets, amount, choose, missing, table, total
from prunekit.loop.timing import KEYS, Timing, part_sizes, read_parts, read_share


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint that is to be cut")
    parser.add_argument("--base", help="the model whose sizes targets are shares of (default: MODEL)")
    parser.add_argument("--target-params", type=share, metavar="SHARE", help="of the base's parameters, to be left")
    parser.add_argument("--target-bytes", type=positive_float, metavar="N", help="of weights")
    parser.add_argument("--target-kv", type=share, metavar="SHARE", help="of its KV cache's bytes a token")
    parser.add_argument("--target-speed", type=positive_float, metavar="N", help="times as fast as the base")
    parser.add_argument("--speed", type=Path, metavar="JSON", help="of prunekit.speed --parts")
    parser.add_argument("--speed-of", choices=tuple(KEYS), default="decoding", help="(default: decoding)")
    parser.add_argument("--most", type=share, default=0.25, help="of MODEL's parameters that may go (default: 0.25)")
    parser.add_argument("--ranking", nargs="*", default=[], type=Path, metavar="JSON", help="with a greedy path")
    parser.add_argument("--trials", nargs="*", default=[], type=Path, metavar="JSON", help="of prunekit.evaluate")
    parser.add_argument("--json", type=new_file, help="also write the choice here")
    args = parser.parse_args()
    if (args.target_speed is None) != (args.speed is None):
        parser.error("--target-speed and --speed need each other")
    checkpoint = open_checkpoint(args.model)
    first = open_checkpoint(args.base) if args.base else checkpoint
    timing = None
    if args.speed:
        share_now = read_share(args.speed, args.speed_of) if args.base else 1.0
        timing = Timing(read_parts(args.speed, args.speed_of), part_sizes(first)).measured(checkpoint, share_now)
    now, base = sizes(checkpoint, timing), sizes(first)
    targets = absolute_targets(base, args.target_params, args.target_bytes, args.target_kv, args.target_speed)
    wanted = missing(targets, now)
    if not wanted:
        raise PruneKitError(f"{args.model}: is as small as that already")
    candidates = [each for file in args.ranking for each in from_path(checkpoint, file, timing)]
    candidates += [each for file in args.trials for each in from_trials(checkpoint, file, timing)]
    if not candidates:
        raise PruneKitError("nothing to choose from: give --ranking or --trials")
    chosen = choose(candidates, wanted, args.most * now["params"])
    print(table(candidates, chosen, wanted))
    if not chosen:
        raise PruneKitError(f"nothing fits: each of these takes more than {args.most:.0%} of the parameters (--most)")
    saved, cost = total(chosen), sum(each.cost for each in chosen)
    print(f"chosen (*): {saved['params'] / now['params']:.1%} of the parameters for {cost:+.4f} of loss")
    lines = cut_lines(chosen, checkpoint)
    folders = [args.model, *(f"checkpoints/cut-{number}" for number in range(1, len(lines) + 1))]
    for line, source, out in zip(lines, folders, folders[1:]):
        fit = [] if line[0] == "manual_select.py" and "--heal" not in line else ["--calib", "data/train.jsonl"]
        words = ["python", line[0], "--model", source, "--out", out, *line[1:], *fit]
        print(quoted([str(word) for word in words]))
    for unit, wish in wanted.items():
        if saved[unit] < wish:
            print(
                f"of the target's {amount(unit, wish)} that saves {amount(unit, saved[unit])}: recover, and look again"
            )
    if args.json:
        write_json(args.json, {"cost": cost, "saved": saved, "lines": lines, "chosen": [each.name for each in chosen]})


if __name__ == "__main__":
    run_script(main)
