"""A learning rate for each attention head: 0 for pruned ones, a reduced one for weak ones, the full one for the others.

Adam divides a gradient by its own size, so that a scaled gradient makes the same step: it is the step itself that is
scaled, weight decay included, after the optimizer has made it. A pruned head (its slice of the output projection is 0)
keeps its weights bit by bit. Where masks may move (`adaptive`), a pruned head comes back in exchange for the weakest
one, as single weights do in RigL (Evci et al., 1911.11134).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import Checkpoint, heads, history
from prunekit.errors import PruneKitError
from prunekit.model.parts import LayerParts, Slice
from prunekit.model.replay import find_stack

LOOKS = ("refresh", "adaptive")
KEY = "head_rates"  # in the optimizer's first parameter group: saved and resumed with it


@dataclass(frozen=True)
class Rates:
    """What a user can set."""

    weak: float = 0.1  # rate of weak heads
    weak_share: float = 0.25  # of a layer's heads that aren't pruned, rounded down: those with the lowest scores
    others: float = 1.0  # rate of everything but attention; 0 freezes it
    refresh: int = 0  # optimizer steps between looks at the gradients, which score the heads anew; 0: never
    weak_below: float = 0.0  # weak are those, too, that score below this share of their layer's highest score
    adaptive: int = 0  # optimizer steps between looks at which pruned heads may come back, others go; 0: never

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            high = 1e9 if name in LOOKS else 1
            if not 0 <= getattr(self, name) <= high:
                raise PruneKitError(f"HEAD_RATES: {name}={getattr(self, name)}: give 0 to {high:.0f}")
        if self.others not in (0, 1):
            raise PruneKitError(f"HEAD_RATES: others={self.others}: give 1 (trained as ever) or 0 (frozen)")

    @staticmethod
    def check_training(optimizer: str, sharded: bool, tuner: str) -> None:
        """PruneKitError for a training that would undo rates: by DeepSpeed or FSDP (`sharded`), or of an adapter."""
        if sharded:
            raise PruneKitError(f"--optimizer {optimizer}: works with plain DDP only; set DEEPSPEED= (empty)")
        if tuner != "full":
            raise PruneKitError(f"--optimizer {optimizer}: works with --tuner_type full only")

    def check_dtype(self, dtype: str) -> None:
        """PruneKitError for weights of 16 bits, which round most of a weak head's small steps away."""
        if dtype in ("bfloat16", "float16") and 0 < self.weak < 1 and (self.weak_share or self.weak_below):
            raise PruneKitError(
                f"HEAD_RATES: weak heads would stand still in {dtype} weights: train with --torch_dtype float32 "
                f"--bf16 true"
            )

    @classmethod
    def parse(cls, text: str, **defaults: float) -> "Rates":
        """From words like `weak=0.1 refresh=100`. PruneKitError names what it doesn't know.

        `weak_below` alone takes the place of `weak_share`.
        """
        values: dict[str, Any] = dict(defaults)
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in kinds or not re.fullmatch(r"\d+" if kinds[name] is int else r"\d*\.?\d+", value):
                raise PruneKitError(
                    f"HEAD_RATES: {word!r}: write it like 'weak=0.1 weak_share=0.25 others=1 refresh=100', or "
                    "'weak=0.1 weak_below=0.2 adaptive=100'"
                )
            values[name] = kinds[name](value)
        if "weak_below" in values:
            values = {"weak_share": 0.0} | values
        return cls(**values)


