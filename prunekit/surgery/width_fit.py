"""Narrow layers on calibration data: score heads and neurons, and refit what reads those that stay.

Layer by layer, each on what the cut ones before it give: heads are scored and cut, o_proj is refitted to the uncut
model's state behind attention; then neurons are scored and cut, and down_proj is refitted to its state behind the
layer, or to make up for a part of the error that comes in. A refit stays where it brings held-out rows nearer to these
states. In memory nothing is removed: what goes is zeroed where the output projection reads it, and `width.choose`
writes the smaller tensors.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from prunekit.checkpoint import heads
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import Stack
from prunekit.model.parts import Experts, LayerParts, Linear
from prunekit.model.replay import find_stack, record_calls
from prunekit.model.scores import backward_loss, score_batches

from .cut import calibrated_on
from .sides import MADE_UP_WIDTH, Fit, Sides, states_between
from .width import Change, Scores, WidthCut, WidthPlan, choose, keep_all, keep_heads, keep_neurons, magnitudes, refits

# --- scores -----------------------------------------------------------------------------------------------------------


def focus(weights: torch.Tensor, score: str) -> torch.Tensor:
    """How far attention distributions are from uniform ones, 0 to 1: (batch, heads, queries).

    weights: (batch, heads, queries, keys). `entropy`: 1 - H / log n over the n keys that a query sees, close to Voita's
    confidence (1905.09418); `variance`: that of the weights over that of a one-hot distribution.
    """
    weights = weights.float()
    seen = (weights > 0).sum(-1).clamp_min(2)
    if score == "entropy":
        return 1 + torch.special.xlogy(weights, weights).sum(-1) / seen.log()
    return (weights.square().sum(-1) - 1 / seen) / (1 - 1 / seen)


class Student:
    """The cut stack's fitting rows, of which one layer is run to see what is in it."""

    def __init__(self, sides: Sides, batches: list[dict]):
        self.sides, self.rows = sides, sides.judged.start
        self.masks = [batch["attention_mask"].bool() for batch in batches[: self.rows]]

    def watch(self, number: int, *hooks: Any) -> None:
        """Run layer `number`. A hook is (module, function(mask, inputs, output)): called for each batch's tokens."""
        self.sides.student.step(number)
        some = copy(self.sides.student)
        for rows in ("calls", "states", "added"):
            setattr(some, rows, getattr(some, rows)[: self.rows])

        def call(function: Callable, masks: Iterator[torch.Tensor], _, inputs, output) -> None:
            function(next(masks), inputs, output)

        with contextlib.ExitStack() as stack:
            for module, function in hooks:
                stack.enter_context(module.register_forward_hook(partial(call, function, iter(self.masks))))
            some.step(number + 1, keep=False)


def head_scores(layer: LayerParts, student: Student, number: int, score: str) -> np.ndarray:
    """(heads,) by activation, entropy or variance."""
    total: Any = 0.0
    tokens = 0

    def moments(mask, inputs, output):
        nonlocal total
        x = inputs[0][mask.to(inputs[0].device)].float().unflatten(-1, (layer.heads.query, layer.heads.dim))
        total = total + torch.einsum("nhi,nhj->hij", x, x)

    def distributions(mask, inputs, output):
        nonlocal total, tokens
        weights = output[1]
        if weights is None:
            raise PruneKitError(f"--score {score}: this model's attention doesn't give its distributions")
        mask = mask.to(weights.device).clone()
        mask[:, 0] = False  # a first token sees itself alone
        total = total + (focus(weights, score) * mask[:, None]).sum((0, 2))
        tokens += int(mask.sum())

    if score != "activation":
        student.watch(number, (layer.attention, distributions))
        return (total / max(tokens, 1)).cpu().numpy()
    student.watch(number, (layer.o.module, moments))
    columns = layer.o.matrix.float().unflatten(1, (layer.heads.query, layer.heads.dim))
    written = (torch.einsum("ohi,ohj->hij", columns, columns) * total).sum((1, 2))
    return written.clamp_min(0).sqrt().cpu().numpy()


def neuron_scores(layer: LayerParts, student: Student, number: int) -> np.ndarray:
    """(experts, neurons): root mean square of what each writes, times a constant."""
    down = layer.down
    if isinstance(down, Linear):
        totals = [0.0]

        def squares(mask, inputs, output):
            totals[0] = totals[0] + inputs[0][mask.to(inputs[0].device)].float().square().sum(0)

        student.watch(number, (down.module, squares))
        norms = down.matrix.float().norm(dim=0)[None]
    else:
        totals = [0.0] * len(down)

        def squares(mask, inputs, output):
            for expert, _, _, x in down.read(inputs, {}, mask):
                totals[expert] = totals[expert] + x.float().square().sum(0)

        student.watch(number, (down.module, squares))
        norms = down.module.down_proj.float().norm(dim=1)
    return (torch.stack(totals).sqrt() * norms).cpu().numpy()


