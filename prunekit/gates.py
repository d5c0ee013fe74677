"""Gates: bounds that a command's measured numbers must keep, else it ends with exit code 3 and says what fell short."""

import argparse
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from prunekit.arguments import finite_float, share
from prunekit.errors import PruneKitError

SHORT = 3  # exit code


class Bound(NamedTuple):
    """A metric's name (dots lead into its parts, as in entities.PER.f1), >= or <=, and a number."""

    name: str
    sign: str
    number: float

    def kept(self, value: float) -> bool:
        return value >= self.number if self.sign == ">=" else value <= self.number


def bound(text: str) -> Bound:
    """The type of an argument like exact_match>=0.97."""
    match = re.fullmatch(r"\s*([^<>=]*[^<>=\s])\s*([<>]=)\s*([^<>=]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no bound: say it like 'exact_match>=0.97'")
    return Bound(match[1], match[2], finite_float(match[3]))


def add_gates(parser: argparse._ActionsContainer, min_f1: bool = False, of: str = "of the last model") -> None:
    """--require, with --min-f1 as a short way to say it: a list of bounds in `require`."""
    what = f"{of}: exit code 3 and a line if it isn't so; any number of --json"
    parser.add_argument(
        "--require", type=bound, action="append", default=[], metavar="METRIC>=X", help=f"{what}; <=, too; repeatable"
    )
    if min_f1:
        parser.add_argument(
            "--min-f1", type=lambda text: Bound("f1", ">=", share(text)), action="append", dest="require",
            metavar="X", help="the same as --require 'f1>=X'",
        )  # fmt: skip


def check_bounds(bounds: Iterable[Bound], names: Collection[str]) -> None:
    """PruneKitError for a bound on what is none of the metrics that will be measured: before they are."""
    for each in bounds:
        if each.name.partition(".")[0] not in names:
            raise PruneKitError(f"--require {each.name}: no such metric here; there are {', '.join(sorted(names))}")


def gate(bounds: Iterable[Bound], results: dict[str, dict[str, Any]]) -> int:
    """0 if each of the results, by a name for it, keeps all bounds; else 3, and a line on stderr says what doesn't.

    PruneKitError if a result has no number of a bound's name.
    """
    short = []
    for where, scores in results.items():
        numbers = dict(_flat(scores))
        for name, sign, number in bounds:
            if name not in numbers:
                raise PruneKitError(
                    f"--require {name}: {where} has no such number; it has {', '.join(sorted(numbers))}"
                )
            if not Bound(name, sign, number).kept(numbers[name]):
                short.append(f"{where}: {name} is {numbers[name]:.6g}, not {sign} {number:g}")
    if short:
        print(f"gate: {'; '.join(short)}", file=sys.stderr)
    return SHORT if short else 0


def _flat(scores: dict[str, Any], before: str = "") -> Iterable[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{name}", value
