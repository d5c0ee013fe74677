"""Drop text layers and vision blocks from a checkpoint.

    python manual_select.py --model checkpoints/base --out checkpoints/pruned --text 4 10 --vision 9
    python manual_select.py --model checkpoints/base --text 4-7,10 --dry-run
    python manual_select.py --model checkpoints/base --out checkpoints/pruned --from-ranking runs/knockout/ranking.json

Numbers count from 0 and are those of the input. DeepStack taps (Qwen3-VL) on removed blocks move to the nearest block
before; --taps or --drop-taps say otherwise. --from-ranking takes what the knockouts found cheap.
"""

import argparse
from pathlib import Path

from prunekit.checkpoint import check_out, open_checkpoint, read_json, statistics
from prunekit.errors import PruneKitError, run_script
from prunekit.inspect import comparison
from prunekit.layers import apply_removal, choose_from_ranking, parse_numbers, plan_removal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder to read")
    parser.add_argument("--out", help="checkpoint folder to write; not needed with --dry-run")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="N", help="text layers to drop, like 4 10 or 4-7,10"
    )
    parser.add_argument("--vision", nargs="+", default=[], metavar="N", help="vision blocks to drop")
    parser.add_argument(
        "--taps", nargs="+", metavar="N", help="vision blocks to tap, one for each merger kept"
    )
    parser.add_argument(
        "--drop-taps", nargs="+", default=[], metavar="I", help="mergers to drop with their taps"
    )
    parser.add_argument(
        "--from-ranking", metavar="JSON", help="ranking.json of knockout_check.sh: drop the cheapest"
    )
    parser.add_argument(
        "--keep-above", type=float, default=0.95, help="of the baseline's token_acc (default: 0.95)"
    )
    parser.add_argument("--max-layers", type=int, default=10, help="drop at most so many (default: 10)")
    parser.add_argument("--max-fraction", type=float, default=0.25, help="of all parameters (default: 0.25)")
    parser.add_argument(
        "--max-shard-gb", type=float, help="largest weight file (default: sharded like the input)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        parser.error("--out is needed (or --dry-run)")

    checkpoint = open_checkpoint(arguments.model)
    if arguments.out:
        check_out(arguments.out, checkpoint.path, overwrite=arguments.overwrite)
    text, vision = parse_numbers(arguments.text), parse_numbers(arguments.vision)
    if arguments.from_ranking:
        if text or vision:
            raise PruneKitError("--from-ranking chooses the layers; leave out --text and --vision")
        ranking = read_json(Path(arguments.from_ranking))
        limits = (arguments.keep_above, arguments.max_layers, arguments.max_fraction)
        for entry in choose_from_ranking(checkpoint, ranking, *limits):
            print(
                f"{entry['stack']:>8} {entry['layer']:>3}  keeps {entry['relative']:.1%} of the baseline when removed alone"
            )
            (text if entry["stack"] == "text" else vision).append(entry["layer"])
    plan = plan_removal(
        checkpoint,
        text,
        vision,
        None if arguments.taps is None else parse_numbers(arguments.taps),
        parse_numbers(arguments.drop_taps),
    )
    for stack, numbers in plan.removed.items():
        print(f"{stack}: removes {', '.join(map(str, numbers))}")
    for note in plan.notes:
        print(note)
    print(comparison(statistics(checkpoint), statistics(plan.result)))
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    limit = arguments.max_shard_gb
    apply_removal(plan, arguments.out, arguments.overwrite, None if limit is None else int(limit * 1e9))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_script(main)