def taylor(
    model: nn.Module, row: Stack, layers: list[LayerParts], batches: list[dict], quiet: bool | None = None
) -> dict[int, Scores]:
    """First-order importance of the uncut model's heads and neurons: E[(sum of gradient * value)^2], by layer.

    Molchanov et al. 2019 (1906.10771), of a gate on each head or neuron, with a row of the data as the sample; a batch
    for experts, whose neurons are only seen through the gradient of down_proj.
    """
    heads_of: list[Any] = [0.0] * len(layers)
    neurons_of: list[Any] = [0.0] * len(layers)
    entered: dict[tuple[int, str], torch.Tensor] = {}

    def enter(key: tuple[int, str], _, inputs) -> None:
        inputs[0].retain_grad()
        entered[key] = inputs[0]

    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for parameter, before in zip(model.parameters(), wanted):
            undo.callback(parameter.requires_grad_, before)
            parameter.requires_grad_(False)
        embedding = model.get_input_embeddings()
        undo.enter_context(embedding.register_forward_hook(lambda _, inputs, output: output.requires_grad_()))
        for number, layer in enumerate(layers):
            for what, part in (("heads", layer.o), ("neurons", layer.down)):
                if isinstance(part, Experts):
                    part.module.down_proj.requires_grad_(True)
                else:
                    undo.enter_context(part.module.register_forward_pre_hook(partial(enter, (number, what))))
        for batch in tqdm(batches, desc="gradients", leave=False, disable=quiet):
            backward_loss(model, batch)
            for number, layer in enumerate(layers):
                if layer.attends:
                    x = entered[number, "heads"]
                    gates = (x.grad.float() * x.detach().float()).unflatten(-1, (layer.heads.query, layer.heads.dim))
                    heads_of[number] = heads_of[number] + gates.sum((1, 3)).square().sum(0)
                if isinstance(layer.down, Linear):
                    x = entered[number, "neurons"]
                    squares = (x.grad.float() * x.detach().float()).sum(1).square().sum(0)[None]
                else:
                    down = layer.down.module.down_proj
                    squares = (down.grad.float() * down.detach().float()).sum(1).square()
                    down.grad = None
                neurons_of[number] = neurons_of[number] + squares
            entered.clear()
    return {
        number: Scores(one.cpu().numpy() if layers[number].attends else None, other.cpu().numpy())
        for number, (one, other) in enumerate(zip(heads_of, neurons_of))
    }


# --- the model --------------------------------------------------------------------------------------------------------


def gate_heads(layer: LayerParts, kept: list[int]) -> Any:
    """Zero the other heads where they are read; returns the hook."""
    return _gate(layer.o, kept, layer.heads.dim)


def gate_neurons(layer: LayerParts, kept: list[list[int]]) -> Any:
    """Zero the other neurons where they are read; returns the hook, or None for experts, whose weights are zeroed."""
    if isinstance(layer.down, Linear):
        return _gate(layer.down, kept[0], 1)
    down = layer.down.module.down_proj
    for expert, numbers in enumerate(kept):
        gone = torch.ones(down.shape[-1], dtype=torch.bool)
        gone[numbers] = False
        down[expert][:, gone.to(down.device)] = 0
    return None


def _gate(part: Linear, kept: list[int], unit: int) -> Any:
    mask = part.matrix.new_zeros(part.matrix.shape[1] // unit)
    mask[kept] = 1
    mask = mask.repeat_interleave(unit)
    return part.module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask, *inputs[1:]))


def _reachable(targets: list[torch.Tensor], uncut: list, cut: list, made_up: float) -> list[torch.Tensor]:
    """Targets less what isn't made up for of the difference of states that come in (None where nothing came before)."""
    return [
        target if state is None else target.float() - (1 - made_up) * (state.float() - own.float())
        for target, state, own in zip(targets, uncut, cut, strict=True)
    ]


def as_change(fit: Fit) -> Change:
    """A fit as a change of the tensors that hold its projection."""
    solution, projection = fit.solution.cpu(), fit.projection.alone()
    return lambda name, array: projection.changed(name, torch.from_numpy(array), solution).numpy()


def fit_width(
    plan: WidthPlan, model: nn.Module, data: Calibration, score: str, again: Callable[[], nn.Module]
) -> WidthCut:
    """`fit_once` with each share of the incoming error in `MADE_UP_WIDTH`: the lower loss on held-out rows decides.

    How much of the errors before it a refit should make up for depends on how much is lost: all, where that is much,
    else less. `again` loads the uncut model anew: `model` gives its memory back before. What isn't refitted is cut
    once.
    """
    cut = fit_once(plan, model, data, score, MADE_UP_WIDTH[0])
    for made_up in MADE_UP_WIDTH[1:] if refits(plan) else ():
        model.to("meta")
        model = again()
        cut = min(cut, fit_once(plan, model, data, score, made_up), key=lambda each: each.metrics["held_out_loss"])
    return cut


