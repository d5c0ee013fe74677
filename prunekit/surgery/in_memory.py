"""Layers removed from a model in memory: for the time of a block, or for good; experts for a block. None is copied."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from prunekit.families import Stack, configs
from prunekit.model.parts import Experts, find_part
from prunekit.model.replay import find_stack

from .layers import LayersPlan


def _changes(model: nn.Module, plan: LayersPlan) -> Iterator[tuple[Any, str, Any]]:
    """(target, attribute, value): what to set, one after the other, to make the model what `write_cut` writes."""
    family = plan.source.family
    for stack, row in family.stacks.items():
        owner, attribute = find_stack(model, row)
        config = getattr(owner, "config", model.config)
        gone = plan.removed.get(stack, [])
        if gone:
            layers = getattr(owner, attribute)
            kept = [layer for number, layer in enumerate(layers) if number not in gone]
            for key in row.per_layer:  # in memory also where config.json leaves it to transformers
                if values := getattr(config, key, None):
                    yield config, key, [value for number, value in enumerate(values) if number not in gone]
            yield owner, attribute, nn.ModuleList(kept)
            for number, layer in enumerate(kept):  # which a KV cache counts by
                yield from ((x, "layer_idx", number) for x in layer.modules() if hasattr(x, "layer_idx"))
        after = configs(plan.result.config, row)[0]
        for key in (*row.numbers, row.count):
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


@contextlib.contextmanager
def without_experts(model: nn.Module, row: Stack, gone: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within the block no token goes to these experts, by layer: the model is what a cut that refits nothing leaves."""
    layers = getattr(*find_stack(model, row))
    with contextlib.ExitStack() as hooks:
        for number, numbers in gone.items():
            experts = find_part(layers[number], row, row.mlp[-1])
            assert isinstance(experts, Experts)
            hook = partial(_route, torch.tensor(numbers, dtype=torch.long), experts.normed)
            hooks.enter_context(experts.router.register_forward_hook(hook))
        yield


def _route(gone: torch.Tensor, normed: bool, router: nn.Module, inputs: tuple, output: tuple) -> tuple:
    """What a router gives where its softmax is over the other experts only."""
    logits, shares, chosen = output
    chances = logits.float().index_fill(-1, gone.to(logits.device), -torch.inf).softmax(-1)
    top, chosen = chances.topk(chosen.shape[-1], -1)
    return logits, (top / top.sum(-1, keepdim=True) if normed else top).to(shares.dtype), chosen


def cut(model: nn.Module, plan: LayersPlan) -> None:
    """Make the model what `write_cut` would write, for good: nothing here keeps the layers removed alive."""
    for change in _changes(model, plan):
        setattr(*change)