def rate_heads(scores: torch.Tensor, pruned: torch.Tensor, settings: Rates) -> torch.Tensor:
    """The rate of each head of a layer. scores: (heads,), more is more important; pruned: (heads,) bool."""
    rates = torch.ones(len(scores))
    active = (~pruned).nonzero()[:, 0]
    weak = active[scores[active].argsort(stable=True)][: int(settings.weak_share * len(active))]
    rates[weak] = settings.weak
    known = scores[active][scores[active].isfinite()]
    if settings.weak_below and len(known):
        rates[active[scores[active] < settings.weak_below * known.max()]] = settings.weak
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
        say: Callable[[str], None] = lambda said: None,
    ):
        """`scores`: (layers, heads); without them, the norms of what the heads' weights make of their input.

        Layers of linear attention aren't counted: their heads learn as all else does. `say` gets what a look at masks
        has exchanged. PruneKitError if masks may move and there are none.
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
        self.scores, self.say = scores, say
        if settings.adaptive and not any(self._pruned(layer).any() for layer in self.layers):
            raise PruneKitError("HEAD_RATES: adaptive: no head is masked that could come back: width_cut.py --mask")
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
        return ((o @ o.mT) * outer).sum((1, 2)).clamp_min(0).sqrt().cpu()

    @torch.no_grad()
    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        group = optimizer.param_groups[0]
        if KEY not in group:
            rows = []
            for number, layer in enumerate(self.layers):
                scores = torch.tensor(self.scores[number]) if self.scores else self._norms(layer)
                rows.append(rate_heads(scores, self._pruned(layer), self.settings).tolist())
            group[KEY] = {"rates": rows, "steps": 0} | {look: self._nothing() for look in LOOKS}
        return group[KEY]

    def _nothing(self) -> list[list[list[float]]]:
        """Of each layer's heads: sums over steps of (gradient * weight)^2, and of the squared norm of the gradient."""
        return [[[0.0] * self.heads.query] * 2 for _ in self.layers]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        state = self._state(optimizer)
        if self.settings.refresh or self.settings.adaptive:
            self._look(state)
        for rates, layer in zip(state["rates"], self.layers):
            for each, _ in layer.slices if min(rates) < 1 else ():
                if each.parameter.grad is not None and each.parameter not in self._before:
                    self._before[each.parameter] = each.parameter.detach().clone()

    def _look(self, state: dict[str, Any]) -> None:
        """Add up what gradients say of every head; when it's time exchange pruned ones, and rate all anew."""
        looks = [look for look in LOOKS if getattr(self.settings, look)]
        for number, layer in enumerate(self.layers):
            if (gradient := layer.o.parameter.grad) is not None:
                each = layer.o.by_head(gradient, self.heads.query)
                gates = (each * layer.o.by_head(layer.o.parameter, self.heads.query)).sum((1, 2)).square()
                found = torch.stack([gates, each.square().sum((1, 2))]).cpu()
                for look in looks:
                    state[look][number] = (torch.tensor(state[look][number]) + found).tolist()
        state["steps"] += 1
        for look in looks:
            if state["steps"] % getattr(self.settings, look) == 0:
                for number, (gates, gradients) in enumerate(map(torch.tensor, state[look])):
                    scores = gates.sqrt()
                    if look == "adaptive":
                        scores[self._exchange(number, gates, gradients, state["steps"])] = torch.inf  # not weak at once
                    rates = rate_heads(scores, self._pruned(self.layers[number]) & scores.isfinite(), self.settings)
                    state["rates"][number] = rates.tolist()
                state[look] = self._nothing()

    def _exchange(self, number: int, gates: torch.Tensor, gradients: torch.Tensor, step: int) -> list[int]:
        """Heads of a layer that come back, as many others are zeroed. gates, gradients: (heads,), as `_nothing` says.

        The pruned head with the largest gradient of its output weights comes back, from zero, in exchange for the least
        important of the others, if that one's gradient is smaller. In each group of heads with one KV head, so that
        groups stay equal; of the whole layer, where each has its own.
        """
        layer, size = self.layers[number], self.heads.query // self.heads.kv
        pruned, back = self._pruned(layer), []
        for heads_of in torch.arange(self.heads.query).split(size if size > 1 else self.heads.query):
            resting, others = heads_of[pruned[heads_of]], heads_of[~pruned[heads_of]]
            if not len(resting) or not len(others):
                continue
            new = int(resting[gradients[resting].argmax()])
            old = int(others[gates[others].argmin()])
            if gradients[new] > gradients[old]:
                length = layer.o.length // self.heads.query
                layer.o.of(layer.o.parameter).narrow(layer.o.axis, old * length, length).zero_()
                back.append(new)
                self.say(f"step {step}, layer {number}: head {new} comes back, {old} is masked")
        return back

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
