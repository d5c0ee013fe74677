"""Heal the seams of removed layers: refit what the layers around them write, so that less is missing behind them.

Where layers were removed, the layer before them hands its state on to a layer that used to get another one. Ridge
least squares on calibration activations says how that layer has to write its output so that what is handed on comes
nearest to the uncut model's state there; then the layers behind the seam are refitted to the uncut model's states in
the same way, each on what the refitted ones before it give. All is folded into output projections: shapes stay as
they are, and inference pays nothing. (A linear map in place of the removed layers, folded into the MLP before them, is
the idea of ReplaceMe, 2505.02819. Refitting the projections themselves has more freedom at the same price.)
"""

import contextlib
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from prunekit.checkpoint import Checkpoint, Tensor, float_bytes
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import Stack
from prunekit.model.replay import Replay, Store, find_stack, in_memory, record_calls
from prunekit.model.scores import score_batches

from .in_memory import removed
from .layers import Removal, check_healable, find_seams

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # times the mean of the normal matrix's diagonal
UNLABELLED = 0.1  # weight of text tokens that predict no label (prompt, image): what they carry counts only indirectly


class LeastSquares:
    """Weighted normal equations of y = D x, gathered batch by batch. x: (n, inputs), y: (n, outputs)."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        weighted = x * weight[:, None]
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += float((y.square().sum(1) * weight).sum())

    def solve(self, ridge: float) -> torch.Tensor:
        """D (outputs, inputs), drawn toward 0 by `ridge` times the mean of the diagonal."""
        matrix = self.xx.clone()
        matrix.diagonal().add_(ridge * self.xx.diagonal().mean())
        return torch.linalg.solve(matrix, self.xy).T

    def left(self, solution: torch.Tensor) -> float:
        """Share of y's weighted sum of squares that a solution leaves: 1 for D = 0."""
        rest = self.yy - 2 * (solution.T * self.xy).sum() + ((solution @ self.xx) * solution).sum()
        return float(rest) / self.yy if self.yy else 1.0


