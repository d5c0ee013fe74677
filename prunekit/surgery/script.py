"""What all surgery scripts take from a user: a checkpoint to read, OUT, and how OUT is written."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from prunekit.arguments import Parser, check_beside, positive_float
from prunekit.checkpoint import Checkpoint, Outline, check_out, check_room, history, open_checkpoint, statistics
from prunekit.checkpoint.card import ROWS
from prunekit.data.batches import BESIDE_CALIB

from .cut import Cut, write_cut

NOTHING_WRITTEN = "dry run: nothing written"


def surgery_parser(usage: str) -> Parser:
    """A parser with the arguments that all surgery scripts have. usage: the script's docstring."""
    parser = Parser(description=usage)
    parser.add_argument("--model", required=True, help="checkpoint folder to read")
    parser.add_argument("--out", help="checkpoint folder to write; not needed with --dry-run")
    parser.add_argument(
        "--max-shard-gb", type=positive_float, help="largest weight file (default: sharded like the input)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    return parser


def parse_surgery(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's arguments, with `max_shard_bytes` (None: as the input). Ends the script without OUT."""
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        parser.error("--out is needed (or --dry-run)")
    if hasattr(arguments, "calib"):
        check_beside(parser, arguments, "calib", BESIDE_CALIB)
    limit = arguments.max_shard_gb
    arguments.max_shard_bytes = None if limit is None else int(min(limit, 1e9) * 1e9)
    return arguments


def open_input(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint to read. PruneKitError if it is none or has a damaged history, or if OUT can't be used."""
    checkpoint = open_checkpoint(arguments.model)
    history(checkpoint.path)  # it is needed when all else is done
    if arguments.out:
        check_out(arguments.out, checkpoint.path, overwrite=arguments.overwrite)
    return checkpoint


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A table of two `statistics`, with the change in per cent where there is one."""
    lines = [f"{'':16}{'before':>16}{'after':>16}"]
    for label, key in ROWS.items():
        old, new = before[key], after[key]
        if old is not None:
            new = new or 0  # no mixture may be left that has experts
            change = f"{(new - old) / old:+9.1%}" if old and new != old else ""
            lines.append(f"{label:16}{old:>16,}{new:>16,}{change}")
    return "\n".join(lines)


def need_room(after: Outline, arguments: argparse.Namespace) -> None:
    """PruneKitError if OUT's disk has no room for it: to say so behind a fit of hours would be late."""
    if not arguments.dry_run:
        check_room(arguments.out, after.nbytes)


def show_plan(before: Checkpoint, after: Outline, arguments: argparse.Namespace, notes: Iterable[str] = ()) -> None:
    """Print notes and sizes. Raises as `need_room`."""
    print(*notes, _comparison(statistics(before), statistics(after)), sep="\n")
    need_room(after, arguments)


def warn_of_zeros(checkpoint: Checkpoint) -> None:
    """Say of a cut that computes weights anew, as merges and refits do, that sparsify.py's zeros don't outlive it."""
    if any(entry.get("sparsity") for entry in history(checkpoint.path)):
        print(
            f"warning: weights are computed anew, which fills zeros of {checkpoint.path}: make zeros last, or again "
            "(docs/zeros.md)",
            file=sys.stderr,
        )


def save(cut: Cut, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Write OUT and return its history entry; None for a dry run. Says which."""
    if arguments.dry_run:
        print(NOTHING_WRITTEN)
        return None
    entry = write_cut(cut, arguments.out, arguments.overwrite, arguments.max_shard_bytes)
    print(f"wrote {arguments.out}")
    return entry
