"""Drop text layers and vision blocks from a checkpoint.

    python manual_select.py --model checkpoints/base --out checkpoints/pruned --text 4 10 --vision 9
    python manual_select.py --model checkpoints/base --text 4-7,10 --dry-run
    python manual_select.py --model checkpoints/base --out checkpoints/pruned --from-ranking runs/knockout/ranking.json
    python manual_select.py --model checkpoints/base --out checkpoints/pruned --text 4-7 --heal --calib data/train.jsonl

Numbers count from 0 and are those of the input. DeepStack taps (Qwen3-VL) on removed blocks move to the nearest block
before; --taps or --drop-taps say otherwise. --from-ranking follows the knockouts' greedy path, or takes what they found
cheap one by one if there is none or with --independent; a set that was tried together keeps more. --heal refits the
layers around each seam on calibration data, so that recovery starts from a better model; it needs the model in memory.
"""

import argparse
import sys
from pathlib import Path

from prunekit.arguments import positive_int, share
from prunekit.checkpoint import Checkpoint
from prunekit.data.batches import add_calibration_arguments, model_and_calibration
from prunekit.errors import PruneKitError, run_script
from prunekit.knockout.ranking import choose_from_ranking, read_ranking
from prunekit.surgery.layers import cautions, check_healable, cut_layers, parse_numbers, plan_layers, say_seam
from prunekit.surgery.script import open_input, parse_surgery, save, show_plan, surgery_parser, warn_of_zeros

LIMITS = ("keep_above", "max_layers", "max_fraction", "independent")  # of what is taken of a ranking


def choose(checkpoint: Checkpoint, arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    """(text layers, vision blocks) that the user names, or that the ranking finds cheap: then it says how cheap."""
    text, vision = parse_numbers(arguments.text), parse_numbers(arguments.vision)
    limits = {name: value for name in LIMITS if (value := getattr(arguments, name)) not in (None, False)}
    if not arguments.from_ranking:
        if limits:
            raise PruneKitError(f"--{next(iter(limits)).replace('_', '-')}: is for --from-ranking; leave it out")
        return text, vision
    if text or vision:
        raise PruneKitError("--from-ranking chooses the layers; leave out --text and --vision")
    ranking = read_ranking(Path(arguments.from_ranking), checkpoint)
    path = None if arguments.independent else ranking.get("greedy")
    how = "with all above removed, too" if path else "when removed alone"
    for gone, relative in choose_from_ranking(checkpoint, ranking, **limits):
        print(f"{gone.stack:>8} {gone.layer:>3}  keeps {relative:.1%} of the baseline {how}")
        (text if gone.stack == "text" else vision).append(gone.layer)
    if path and path.get("healed") and not arguments.heal:
        print("the path was healed after each removal: with --heal and --calib, too, it keeps that much")
    return text, vision


def main() -> None:
    parser = surgery_parser(__doc__)
    parser.add_argument("--text", nargs="+", default=[], metavar="N", help="text layers to drop, like 4 10 or 4-7,10")
    parser.add_argument("--vision", nargs="+", default=[], metavar="N", help="vision blocks to drop")
    parser.add_argument("--taps", nargs="+", metavar="N", help="vision blocks to tap, one for each merger kept")
    parser.add_argument("--drop-taps", nargs="+", default=[], metavar="I", help="mergers to drop with their taps")
    parser.add_argument("--from-ranking", metavar="JSON", help="ranking.json of knockout_check.sh: drop the cheapest")
    parser.add_argument(
        "--independent", action="store_true", help="of a ranking, the cheapest alone, not its greedy path"
    )
    parser.add_argument("--keep-above", type=share, help="of the baseline's token_acc (default: 0.95)")
    parser.add_argument("--max-layers", type=positive_int, help="drop at most so many (default: 10)")
    parser.add_argument("--max-fraction", type=share, help="of all parameters (default: 0.25)")
    healing = parser.add_argument_group("healing")
    healing.add_argument("--heal", action="store_true", help="refit the layers around each seam (needs --calib)")
    add_calibration_arguments(healing)
    arguments = parse_surgery(parser)
    if arguments.heal != bool(arguments.calib):
        parser.error("--heal and --calib need each other")

    checkpoint = open_input(arguments)
    text, vision = choose(checkpoint, arguments)
    taps = None if arguments.taps is None else parse_numbers(arguments.taps)
    plan = plan_layers(checkpoint, text, vision, taps, parse_numbers(arguments.drop_taps))
    removed = [f"{stack}: removes {', '.join(map(str, numbers))}" for stack, numbers in plan.removed.items()]
    show_plan(checkpoint, plan.result, arguments, [*removed, *plan.notes])
    cut = cut_layers(plan)
    if arguments.heal:
        check_healable(plan)
        warn_of_zeros(checkpoint)
        model, data = model_and_calibration(checkpoint, arguments)
        from prunekit.surgery.layers_fit import fit_layers  # torch: seconds, after all that can be checked without it

        cut = fit_layers(plan, model, data)
        for seam in cut.seams:
            print(say_seam(seam))
    for caution in cautions(plan):
        print(f"warning: {caution}", file=sys.stderr)
    save(cut, arguments)


if __name__ == "__main__":
    run_script(main)
