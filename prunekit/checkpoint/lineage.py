"""The way from a base to a model, by its history: which layers of the base it has, where taps went, what was healed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError
from prunekit.families import configs
from prunekit.rules import LAYER, NUMBERS, TEXT, Items, Keys, Rule, check

from .agreement import layer_numbers
from .card import HISTORY
from .folder import fingerprint, open_checkpoint
from .format import Checkpoint
from .records import history

_MOVE = Rule(
    "a pair of blocks, the second may be null",
    lambda pair: (
        isinstance(pair, list) and len(pair) == 2 and LAYER.holds(pair[0]) and (pair[1] is None or LAYER.holds(pair[1]))
    ),
)
_SEAM = Keys({"stack": TEXT, "layer": LAYER, "refitted": NUMBERS}, ("stack", "refitted"))
_CUT = Keys({"removed": Keys({"taps": Items(_MOVE)}), "seams": Items(_SEAM), "input_fingerprint": TEXT})


@dataclass(frozen=True)
class StackWay:
    """What became of a stack's layers, numbered as in the base. Stages count from 1."""

    count: int
    kept: list[int]
    gone: dict[int, int]  # by which stage
    healed: dict[int, int]  # whose projections were refitted around a seam, by which stage last


@dataclass(frozen=True)
class Lineage:
    stages: list[dict[str, Any]]  # entries of the history, from the base on
    stacks: dict[str, StackWay]
    taps: list[tuple[int, int | None]]  # (block that a merger tapped in the base, block that it taps; None: gone)


def lineage(base: Checkpoint, model: Checkpoint) -> Lineage:
    """PruneKitError if the model wasn't made from this base, or if its history doesn't tell of the layers that it has.

    The base may be any model on the way: entries before it don't count.
    """
    stages = _stages_from(base, model)
    ways = {stack: _follow(base, stack, stages, model.path) for stack in base.family.stacks}
    for stack, way in ways.items():
        if len(way.kept) != (has := len(layer_numbers(model, stack))):
            raise PruneKitError(
                f"{model.path}: has {has} {stack} layers, by its {HISTORY} {len(way.kept)} of {base.path} are left; "
                "give the folder as a stage wrote it, and its own base"
            )
    return Lineage(stages, ways, _follow_taps(base, stages))


def _stages_from(base: Checkpoint, model: Checkpoint) -> list[dict[str, Any]]:
    entries, print_of_base = history(model.path), fingerprint(base)
    for number, entry in enumerate(entries):
        check(entry, _CUT, f"{model.path / HISTORY} entry {number + 1}")
    starts = [number for number, entry in enumerate(entries) if entry.get("input_fingerprint") == print_of_base]
    if starts:
        return entries[starts[0] :]
    if fingerprint(model) == print_of_base:
        return []
    if not entries:
        raise PruneKitError(f"{model.path}: has no {HISTORY} that says what it was made from; give a stage's folder")
    raise PruneKitError(
        f"{model.path}: was made from {entries[0].get('input')} as it was then, not from {base.path}: give that by "
        "--base, or what a later stage of it began with"
    )


def _removed(stage: dict[str, Any], stack: str) -> list[int]:
    return (stage.get("removed") or {}).get(stack) or []


def _follow(base: Checkpoint, stack: str, stages: list[dict[str, Any]], path: Path) -> StackWay:
    count = len(layer_numbers(base, stack))
    kept = list(range(count))
    gone: dict[int, int] = {}
    healed: dict[int, int] = {}
    for number, stage in enumerate(stages, 1):
        refitted = [layer for seam in stage.get("seams") or () if seam["stack"] == stack for layer in seam["refitted"]]
        removed = _removed(stage, stack)
        if unknown := [layer for layer in (*removed, *refitted) if layer >= len(kept)]:
            raise PruneKitError(
                f"{path / HISTORY}: a stage removes or refits {stack} layer {unknown[0]} of {len(kept)}; "
                "mend it or make it anew"
            )
        healed |= {kept[layer]: number for layer in refitted}
        gone |= {kept[layer]: number for layer in removed}
        kept = [layer for place, layer in enumerate(kept) if place not in removed]
    return StackWay(count, kept, gone, {layer: stage for layer, stage in healed.items() if layer in kept})


def _follow_taps(base: Checkpoint, stages: list[dict[str, Any]]) -> list[tuple[int, int | None]]:
    family = base.family
    if not family.taps or not family.vision:
        return []
    first = configs(base.config, family.vision)[0].get(family.taps.key, list(family.taps.default))
    now: list[int | None] = list(first)
    kept = list(range(len(layer_numbers(base, "vision"))))
    for stage in stages:
        moves = {kept[a]: None if b is None else kept[b] for a, b in (stage.get("removed") or {}).get("taps") or ()}
        now = [block if block is None else moves.get(block, block) for block in now]
        kept = [block for place, block in enumerate(kept) if place not in _removed(stage, "vision")]
    return list(zip(first, now))


def folders_of(stages: list[dict[str, Any]], model: Path) -> Iterator[Path | None]:
    """The folder that each stage wrote; None where it isn't there any more, or holds something else now."""
    for following in stages[1:]:
        try:
            folder = open_checkpoint(str(following.get("input")))
        except (PruneKitError, OSError):
            yield None
        else:
            yield folder.path if fingerprint(folder) == following.get("input_fingerprint") else None
    if stages:
        yield model
