"""Fewer experts in every mixture of a text stack: a plan (pure), a cut that drops some and numbers the others anew."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

from prunekit.checkpoint import DTYPE_BYTES, TORCH_DTYPES, Checkpoint, Outline, float_bytes
from prunekit.errors import PruneKitError
from prunekit.families import configs, spot_of

from .cut import Account, OfPlan
from .drafts import draft_tensors, drop_drafts

SCORES = ("error", "reap", "frequency", "random")


@dataclass(frozen=True)
class Place:
    """A tensor that goes with experts: one expert's, or with a row for each of a layer's (all of theirs, or a router).

    `linear` is the projection's name, relative to the layer, as a plain MLP's would be; the router's own.
    """

    layer: int
    linear: str
    expert: int | None = None
    router: bool = False


@dataclass(frozen=True)
class ExpertsPlan:
    """How many experts each mixture keeps; which ones, a fit on data decides."""

    source: Checkpoint
    outline: Outline  # of what will come out
    present: int
    experts: int  # that each mixture keeps
    chosen: int  # that a token goes to
    places: dict[str, Place]  # by the tensor's name
    notes: list[str]  # what the user should know, one line each

    @property
    def layers(self) -> list[int]:
        """Those that are mixtures."""
        return sorted({place.layer for place in self.places.values()})


@dataclass(frozen=True)
class ExpertsCut(OfPlan):
    """A checkpoint with fewer experts, whose changed tensors are computed when they are written."""

    plan: ExpertsPlan
    result: Checkpoint
    score: str
    kept: dict[int, list[int]]  # by layer: experts, numbered as in the input, rising
    settings: dict[str, Any] = field(default_factory=dict)  # of the fit, like metrics
    metrics: dict[str, float] = field(default_factory=dict)

    def account(self) -> Account:
        """Besides what every entry has: the experts that each mixture lost, numbered as in the input."""
        plan = self.plan
        removed = {"experts": plan.present - plan.experts}
        settings = {"experts": plan.experts, "score": self.score} | self.settings
        gone = {
            str(layer): [expert for expert in range(plan.present) if expert not in kept]
            for layer, kept in self.kept.items()
        }
        return Account("expert_cut", removed, self.metrics or None, settings, {"experts_removed": gone})


def find_places(checkpoint: Checkpoint) -> dict[str, Place]:
    """The text stack's tensors that go with experts, by name."""
    row = checkpoint.family.text
    places = {}
    for name in checkpoint.tensors if row.experts else ():
        if within := row.within(name):
            spot = spot_of(within[1])
            if spot.experts:
                places[name] = Place(within[0], spot.name, spot.expert)
            elif spot.name == row.router:
                places[name] = Place(within[0], spot.name, router=True)
    return places


def _present(checkpoint: Checkpoint, places: dict[str, Place]) -> int:
    """How many experts each mixture has; PruneKitError if layers, tensors or the config say it differently."""
    row = checkpoint.family.text
    if not any(place.router for place in places.values()):
        raise PruneKitError(
            f"{checkpoint.path}: {checkpoint.family.model_type} without a mixture of experts: there is none to drop; "
            "width_cut.py drops neurons"
        )
    rows: dict[int, str] = {}  # a number of experts, and a tensor that has it
    whose: dict[tuple[int, str], list[int]] = {}
    for name, place in places.items():
        tensor = checkpoint.tensors[name]
        if tensor.dtype not in TORCH_DTYPES:
            raise PruneKitError(f"{name}: {tensor.dtype}; only floating-point weights can be cut")
        if place.expert is None:
            rows.setdefault(tensor.shape[0] if tensor.shape else 0, name)
        else:
            whose.setdefault((place.layer, place.linear), []).append(place.expert)
    for (layer, linear), numbers in whose.items():
        if sorted(numbers) != list(range(len(numbers))):
            raise PruneKitError(f"{checkpoint.path}: layer {layer} lacks experts of {linear}; the folder is damaged")
        rows.setdefault(len(numbers), f"layer {layer}'s {linear}")
    for part in configs(checkpoint.config, row):
        for key in row.experts_count:
            if part.get(key):
                rows.setdefault(part[key], f"config.json ({key})")
    if len(rows) > 1:
        said = ", ".join(f"{count} by {name}" for count, name in rows.items())
        raise PruneKitError(f"{checkpoint.path}: not the same number of experts everywhere: {said}; mend it")
    return next(iter(rows))


