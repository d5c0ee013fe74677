"""A learning rate for each attention head: 0 for pruned ones, a reduced one for weak ones, the full one for the others.

Adam divides a gradient by its own size, so that a scaled gradient makes the same step: it is the step itself that is
scaled, weight decay included, after the optimizer has made it. A pruned head (its slice of the output projection is 0)
keeps its weights bit by bit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import Checkpoint, heads, history
from prunekit.errors import PruneKitError
from prunekit.model.parts import LayerParts, Slice
from prunekit.model.replay import find_stack

KEY = "head_rates"  # in the optimizer's first parameter group: saved and resumed with it


@dataclass(frozen=True)
class Rates:
    """What a user can set."""

    weak: float = 0.1  # rate of weak heads
    weak_share: float = 0.25  # of a layer's heads that aren't pruned, rounded down: those with the lowest scores
    others: float = 1.0  # rate of everything but attention; 0 freezes it
    refresh: int = 0  # optimizer steps between looks at the gradients, which score the heads anew; 0: never

    def __post_init__(self):
        for name, low, high in (("weak", 0, 1), ("weak_share", 0, 1), ("others", 0, 1), ("refresh", 0, 1e9)):
            if not low <= getattr(self, name) <= high:
                raise PruneKitError(f"HEAD_RATES: {name}={getattr(self, name)}: give {low} to {high:.0f}")
        if self.others not in (0, 1):
            raise PruneKitError(f"HEAD_RATES: others={self.others}: give 1 (trained as ever) or 0 (frozen)")

    def check_dtype(self, dtype: str) -> None:
        """PruneKitError for weights of 16 bits, which round most of a weak head's small steps away."""
        if dtype in ("bfloat16", "float16") and 0 < self.weak < 1 and self.weak_share:
            raise PruneKitError(
                f"HEAD_RATES: weak heads would stand still in {dtype} weights: train with --torch_dtype float32 "
                f"--bf16 true"
            )

    @classmethod
    def parse(cls, text: str, **defaults: float) -> "Rates":
        """From words like `weak=0.1 refresh=100`. PruneKitError names what it doesn't know."""
        values: dict[str, Any] = dict(defaults)
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in kinds or not re.fullmatch(r"\d+" if kinds[name] is int else r"\d*\.?\d+", value):
                raise PruneKitError(
                    f"HEAD_RATES: {word!r}: write it like 'weak=0.1 weak_share=0.25 others=1 refresh=100'"
                )
            values[name] = kinds[name](value)
        return cls(**values)


def rate_heads(scores: torch.Tensor, pruned: torch.Tensor, settings: Rates) -> torch.Tensor:
    """The rate of each head of a layer. scores: (heads,), more is more important; pruned: (heads,) bool."""
    rates = torch.ones(len(scores))
    active = (~pruned).nonzero()[:, 0]
    weak = active[scores[active].argsort(stable=True)][: int(settings.weak_share * len(active))]
    rates[weak] = settings.weak
    rates[pruned] = 0.0
    return rates


def known_scores(checkpoint: Checkpoint) -> list[list[float]] | None:
    """Each layer's `head_scores` from the last cut in a checkpoint's history, of the heads that it still has.

    None where there are none, or where other surgery came after them.
    """
    for entry in reversed(history(checkpoint.path)):
        if entry.get("head_scores"):
            kept = entry["head_scores"]
            if "heads" not in (entry.get("settings") or {}).get("masked", []):
                gone = entry["heads_removed"]
                kept = [[s for h, s in enumerate(row) if h not in out] for row, out in zip(kept, gone)]
            return kept
        if entry.get("removed"):
            return None
    return None


@dataclass(frozen=True)
class Owned:
    """What belongs to one layer's heads."""

    slices: list[tuple[Slice, bool]]  # rows of q, k and v, columns of o; whether they are of KV heads
    o: Slice
    v: Slice


def find_owned(parts: LayerParts) -> Owned:
    slices = [(each, part is not parts.q) for part in (parts.q, parts.k, parts.v) for each in part.outputs()]
    return Owned([*slices, (parts.o.inputs(), False)], parts.o.inputs(), parts.v.outputs()[0])


