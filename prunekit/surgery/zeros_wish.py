"""What a user wants to become zero: how many weights, by which scores, and how they are shared out."""

import argparse
import math
import re
from dataclasses import dataclass

from prunekit.errors import PruneKitError

SCORES = ("magnitude", "wanda", "gradient")
IMPORTANCES = ("gradient", "output-gradient", "activation", "magnitude", "knockout")  # of layers
SCOPES = ("global", "layer", "row")


@dataclass(frozen=True)
class Wish:
    """What a user asks for; exactly one of threshold, sparsity and pattern (zeros, of) is there."""

    threshold: float | None = None
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    scope: str = "global"
    score: str = "magnitude"
    modules: str | None = None
    power: float = 1.0
    maximum: float = 0.95  # of a layer, where budgets follow importance
    importance: str | None = None  # of layers: what it comes from
    ranking: str | None = None  # file that it is read from, if it is that of knockouts
    refit: bool = False


def parse_pattern(text: str) -> tuple[int, int]:
    """(zeros, group) of a pattern N:M, of which N in M neighbours are kept: (2, 4) for 2:4."""
    numbers = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    kept, group = map(int, numbers.groups()) if numbers else (0, 0)
    if not 0 < kept < group:
        raise PruneKitError(f"--pattern {text[:40]}: write it N:M, of M neighbours N are kept, like 2:4")
    return group - kept, group


def check_shared_out(wish: Wish) -> None:
    """PruneKitError if there is no budget that layers' importance could share out."""
    if wish.sparsity is None or wish.scope == "global":
        raise PruneKitError("--layer-importance shares out a --sparsity by layers: --scope layer or row")


def check_wish(wish: Wish) -> None:
    """PruneKitError for numbers out of range, or unless it is one of a sparsity, a threshold and a pattern."""
    given = [name for name in ("threshold", "sparsity", "pattern") if getattr(wish, name) is not None]
    if len(given) != 1:
        raise PruneKitError("give one of --sparsity, --threshold and --pattern")
    if wish.sparsity is not None and not 0 < wish.sparsity < 1:
        raise PruneKitError(f"--sparsity {wish.sparsity}: a share of the weights, between 0 and 1")
    if wish.threshold is not None and not 0 < wish.threshold < math.inf:
        raise PruneKitError(f"--threshold {wish.threshold}: a positive number; scores below it become zero")
    if not 0 < wish.maximum <= 1:
        raise PruneKitError(f"--max-sparsity {wish.maximum}: a share of a layer's weights, above 0, at most 1")
    if not 0 < wish.power < math.inf:
        raise PruneKitError(f"--power {wish.power}: a positive number")


def wish_of(arguments: argparse.Namespace) -> Wish:
    """What the user asks for, with defaults that depend on each other; PruneKitError where wishes contradict."""
    scope = arguments.scope
    if scope is None:
        scope = "row" if arguments.score == "wanda" else "layer" if arguments.layer_importance else "global"
    elif arguments.sparsity is None:
        raise PruneKitError("--scope says how a --sparsity is shared out; leave it out")
    if (arguments.layer_importance == "knockout") != bool(arguments.ranking):
        raise PruneKitError("--layer-importance knockout and --ranking need each other")
    needed = arguments.refit or arguments.score != "magnitude" or arguments.layer_importance not in (None, "knockout")
    if needed != bool(arguments.calib):
        raise PruneKitError(
            "this score, importance or refit needs data: --calib data/train.jsonl"
            if needed
            else "--calib: magnitudes and rankings need no data; leave it out"
        )
    shared_out = {"power": arguments.power, "maximum": arguments.max_sparsity}
    shared_out = {name: value for name, value in shared_out.items() if value is not None}
    if shared_out and not arguments.layer_importance:
        raise PruneKitError("--power, --max-sparsity: say how --layer-importance shares out; give it, too")
    pattern = parse_pattern(arguments.pattern) if arguments.pattern else None
    return Wish(
        arguments.threshold, arguments.sparsity, pattern, scope, arguments.score, arguments.modules,
        importance=arguments.layer_importance, ranking=arguments.ranking, refit=arguments.refit, **shared_out,
    )  # fmt: skip
