"""Drop text layers and vision blocks: a plan has all decisions, a cut its bytes."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prunekit.checkpoint import Checkpoint, attending, layer_numbers
from prunekit.errors import PruneKitError
from prunekit.families import Stack, configs

from .cut import Account, OfPlan
from .drafts import draft_tensors

MOST_LAYERS, MOST_SHARE = 10, 0.25  # what recovers surely, if it goes at once


@dataclass(frozen=True)
class LayersPlan:
    """What a cut will do. Numbers are those of the input."""

    source: Checkpoint
    result: Checkpoint  # its tensors still point into the source's files
    removed: dict[str, list[int]]  # by stack
    taps: list[tuple[int, int | None]]  # (block before, block after or None if dropped), one per merger
    notes: list[str]  # what the user should know, one line each


@dataclass(frozen=True)
class LayersCut(OfPlan):
    """A checkpoint without layers; `layers_fit.fit_layers` has what is around the seams refitted."""

    plan: LayersPlan
    result: Checkpoint
    seams: list[dict[str, Any]] = field(default_factory=list)  # what refitting did at each
    settings: dict[str, Any] | None = None  # of the fit

    def account(self) -> Account:
        plan, seams, losses = self.plan, self.seams, None
        more: dict[str, Any] = {}
        if seams:
            losses = {"held_out_loss_unhealed": seams[0]["loss_before"], "held_out_loss": seams[-1]["loss_after"]}
            more["seams"] = seams
        if warnings := cautions(plan):
            more["warnings"] = warnings
        taps = {"taps": plan.taps} if any(before != after for before, after in plan.taps) else {}
        return Account("manual_select", plan.removed | taps, losses, self.settings, more)


@dataclass(frozen=True)
class Seam:
    """A place where layers are missing. Numbers are those of the input."""

    stack: str
    before: int
    gone: tuple[int, ...]
    behind: tuple[int, ...]  # the layers from here to the next seam


def parse_numbers(words: Iterable[str]) -> list[int]:
    """Layer numbers from words like `4`, `4-7` and `4-7,10`, in the order given."""
    numbers: list[int] = []
    for word in filter(None, ",".join(words).split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip()) if len(word) <= 20 else None
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise PruneKitError(f"{word[:40]!r} is no layer number; write numbers and ranges like 4 6-8 or 4,6-8")
        numbers += range(int(match[1]), min(int(match[2] or match[1]), int(match[1]) + 9999) + 1)
    return numbers


def cautions(plan: LayersPlan) -> list[str]:
    """Where a plan takes more at once than recovers surely: over 10 layers, or over a quarter of a stack's."""
    counts = {stack: len(layer_numbers(plan.source, stack)) for stack in plan.removed}
    gone = {stack: len(numbers) for stack, numbers in plan.removed.items()}
    much = [stack for stack in gone if gone[stack] > MOST_SHARE * counts[stack]]
    if not much and sum(gone.values()) <= MOST_LAYERS:
        return []
    parts = " and ".join(f"{gone[stack]} of {counts[stack]} {stack} layers" for stack in much or gone)
    return [
        f"{parts} at once: at most {MOST_SHARE:.0%} of them, or {MOST_LAYERS}, recover surely; drop fewer, recover, "
        f"and look again"
    ]