@torch.no_grad()
def fit_once(
    plan: WidthPlan,
    model: nn.Module,
    data: Calibration,
    score: str,
    made_up: float = 1.0,
    quiet: bool | None = None,
) -> WidthCut:
    """Choose what stays by `score` on calibration data, and refit the projections that read it.

    Neurons have no attention distributions: by entropy or variance of heads, they are scored by activation. `model` is
    the uncut one; it isn't fit for use afterwards. `made_up` is the share of the error that comes into a layer that its
    refits make up for: all of it asks much of what is left, less of it lets errors add up. Metrics are the loss on the
    held-out rows, `held_out_loss_uncut` and `held_out_loss`; none for encoders, which predict no next token. Families
    with norms behind their projections are cut and not refitted. Raises PruneKitError for scores that aren't finite, or
    that an encoder can't have.
    """
    family, row = plan.source.family, plan.source.family.text
    of_text = heads(plan.source)
    if plan.across and score != "taylor":
        raise PruneKitError("--across-layers: only scores of --score taylor can be compared between layers")
    if score == "taylor" and not family.causal:
        raise PruneKitError(f"--score taylor: needs labels, {family.model_type} has none here; choose another")
    if score in ("entropy", "variance"):
        model.set_attn_implementation("eager")
    batches = [*data.fit, *data.held_out]
    judged = range(len(data.fit), len(batches))
    owner, attribute = find_stack(model, row)
    layers = [LayerParts(layer, row, of_text) for layer in getattr(owner, attribute)]
    losses: dict[str, float] = {}
    if family.causal:
        losses["held_out_loss_uncut"] = score_batches(model, data.held_out)["loss"]
    known: dict[int, Scores] = {}
    if score == "magnitude":
        known = magnitudes(plan.source, quiet)
    elif score == "taylor":
        known = taylor(model, row, layers, data.fit, quiet)
    chosen = keep_all(plan, known) if plan.across else {}
    sides = Sides(model, family, "text", batches, judged, record_calls(model, row, batches))
    student = Student(sides, batches)
    refitted = refits(plan)
    scores: dict[int, Scores] = {}
    changes: dict[str, list[Change]] = {}

    def refit(number: int, name: str, targets: list[torch.Tensor], behind_attention: bool) -> None:
        fit = sides.fit(number, (name,), targets, behind_attention)
        if fit.left < fit.before:
            fit.apply()
            for tensor in row.tensors_of(plan.source.tensors, number, name):
                changes.setdefault(tensor, []).append(as_change(fit))

    with contextlib.ExitStack() as gates, tqdm(total=len(layers), desc="narrow", disable=quiet) as progress:
        for number, layer in enumerate(layers):
            if refitted:
                for side in (sides.teacher, sides.student):
                    side.step(number)
                entered = list(sides.teacher.states), list(sides.student.states)
                between, behind = sides.targets_between(number)
            each = known.get(number, Scores())
            if plan.heads and layer.attends:
                if each.heads is None:
                    each = replace(each, heads=head_scores(layer, student, number, score))
                _check_finite(plan, number, each.heads)
                kept = chosen[number].heads if chosen else keep_heads(each.heads, of_text.kv, plan.heads)[0]
                gates.enter_context(gate_heads(layer, kept or []))
                if refitted:
                    refit(number, layer.o.name, _reachable(between, *entered, made_up), behind_attention=True)
            if plan.neurons:
                if each.neurons is None:
                    each = replace(each, neurons=neuron_scores(layer, student, number))
                _check_finite(plan, number, each.neurons)
                stay = chosen[number].neurons if chosen else keep_neurons(each.neurons, plan)
                if hook := gate_neurons(layer, stay or []):
                    gates.enter_context(hook)
            scores[number] = each
            if refitted:
                with states_between(sides.layers[number], row) as own:
                    sides.student.step(number + 1, keep=False)
                refit(number, row.mlp[-1], _reachable(behind, between, own, made_up), behind_attention=False)
            progress.update()
        if family.causal:
            losses["held_out_loss"] = score_batches(model, data.held_out)["loss"]
    settings = calibrated_on(data) | ({"made_up": made_up} if refitted else {})
    return replace(choose(plan, score, scores, changes), settings=settings, metrics=losses)


def _check_finite(plan: WidthPlan, number: int, values: np.ndarray) -> None:
    if not math.isfinite(float(np.abs(values).sum())):
        raise PruneKitError(f"{plan.source.path}: layer {number} has scores that are not finite; try --dtype float32")