class HeadRates:
    """Scales what an optimizer does to each head of a model's text layers."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        settings: Rates,
        scores: list[list[float]] | None = None,
    ):
        """`scores`: (layers, heads); without them, the norms of what the heads' weights make of their input.

        Layers of linear attention aren't counted: their heads learn as all else does.
        """
        self.settings, self.row = settings, checkpoint.family.text
        self.heads = heads(checkpoint)
        owner, attribute = find_stack(model, self.row)
        parts = [LayerParts(layer, self.row, self.heads) for layer in getattr(owner, attribute)]
        self.layers = [find_owned(each) for each in parts if each.attends]
        for parameter in self.parameters():
            settings.check_dtype(str(parameter.dtype).removeprefix("torch."))
        if scores is not None and [len(row) for row in scores] != [self.heads.query] * len(self.layers):
            scores = None
        self.scores = scores
        self._before: dict[nn.Parameter, torch.Tensor] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that belongs to heads."""
        for layer in self.layers:
            yield from dict.fromkeys(each.parameter for each, _ in layer.slices)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on every step of the optimizer is scaled. What is known of the heads is saved in its state."""
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: self._after_step(optimizer))

    def rates(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """(heads,) of each layer, as they are now."""
        return [torch.tensor(row) for row in self._state(optimizer)["rates"]]

    def _pruned(self, layer: Owned) -> torch.Tensor:
        return (layer.o.by_head(layer.o.parameter, self.heads.query) == 0).flatten(1).all(1).cpu()

    def _norms(self, layer: Owned) -> torch.Tensor:
        o = layer.o.by_head(layer.o.parameter, self.heads.query)
        v = layer.v.by_head(layer.v.parameter, self.heads.kv)
        outer = (v @ v.mT).repeat_interleave(self.heads.query // self.heads.kv, 0)
        return ((o @ o.mT) * outer).sum((1, 2)).cpu()

    @torch.no_grad()
    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        group = optimizer.param_groups[0]
        if KEY not in group:
            rows = []
            for number, layer in enumerate(self.layers):
                scores = torch.tensor(self.scores[number]) if self.scores else self._norms(layer)
                rows.append(rate_heads(scores, self._pruned(layer), self.settings).tolist())
            group[KEY] = {"rates": rows, "gradients": [[0.0] * self.heads.query for _ in rows], "steps": 0}
        return group[KEY]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        state = self._state(optimizer)
        if self.settings.refresh:
            self._look(state)
        for rates, layer in zip(state["rates"], self.layers):
            for each, _ in layer.slices if min(rates) < 1 else ():
                if each.parameter.grad is not None and each.parameter not in self._before:
                    self._before[each.parameter] = each.parameter.detach().clone()

    def _look(self, state: dict[str, Any]) -> None:
        """Add up (gradient * weight)^2 of every head, and rate them anew when it's time."""
        for number, layer in enumerate(self.layers):
            if (gradient := layer.o.parameter.grad) is not None:
                gates = layer.o.by_head(gradient.float() * layer.o.parameter, self.heads.query).sum((1, 2))
                sums = torch.tensor(state["gradients"][number]) + gates.square().cpu()
                state["gradients"][number] = sums.tolist()
        state["steps"] += 1
        if state["steps"] % self.settings.refresh == 0:
            for number, sums in enumerate(state["gradients"]):
                pruned = self._pruned(self.layers[number])
                state["rates"][number] = rate_heads(torch.tensor(sums), pruned, self.settings).tolist()
                state["gradients"][number] = [0.0] * self.heads.query

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for rates, layer in zip(self._state(optimizer)["rates"], self.layers):
            of_heads = torch.tensor(rates)
            of_groups = of_heads.view(self.heads.kv, -1).amax(1)  # as active as its most active reader
            for each, grouped in layer.slices:
                if each.parameter not in self._before:
                    continue
                rate = of_groups if grouped else of_heads
                shape = [1] * each.parameter.ndim
                shape[each.axis] = -1
                rate = rate.repeat_interleave(each.length // len(rate)).view(shape).to(each.parameter)
                now = each.of(each.parameter)
                now.copy_(each.of(self._before[each.parameter]).lerp(now, rate))
        self._before.clear()


def freeze_others(model: nn.Module, rates: HeadRates) -> None:
    """Only attention heads are trained from now on."""
    own = set(rates.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in own)