def place_taps(taps: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Where each tap goes when only the vision blocks `kept` remain; numbers are those of the input.

    A tap on a kept block stays; one on a removed block goes to the nearest kept block before it, whose output is what
    the tap would see were the removed blocks identities, else to the first kept block. Where that would leave two
    taps on one block, they move by as few places in all as makes them unique and increasing; of equal ways, the one
    that moves fewest taps off kept blocks. Needs len(kept) >= len(taps).
    """
    wished = [max(sum(block <= tap for block in kept) - 1, 0) for tap in taps]
    alive = [tap in kept for tap in taps]

    # best[j]: the cheapest way to place the taps so far with the last one on place j
    best: list[tuple[int, int, list[int]]] = [(0, 0, [])]
    for wish, stays in zip(wished, alive):
        step = []
        for place in range(len(kept)):
            before = [way for way in best if not way[2] or way[2][-1] < place]
            if before:
                moved, unseated, places = min(before)
                distance = abs(place - wish)
                step.append((moved + distance, unseated + (stays and distance > 0), [*places, place]))
        best = step
    return [kept[place] for place in min(best)[2]]


def _check_numbers(numbers: Sequence[int], count: int, what: str, option: str) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise PruneKitError(
                f"{option} {number}: the model has {what}s 0 to {count - 1}; number them as in the input"
            )
        if numbers.count(number) > 1:
            raise PruneKitError(f"{option} {number}: given twice; name each {what} once")
    if len(numbers) == count:
        raise PruneKitError(f"{option}: names all {count} {what}s; leave at least one")


def _plan_taps(
    taps: list[int], kept: list[int], wanted: Sequence[int] | None, dropped: Sequence[int]
) -> list[tuple[int, int | None]]:
    mergers = [i for i in range(len(taps)) if i not in dropped]
    if len(mergers) > len(kept):
        raise PruneKitError(
            f"{len(mergers)} DeepStack taps need as many vision blocks, {len(kept)} would be left; remove fewer with "
            f"--vision, or drop taps with their mergers: --drop-taps {' '.join(map(str, mergers[len(kept) :]))}"
        )
    if wanted is None:
        places = place_taps([taps[i] for i in mergers], kept)
    else:
        places = list(wanted)
        if len(places) != len(mergers) or places != sorted(set(places)) or not set(places) <= set(kept):
            raise PruneKitError(
                f"--taps {' '.join(map(str, places))}: name {len(mergers)} different vision blocks that are kept, "
                f"in rising order, numbered as in the input ({' '.join(map(str, kept))})"
            )
    after = dict(zip(mergers, places))
    return [(tap, after.get(i)) for i, tap in enumerate(taps)]


def _pattern(row: Stack, count: int, every: int) -> list[str]:
    return ["full_attention" if (i + 1) % every == 0 else row.others for i in range(count)]


def _every(row: Stack, part: dict[str, Any]) -> int | None:
    """Of a config's layers every which one attends fully; None if they follow no such pattern."""
    types, count = part.get("layer_types"), part[row.count]
    return next((n for n in range(1, count + 1) if types == _pattern(row, count, n)), None)


def _shrink(part: dict[str, Any], row: Stack, kept: list[int], count: int) -> None:
    """Make one config's per-layer keys fit the layers kept."""
    part[row.count] = len(kept)
    known = row.defaults | part
    for key in row.pattern:
        if type(every := known.get(key)) is int and every > 0 and not part.get("layer_types"):
            part["layer_types"] = _pattern(row, count, every)
    for key in row.per_layer:
        if values := part.get(key):
            part[key] = [values[i] for i in kept]
    for key in row.pattern:
        if part.pop(key, None) and (every := _every(row, part)):
            part[key] = every  # some readers go by it, whatever layer_types says
    if row.sparse_step and (step := part.get(row.sparse_step) or 1) != 1:
        # Which layers are sparse depends on their numbers: from here on they are listed.
        dense = part.get(row.numbers[0]) or []
        part[row.numbers[0]] = [i for i in range(count) if i in dense or (i + 1) % step]
        part[row.sparse_step] = 1
    for key in row.numbers:
        if isinstance(values := part.get(key, row.defaults.get(key)), list):
            part[key] = [new for new, old in enumerate(kept) if old in values]
    if row.threshold and type(limit := known.get(row.threshold)) is int:
        part[row.threshold] = sum(i < limit for i in kept)


def plan_layers(
    checkpoint: Checkpoint,
    text: Sequence[int] = (),
    vision: Sequence[int] = (),
    taps: Sequence[int] | None = None,
    drop_taps: Sequence[int] = (),
) -> LayersPlan:
    """Plan to drop text layers and vision blocks, all numbered as in the input.

    `taps` names the blocks that DeepStack's mergers shall tap (default: `place_taps`), `drop_taps` the mergers to
    drop with their taps, counted from 0. Raises PruneKitError for numbers out of range or given twice, a stack left
    empty, nothing to do, taps without a place. Reads and writes no file.
    """
    family, removed = checkpoint.family, {"text": sorted(text), "vision": sorted(vision)}
    if not text and not vision and not drop_taps and taps is None:
        raise PruneKitError("nothing to remove; name text layers with --text or vision blocks with --vision")
    if family.vision is None and vision:
        raise PruneKitError(f"--vision: {family.model_type} has no vision blocks; use --text")
    if family.taps is None and (taps is not None or drop_taps):
        raise PruneKitError(f"--taps, --drop-taps: {family.model_type} has no DeepStack taps; leave them out")

    config, notes, renames = copy.deepcopy(checkpoint.config), [], []
    kept: dict[str, list[int]] = {}
    for name, row in family.stacks.items():
        count = len(layer_numbers(checkpoint, name))
        _check_numbers(removed[name], count, "text layer" if name == "text" else "vision block", f"--{name}")
        kept[name] = [i for i in range(count) if i not in removed[name]]
        if removed[name]:
            if row.fixed_if and configs(config, row)[0].get(row.fixed_if) and kept[name][-1] >= len(kept[name]):
                raise PruneKitError(f"{row.fixed_if}: scales layers by number, so only the last ones can be removed")
            for part in configs(config, row):
                _shrink(part, row, kept[name], count)
            renames.append((row.prefix, kept[name]))

    if removed["text"] and family.text.linear:
        attend = attending(checkpoint)
        if not set(attend) - set(removed["text"]):
            raise PruneKitError(
                f"--text: names all {len(attend)} layers of full attention ({', '.join(map(str, attend))}); leave at "
                "least one, by which caches count their tokens"
            )
        notes += _pattern_notes(checkpoint, config)

    moves = []
    if family.taps:
        part = configs(config, family.stacks["vision"])[0]
        old = part.get(family.taps.key, list(family.taps.default))
        for tap in drop_taps:
            if tap not in range(len(old)) or list(drop_taps).count(tap) > 1:
                raise PruneKitError(f"--drop-taps {tap}: the mergers are 0 to {len(old) - 1}, each named once")
        moves = _plan_taps(old, kept["vision"], taps, drop_taps)
        part[family.taps.key] = new = [kept["vision"].index(block) for _, block in moves if block is not None]
        if len(new) > len(kept["text"]):
            raise PruneKitError(
                f"DeepStack feeds the first {len(new)} text layers, {len(kept['text'])} would be left; remove fewer "
                f"with --text, or drop taps: --drop-taps {' '.join(map(str, range(len(kept['text']), len(old))))}"
            )
        if drop_taps:
            renames.append((family.taps.mergers, [i for i in range(len(old)) if i not in drop_taps]))
        notes += _tap_notes(moves, new, kept["text"])

    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if (new_name := _rename(name, renames)) is not None:
            tensors[new_name] = tensor
    result = replace(checkpoint, config=config, tensors=tensors)
    return LayersPlan(checkpoint, result, {k: v for k, v in removed.items() if v}, moves, notes)


def _pattern_notes(checkpoint: Checkpoint, config: dict[str, Any]) -> list[str]:
    notes, row = [], checkpoint.family.text
    if not _every(row, configs(config, row)[0]):
        notes.append(
            "full attention comes in no fixed interval now: transformers and vLLM go by layer_types, but llama.cpp's "
            "converter goes by the interval"
        )
    if draft_tensors(checkpoint):
        notes.append(
            "the layers that predict further tokens (MTP) stay as they are: fewer of their drafts will be right"
        )
    return notes


def _tap_notes(moves: list[tuple[int, int | None]], new: list[int], text: list[int]) -> list[str]:
    left = iter(new)
    notes = []
    for merger, (before, after) in enumerate(moves):
        if after is None:
            notes.append(f"tap {merger}: dropped with its merger (was on vision block {before})")
        else:
            how = "stays on" if after == before else f"moves from block {before} to"
            notes.append(f"tap {merger}: {how} block {after}, now numbered {next(left)}")
    entered = text[: len(new)]
    if entered != list(range(len(new))):
        notes.append(f"DeepStack features now enter what were text layers {', '.join(map(str, entered))}")
    return notes


def _rename(name: str, renames: list[tuple[str, list[int]]]) -> str | None:
    for prefix, kept in renames:
        if match := re.match(rf"({prefix})(\d+)(\..*)", name):
            return f"{match[1]}{kept.index(int(match[2]))}{match[3]}" if int(match[2]) in kept else None
    return name


def find_seams(plan: LayersPlan) -> list[Seam]:
    """Vision first, then text, in the order of the layers. Removed first layers have none before them to refit."""
    seams = []
    for stack in reversed(plan.source.family.stacks):
        gone = plan.removed.get(stack, [])
        kept = [i for i in layer_numbers(plan.source, stack) if i not in gone]
        starts = [i for i in kept if i + 1 in gone]
        for before, end in zip(starts, [*starts[1:], None]):
            behind = tuple(kept[kept.index(before) + 1 : end and kept.index(end)])
            missing = range(before + 1, min((i for i in kept if i > before), default=max(gone) + 1))
            seams.append(Seam(stack, before, tuple(missing), behind))
    return seams


def check_healable(plan: LayersPlan) -> None:
    """PruneKitError if this plan has a seam that can't be healed, or none that can."""
    family = plan.source.family
    for stack in plan.removed:
        if not family.stacks[stack].plain_residual:
            raise PruneKitError(
                f"--heal: {family.model_type} has norms behind its projections, into which nothing can be folded; "
                "leave it out"
            )
    if not find_seams(plan):
        raise PruneKitError("--heal: no layer is left before those that are removed; leave it out")


def cut_layers(plan: LayersPlan) -> LayersCut:
    """The plan's layers removed, and nothing refitted."""
    return LayersCut(plan, plan.result)


def say_seam(seam: dict[str, Any]) -> str:
    """What refitting did at a seam of a `LayersCut`, for a user."""
    done = "left as it is: refitting did not lower the held-out loss"
    if seam["refitted"]:
        losses = f"held-out loss {seam['loss_before']:.4f} -> {seam['loss_after']:.4f}"
        done = f"{seam['jump_left']:.0%} of the jump left, {losses}"
    return f"{seam['stack']} seam behind layer {seam['layer']}: {done}"
