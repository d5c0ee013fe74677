"""Refit the weights that stay where others became zero, so that each projection writes what it did before.

Which weights stay is given. Each output of a projection is then a least squares problem over its own weights, in
calibration activations: all of a matrix are solved at once by conjugate gradients, and for each the step is taken that
leaves least on held-out rows, so few data can't make it worse there. (That weights may change after others are zeroed
is the idea of optimal brain surgery; SparseGPT, 2301.00774, does it in one sweep along the columns. With the zeros
given, the exact problem is no dearer: 2401.02938 solves it by ADMM.) Layer by layer, and in a layer attention's inputs
before what reads them, each on what the refitted ones before it give.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import Stack, spot_of
from prunekit.model.parts import place
from prunekit.model.scores import score_batches

from .cut import calibrated_on
from .sides import MADE_UP_ZEROS, Sides, reached
from .zeros import ZerosCut, ZerosPlan, cut_zeros, magnitude, tensor_bytes, with_importance
from .zeros_scores import IMPORTANCE, SCORES_OF, plain_name, watch_inputs

STEPS = 10  # of conjugate gradients: more of them gain nothing, and cost as much as the forward passes


class Moments:
    """Second moments of what matrices read, over tokens, by expert (None: of a plain projection): (inputs, inputs).

    own: of the sparse model's values with themselves. wanted: of the values that are wanted, with the sparse model's.
    """

    def __init__(self) -> None:
        self.own: dict[int | None, Any] = defaultdict(float)
        self.wanted: dict[int | None, Any] = defaultdict(float)

    def add(self, values: torch.Tensor, wanted: torch.Tensor, expert: int | None) -> None:
        """values, wanted: (tokens, inputs)."""
        self.own[expert] += values.T @ values
        self.wanted[expert] += wanted.T @ values

    @property
    def device(self) -> torch.device:
        return next(iter(self.own.values())).device

    def finite(self) -> bool:
        return all(torch.isfinite(each).all() for each in (*self.own.values(), *self.wanted.values()))

    def of(self, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.own[expert], self.wanted[expert]


def fit_rows(
    weight: torch.Tensor,
    kept: torch.Tensor,
    fit: tuple[torch.Tensor, torch.Tensor],
    judge: tuple[torch.Tensor, torch.Tensor],
    steps: int = STEPS,
) -> torch.Tensor:
    """The weights that stay, refitted: row by row nearest to what the whole row writes of the values that are wanted.

    weight, kept: (outputs, inputs), kept is False where a weight is zero. fit, judge: own and wanted `Moments` of the
    data to fit on, and of those that choose the step of conjugate gradients (with Jacobi's preconditioner, from the
    weights as they are), each output for itself.
    """
    (own, wanted), (own_judge, wanted_judge) = fit, judge
    aim = weight @ wanted_judge
    kept = kept.to(weight.dtype)

    def missing(found: torch.Tensor) -> torch.Tensor:
        return ((found @ own_judge - 2 * aim) * found).sum(-1, keepdim=True)

    def ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        return torch.where(below > 0, above / below.clamp_min(1e-38), 0)

    diagonal = own.diagonal()
    scale = ratio(torch.ones_like(diagonal), diagonal)
    found = weight * kept
    best, least = found, missing(found)
    rest = (weight @ wanted - found @ own) * kept
    along = scaled = rest * scale
    size = (rest * scaled).sum(-1, keepdim=True)
    for _ in range(steps):
        through = (along @ own) * kept
        length = ratio(size, (along * through).sum(-1, keepdim=True))
        found = found + length * along
        rest = rest - length * through
        scaled = rest * scale
        before, size = size, (rest * scaled).sum(-1, keepdim=True)
        along = scaled + ratio(size, before) * along
        left = missing(found)
        best, least = torch.where(left < least, found, best), torch.minimum(left, least)
    return best


def _turn(row: Stack, name: str) -> int:
    """When a projection's input is there: before attention, behind it, before the MLP, before what it writes with.

    A shared expert's come behind the other experts'.
    """
    plain, *beside = spot_of(name).name, *map(row.beside_experts, row.mlp)
    if plain in beside:
        return 5 if plain == beside[-1] else 4
    if plain in (row.q, row.k, row.v, *row.linear[:-1]):
        return 0
    return 1 if plain in row.mixers else 3 if plain == row.mlp[-1] else 2


class Layer:
    """A layer's chosen weights, and the moments of what they read."""

    def __init__(self, sides: Sides, number: int, names: dict[str, str]):
        """names: of the chosen weights, relative to the layer, by those of the checkpoint."""
        self.sides, self.number, self.module = sides, number, sides.layers[number]
        self.turns: dict[int, list[str]] = defaultdict(list)
        for name, relative in names.items():
            self.turns[_turn(sides.row, relative)].append(name)
        self.readers: dict[int, nn.Module] = {}
        self.read: dict[int, list[torch.Tensor]] = {turn: [] for turn in self.turns}
        for turn, each in self.turns.items():
            self.readers[turn] = self.module.get_submodule(spot_of(names[each[0]]).module)
        sides.teacher.step(number)
        sides.student.step(number)
        with contextlib.ExitStack() as hooks:
            for turn, module in self.readers.items():
                hook = module.register_forward_pre_hook(partial(self._keep, turn), with_kwargs=True)
                hooks.callback(hook.remove)
            sides.teacher.step(number + 1)

    def _keep(self, turn: int, _, inputs: tuple, kwargs: dict) -> None:
        self.read[turn].append(next(iter((*inputs, *kwargs.values()))).flatten(0, -2))

    def moments(self, turn: int) -> tuple[Moments, Moments]:
        """Of what the sparse model's layer reads there now: on the rows to fit on, and on those that judge."""
        sides, index = self.sides, -1
        fit, judge = Moments(), Moments()

        def mask() -> torch.Tensor:
            nonlocal index
            index += 1
            return sides.batches[index]["attention_mask"]

        def seen(part: str | None, expert: int | None, values: torch.Tensor, tokens: torch.Tensor) -> None:
            if part is not None and (part == "down_proj") != (turn == 3):
                return
            wanted = values
            if part != "down_proj":  # what the dense model's experts hold inside isn't kept
                wanted = torch.lerp(values, self.read[turn][index][tokens].float(), MADE_UP_ZEROS)
            (judge if index in sides.judged else fit).add(values, wanted, expert)

        hook = watch_inputs(self.readers[turn], mask, seen)
        sides.student.step(self.number + 1, keep=False)
        hook.remove()
        del self.read[turn]
        return fit, judge