def experts_chosen(model: Outline) -> int:
    """How many experts a token goes to, where layers are mixtures."""
    row = model.family.text
    return configs(model.config, row)[0].get(row.experts_chosen) or row.defaults.get(row.experts_chosen, 1)


def check_experts(checkpoint: Checkpoint) -> range:
    """How many experts each mixture may keep: from as many as a token goes to, up to one less than there are.

    Raises PruneKitError for a model without mixtures or without an expert that can go, and for one whose tensors and
    config disagree.
    """
    possible = range(experts_chosen(checkpoint), _present(checkpoint, find_places(checkpoint)))
    if not possible:
        raise PruneKitError(
            f"{checkpoint.path}: a token goes to all {possible.stop} experts of a mixture: there is none to drop"
        )
    return possible


def plan_experts(checkpoint: Checkpoint, experts: int) -> ExpertsPlan:
    """Plan to keep so many experts in each mixture of the text stack.

    Raises PruneKitError for a model without mixtures, one whose tensors and config disagree, and a number that is that
    of those present or more, or less than a token goes to. Reads no weights and writes no file.
    """
    row, places = checkpoint.family.text, find_places(checkpoint)
    present, chosen = _present(checkpoint, places), experts_chosen(checkpoint)
    if experts >= present:
        raise PruneKitError(f"--experts {experts}: each layer has {present}; keep fewer of them")
    if experts < chosen:
        raise PruneKitError(
            f"--experts {experts}: a token goes to {chosen} ({row.experts_chosen}); keep {chosen} at least"
        )
    config = copy.deepcopy(checkpoint.config)
    for part in configs(config, row):
        keys = [key for key in row.experts_count if key in part]
        part |= dict.fromkeys(keys or row.experts_count[:1], experts)
    notes = drop_drafts(checkpoint, config, {})  # a draft's experts are as many as the config says, too
    plan = ExpertsPlan(checkpoint, Outline(checkpoint.path, config, {}), present, experts, chosen, places, notes)
    # Experts are alike in size: which of them stay doesn't matter for the outline
    first = dict.fromkeys(plan.layers, list(range(experts)))
    return replace(plan, outline=replace(plan.outline, tensors=drop(plan, first).tensors))


# --- the cut ----------------------------------------------------------------------------------------------------------

Values = Mapping[str, Callable[[], Any]]  # of tensors, by name: what gives a numpy array, experts dropped already


def drop(plan: ExpertsPlan, kept: dict[int, list[int]], values: Values | None = None) -> Checkpoint:
    """The source with only these experts in each layer, numbered anew in their order; `values` as they shall be."""
    source, tensors = plan.source, {}
    drafts = set(draft_tensors(source))
    for name, tensor in source.tensors.items():
        if name in drafts:
            continue
        place, new = plan.places.get(name), name
        compute: Callable[[], Any] | None = None
        if place and place.expert is not None:
            if place.expert not in kept[place.layer]:
                continue
            number = kept[place.layer].index(place.expert)
            new = name.replace(f".experts.{place.expert}.", f".experts.{number}.")
        elif place:
            stays = kept[place.layer]
            tensor = replace(tensor, shape=(len(stays), *tensor.shape[1:]))
            compute = partial(_rows, source, name, stays)
        if values and name in values:
            compute = partial(_bytes, values[name], tensor.dtype, name)
        tensors[new] = replace(tensor, compute=compute) if compute else tensor
    return replace(source, config=plan.outline.config, tensors=tensors)


def _rows(source: Checkpoint, name: str, stays: list[int]) -> memoryview:
    """The bytes of some rows of a tensor, as they are."""
    tensor, data = source.tensors[name], memoryview(source.read_bytes(name))
    size = prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
    return memoryview(b"".join(data[row * size : (row + 1) * size] for row in stays))


def _bytes(value: Callable[[], Any], dtype: str, name: str) -> memoryview:
    return float_bytes(value(), dtype, name)
