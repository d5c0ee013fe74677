"""Layers removed from a model in memory: for the time of a block, or for good. Nothing is copied or written."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from prunekit.families import configs
from prunekit.model.replay import find_stack

from .layers import LayersPlan


def _changes(model: nn.Module, plan: LayersPlan) -> Iterator[tuple[Any, str, Any]]:
    """(target, attribute, value): what to set, one after the other, to make the model what `write_cut` writes."""
    family = plan.source.family
    for stack, row in family.stacks.items():
        owner, attribute = find_stack(model, row)
        gone = plan.removed.get(stack, [])
        if gone:
            layers = getattr(owner, attribute)
            kept = [layer for number, layer in enumerate(layers) if number not in gone]
            yield owner, attribute, nn.ModuleList(kept)
            for number, layer in enumerate(kept):  # which a KV cache counts by
                yield from ((x, "layer_idx", number) for x in layer.modules() if hasattr(x, "layer_idx"))
        config = getattr(owner, "config", model.config)
        after = configs(plan.result.config, row)[0]
        for key in (*row.per_layer, *row.numbers, row.count):
            for target in (config, owner):
                if key in after and hasattr(target, key):
                    yield target, key, after[key]
    if family.taps and plan.taps:
        tower, _ = find_stack(model, family.stacks["vision"])
        part = configs(plan.result.config, family.stacks["vision"])[0]
        yield tower, family.taps.key, part[family.taps.key]
        attribute = re.sub(r"\W", "", family.taps.mergers.rpartition(r"visual\.")[2])
        mergers = zip(getattr(tower, attribute), plan.taps)
        yield tower, attribute, nn.ModuleList(merger for merger, (_, after) in mergers if after is not None)


@contextlib.contextmanager
def removed(model: nn.Module, plan: LayersPlan) -> Iterator[None]:
    """Within the block the model is what `write_cut` would write: nothing is copied, and all is put back at the end."""
    undo: list[tuple[Any, str, Any]] = []

    def put(target: Any, name: str, value: Any) -> None:
        undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    try:
        for change in _changes(model, plan):
            put(*change)
        yield
    finally:
        for target, name, value in reversed(undo):
            setattr(target, name, value)


def cut(model: nn.Module, plan: LayersPlan) -> None:
    """Make the model what `write_cut` would write, for good: nothing here keeps the layers removed alive."""
    for change in _changes(model, plan):
        setattr(*change)