def _relative_names(plan: ZerosPlan, stack: str, row: Stack) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name, weight in plan.weights.items():
        if weight.stack == stack and (within := row.within(name)):
            found[within[0]][name] = within[1]
    return dict(sorted(found.items()))


def _refitted(layer: Layer, cut: ZerosCut, names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's new values of a layer's weights, which the model then has, too."""
    parameters, weights = dict(layer.module.named_parameters()), cut.plan.weights
    for turn in sorted(layer.turns):
        fit, judge = layer.moments(turn)
        if not (fit.finite() and judge.finite()):
            raise PruneKitError(f"layer {layer.number} reads what isn't finite; try --dtype float32")
        for name in layer.turns[turn]:
            values, kept = cut.source.read(name), cut.zeroed(name) != 0
            rows = [each.movedim(weights[name].inputs, -1) for each in (values, kept)]
            experts: list[int | None]
            if values.ndim == 3:
                experts = list(range(len(values)))
            else:
                rows, experts = [each[None] for each in rows], [spot_of(names[name]).expert]
            fitted = [
                fit_rows(weight.float(), stays, fit.of(expert), judge.of(expert)).cpu()
                for weight, stays, expert in zip(*(each.to(fit.device) for each in rows), experts)
            ]
            found = torch.stack(fitted).movedim(-1, weights[name].inputs).reshape(values.shape)
            found = found.to(values.dtype)
            # In 16 bits a weight could become zero, too
            found = torch.where(kept & ((found == 0) | ~torch.isfinite(found)), values, found)
            found_at = place(parameters, names[name])
            assert found_at, f"{name} isn't in its layer"
            target = found_at[0][found_at[1]]
            target.copy_(found if target.shape == found.shape else found.transpose(-1, -2))
            yield name, found


def fit_zeros(plan: ZerosPlan, model: nn.Module, data: Calibration) -> ZerosCut:
    """Zeros by what the plan's wish says of data: layers' importance, scores, and a refit of what stays.

    `model` is the dense one, which a refit changes. Raises as `with_importance`, `cut_zeros`, `refit` and the scores
    do.
    """
    wish, inputs = plan.wish, (plan.source, model, data, plan.weights)
    if wish.importance in IMPORTANCE:
        plan = with_importance(plan, IMPORTANCE[wish.importance](*inputs))
    scores = SCORES_OF[wish.score](*inputs) if wish.score in SCORES_OF else magnitude
    cut = replace(cut_zeros(plan, scores), settings=calibrated_on(data))
    return refit(cut, model, data) if wish.refit else cut


@torch.no_grad()
def refit(cut: ZerosCut, model: nn.Module, data: Calibration, quiet: bool | None = None) -> ZerosCut:
    """The cut with the weights that stay refitted; its metrics are the loss on the held-out rows.

    `model` is the dense one; it ends up sparse. Refitted are the weights of layers; what else was chosen keeps its
    values. The losses are `held_out_loss_dense` and `held_out_loss`; none for encoders, which predict no next token.
    Memory: beside the model the chosen weights, two states per token, and of one layer what its matrices read. Raises
    PruneKitError for activations that aren't finite.
    """
    plan, family = cut.plan, cut.source.family
    losses: dict[str, float] = {}
    if family.causal:
        losses["held_out_loss_dense"] = score_batches(model, data.held_out)["loss"]
    # Towers first: what they give is what the text layers read
    names = {stack: _relative_names(plan, stack, row) for stack, row in reversed(family.stacks.items())}
    names = {stack: chosen for stack, chosen in names.items() if chosen}
    rows = {stack: reached(model, family, stack, data.fit, data.held_out) for stack in names}
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, weight in plan.weights.items():
        if weight.stack is None and (found := place(parameters, plain_name(name))):
            found[0][found[1]].copy_(cut.zeroed(name))
    tensors = dict(cut.result.tensors)
    with tqdm(total=sum(map(len, names.values())), desc="refit", disable=quiet) as progress:
        for stack, mine in rows.items():
            sides = Sides(model, family, stack, *mine)
            for number, chosen in names[stack].items():
                for name, values in _refitted(Layer(sides, number, chosen), cut, chosen):
                    tensors[name] = replace(tensors[name], compute=partial(tensor_bytes, values))
                progress.update()
    if family.causal:
        losses["held_out_loss"] = score_batches(model, data.held_out)["loss"]
    return replace(cut, result=replace(cut.result, tensors=tensors), metrics=losses)