class Projection:
    """What a layer's attention or MLP writes into the residual stream, linear in features that are captured.

    The features are the projection's inputs (and 1 for its bias). For a mixture of experts they are the MLP's output,
    and the fitted map goes into every expert's projection.
    """

    def __init__(self, layer: nn.Module, name: str):
        self.name = name
        block, _, linear = name.rpartition(".")
        parent = layer.get_submodule(block)
        self.experts = None if hasattr(parent, linear) else parent.experts
        self.module = parent if self.experts is not None else getattr(parent, linear)
        self.bias = self.experts is None and self.module.bias is not None
        self.inputs_first = isinstance(self.module, Conv1D)
        self.parameters = (
            dict(self.module.named_parameters()) if self.experts is None else {linear: getattr(self.experts, linear)}
        )

    def features(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(tokens, inputs [+ 1]) in fp32."""
        x = (inputs if self.experts is None else output).flatten(0, -2).float()
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x

    def changed(self, name: str, value: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
        """A parameter after the fit, in fp32. `name` ends in bias for the bias; experts come one by one or stacked."""
        value = value.float()
        if self.experts is not None:  # ([experts,] hidden, width), or (experts, width, hidden) in some releases
            by_rows = value.shape[-2] == len(solution)
            return value + (solution @ value if by_rows else value @ solution.T)
        if name.endswith("bias"):
            return value + solution[:, -1]
        change = solution[:, :-1] if self.bias else solution
        return value + (change.T if self.inputs_first else change)

    def alone(self) -> "Projection":
        """What `changed` needs, without holding the model."""
        other = copy(self)
        other.module, other.parameters, other.experts = None, {}, None if self.experts is None else True
        return other

    def pattern(self) -> str:
        """Regex of the checkpoint's names for its parameters, relative to the layer."""
        block, _, linear = self.name.rpartition(".")
        experts = r"experts\.(?:\d+\.)?" if self.experts is not None else ""
        return rf"{re.escape(block)}\.{experts}{linear}(?:\.weight|\.bias)?"


@dataclass(frozen=True)
class Fit:
    projection: Projection
    solution: torch.Tensor  # (outputs, inputs [+ 1]): what to add to the projection
    ridge: float
    before: float  # weighted squares that were missing on the rows that judge
    left: float  # and that still are

    def apply(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Change the model; returns the parameters with their values before."""
        undo = [(parameter, parameter.clone()) for parameter in self.projection.parameters.values()]
        for name, parameter in self.projection.parameters.items():
            parameter.copy_(self.projection.changed(name, parameter, self.solution))
        return undo


@dataclass(frozen=True)
class Refit:
    """A layer's refit, as it is in the model now."""

    changes: list[Fit]
    undo: list[tuple[nn.Parameter, torch.Tensor]]  # parameters and their values before
    ridge: float
    jump_left: float  # share of what was missing before the refit, on the rows that judge

    def take_back(self) -> None:
        for parameter, value in reversed(self.undo):
            parameter.copy_(value)


@contextlib.contextmanager
def states_between(layer: nn.Module, row: Stack, store: Store = in_memory) -> Iterator[list[torch.Tensor]]:
    """Within the block every run of the layer appends its state between attention and MLP."""
    states: list[torch.Tensor] = []

    def written(module, inputs, output):
        states.append(store(entered + output))

    def enter(module, inputs):
        nonlocal entered
        entered = inputs[0]

    entered = torch.empty(0)
    with (
        layer.register_forward_pre_hook(enter),
        layer.get_submodule(row.o).register_forward_hook(written),
    ):
        yield states


class Sides:
    """The uncut stack (teacher) and the cut one (student), advanced side by side over all rows."""

    def __init__(
        self,
        plan: Removal,
        model: nn.Module,
        stack: str,
        batches: list[dict],
        judged: range,
        calls: list,
        store: Store = in_memory,
    ):
        self.plan, self.model, self.stack, self.batches, self.judged = plan, model, stack, batches, judged
        self.store = store
        self.row = plan.source.family.stacks[stack]
        owner, attribute = find_stack(model, self.row)
        self.layers = getattr(owner, attribute)
        self.kept = [i for i in range(len(self.layers)) if i not in plan.removed[stack]]
        self.teacher = Replay(model, self.row, calls, store)
        with removed(model, plan):
            self.student = Replay(model, self.row, record_calls(model, self.row, batches), store)

    def targets(self, layer: int) -> list[torch.Tensor]:
        """The uncut model's state where the student's `layer` hands its own on, per batch."""
        states: list[torch.Tensor] = []
        self.teacher.step(
            min((i for i in self.kept if i > layer), default=len(self.layers)),
            lambda _, state: states.append(self.store(state)),
        )
        return states

    def targets_between(self, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The uncut model's states between attention and MLP of a layer, and behind it, per batch."""
        self.teacher.step(layer)
        with states_between(self.layers[layer], self.row, self.store) as between:
            return between, self.targets(layer)

    def weight(self, index: int, target: torch.Tensor) -> torch.Tensor:
        """How much each token of batch `index` counts in a fit, (tokens,). target: the state that is wanted."""
        # A few tokens have states a thousand times larger (2402.17762): unweighted, they would decide alone.
        weight = 1 / target.flatten(0, -2).float().square().sum(1).clamp_min(1e-12)
        if self.stack == "text":
            labels = nn.functional.pad(self.batches[index]["labels"][:, 1:], (0, 1), value=-100)
            counts = torch.where(labels != -100, 1.0, UNLABELLED) * self.batches[index]["attention_mask"]
            weight = weight * counts.to(weight.device).flatten()
        return weight

    def without(self, plan: Removal) -> "Sides":
        """These sides for a cut of the same stack that is the same up to where they are."""
        other = copy(self)
        other.plan = plan
        other.kept = [i for i in range(len(self.layers)) if i not in plan.removed[self.stack]]
        return other

    def refit(self, layer: int, targets: list[torch.Tensor]) -> "Refit":
        """Fit the layer's attention and MLP together, then the MLP on what it gets; in the model, where it helps."""
        names, jump, changes = (self.row.o, self.row.mlp[-1]), None, []
        undo: list[tuple[nn.Parameter, torch.Tensor]] = []
        for wanted in (names, names[1:]):
            fit = self.fit(layer, wanted, targets)
            jump = jump or fit.before
            if fit.left >= fit.before:
                continue
            undo += fit.apply()
            changes.append(fit)
        return Refit(changes, undo, fit.ridge, min(fit.left, fit.before) / jump if jump else 1.0)

    def fit(
        self, layer: int, names: tuple[str, ...], targets: list[torch.Tensor], behind_attention: bool = False
    ) -> Fit:
        """Fit the first of these projections of a layer to the targets, in view of what the others could do.

        Targets are states behind the layer, or those between its attention and its MLP. The ridge is the one that leaves
        least on the rows that judge.
        """
        projections = [Projection(self.layers[layer], name) for name in names]
        fit, judge = LeastSquares(), LeastSquares()
        features: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}

        def gather(index: int, state: torch.Tensor) -> None:
            target = targets[index].to(state.device).flatten(0, -2).float()
            state = between.pop() if behind_attention else state
            weight = self.weight(index, target)
            for (
                name,
                x,
            ) in features.items():  # one ridge is right for all only if their inputs are alike in size
                scales.setdefault(name, x.square().mean().sqrt().clamp_min(1e-12))
            x = torch.cat([features[name] / scales[name] for name in names], 1)
            (judge if index in self.judged else fit).add(x, target - state.flatten(0, -2).float(), weight)

        def capture(projection, _, inputs, output):
            features[projection.name] = projection.features(inputs[0], output)

        with removed(self.model, self.plan), contextlib.ExitStack() as hooks:
            for projection in projections:
                hook = projection.module.register_forward_hook(partial(capture, projection))
                hooks.enter_context(hook)
            between = hooks.enter_context(states_between(self.layers[layer], self.row))
            self.student.step(self.kept.index(layer))
            self.student.step(self.kept.index(layer) + 1, gather, keep=False)
        solutions = [(ridge, fit.solve(ridge)) for ridge in RIDGES]
        ridge, solution = min(solutions, key=lambda pair: judge.left(pair[1]))
        width = features[names[0]].shape[1]
        first = solution[:, :width] / scales[names[0]]
        return Fit(projections[0], first, ridge, judge.yy, judge.left(solution) * judge.yy)


@torch.inference_mode()
def heal(plan: Removal, model: nn.Module, data: Calibration, quiet: bool | None = None) -> tuple[Removal, list[dict]]:
    """Refit the layer before each seam, then the layers behind it up to the next one.

    `model` is the uncut model; it ends up with the refitted weights. Ridges are chosen on the held-out rows, and what
    doesn't lower the model's loss there is left as it was. Returns the plan with the refitted tensors, and a record
    per seam: `stack`, `layer` (the one before it), `removed`, `refitted` (layers, numbered as in the input), `ridge`,
    `jump_left` (share of the jump in the state that the layer before leaves, held out), held-out `loss_before` and
    `loss_after`. Memory: three states per token, and the normal matrix of one layer. Raises as `check_healable`.
    """
    check_healable(plan)
    family, seams = plan.source.family, find_seams(plan)
    batches = [*data.fit, *data.held_out]
    judged = range(len(data.fit), len(batches))
    calls = {stack: record_calls(model, family.stacks[stack], batches) for stack in {s.stack for s in seams}}
    if not all(calls.values()):
        raise PruneKitError("no row to heal on has an image: vision blocks need some (--calib)")

    def held_out_loss() -> float:
        with removed(model, plan):
            return score_batches(model, data.held_out)["loss"]

    loss, records, computed, sides = held_out_loss(), [], {}, None
    with tqdm(total=sum(1 + len(seam.behind) for seam in seams), desc="heal", disable=quiet) as progress:
        for seam in seams:
            if sides is None or sides.stack != seam.stack:
                sides = Sides(plan, model, seam.stack, batches, judged, calls.pop(seam.stack))
            record = {"stack": seam.stack, "layer": seam.before, "removed": list(seam.gone), "refitted": []}
            record |= {"ridge": None, "jump_left": 1.0, "loss_before": loss}
            for layers in filter(None, ((seam.before,), seam.behind)):
                before, refits, changed = copy(sides.student), [], {}
                before.states, before.added = list(before.states), list(before.added)
                for layer in layers:
                    refit = sides.refit(layer, sides.targets(layer))
                    refits.append(refit)
                    for fit in refit.changes:
                        changed |= changed_tensors(plan.result, sides.row, sides.kept.index(layer), fit)
                    if layer == seam.before:
                        record |= {"ridge": refit.ridge, "jump_left": refit.jump_left}
                    progress.update()
                new_loss = held_out_loss() if changed else loss
                if new_loss < loss:
                    loss = new_loss
                    computed |= changed
                    record["refitted"] += layers
                else:
                    for refit in reversed(refits):
                        refit.take_back()
                    sides.student = before
                progress.set_postfix_str(f"loss {loss:.4f}")
            records.append(record | {"loss_after": loss})
    result = replace(plan.result, tensors=plan.result.tensors | computed)
    return replace(plan, result=result), records


def changed_tensors(result: Checkpoint, row: Stack, number: int, fit: Fit) -> dict[str, Tensor]:
    """The checkpoint's tensors of a projection, to be computed from the checkpoint's own values when they are written."""
    pattern = rf"{row.prefix}{number}\.{fit.projection.pattern()}"
    solution = fit.solution.cpu()

    def compute(name: str) -> memoryview:
        changed = fit.projection.changed(name, torch.from_numpy(result.read_array(name)), solution)
        return float_bytes(changed.numpy(), result.tensors[name].dtype, name)

    return {
        name: replace(tensor, compute=partial(compute, name))
        for name, tensor in result.tensors.items()
        if re.fullmatch(pattern, name)
    }
