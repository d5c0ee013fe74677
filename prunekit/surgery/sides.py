"""The uncut stack and the cut one, advanced side by side over calibration rows: what all refits stand on.

A projection is refitted by weighted ridge least squares, so that a layer of the cut stack (the student) hands on what
comes nearest to the uncut one's (the teacher's) state there. All is folded into output projections: shapes stay.
"""

import contextlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from prunekit.errors import PruneKitError
from prunekit.families import Family, Stack
from prunekit.model.parts import Experts, Linear, find_mixer, find_part
from prunekit.model.replay import Replay, Store, find_stack, in_memory, record_calls

from .in_memory import removed
from .layers import LayersPlan

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # times the mean of the normal matrix's diagonal
# Share of the error that comes into a layer for which its refit makes up: all asks too much of what is left there, none
# lets errors add up. In narrower layers all pays where much is lost, and a quarter where little is: both are tried.
MADE_UP_KV, MADE_UP_WIDTH, MADE_UP_ZEROS = 0.5, (1.0, 0.25), 0.25
UNLABELLED = 0.1  # weight of text tokens that predict no label (prompt, image): what they carry counts only indirectly


def reached(
    model: nn.Module, family: Family, stack: str, fit: Sequence[dict], held_out: Sequence[dict]
) -> tuple[list[dict], range, list[tuple[tuple, dict]]]:
    """The batches that reach a stack, which of them only judge, and its calls: texts alone don't reach a vision tower.

    Raises PruneKitError if there are none to fit on, or none to judge.
    """
    row = family.stacks[stack]
    parts = [
        [(batch, call) for batch in part for call in record_calls(model, row, [batch])] for part in (fit, held_out)
    ]
    if not all(parts):
        raise PruneKitError(
            f"too few calibration rows reach the {stack} layers (have they images?); give more: --calib, --calib-tokens"
        )
    batches, calls = map(list, zip(*parts[0], *parts[1]))
    return batches, range(len(parts[0]), len(batches)), calls


class LeastSquares:
    """Weighted normal equations of y = D x, gathered batch by batch. x: (n, inputs), y: (n, outputs)."""

    def __init__(self) -> None:
        self.xx: Any = 0.0
        self.xy: Any = 0.0
        self.yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        weighted = x * weight[:, None]
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += float((y.square().sum(1) * weight).sum())

    def solve(self, ridge: float) -> torch.Tensor:
        """D (outputs, inputs), drawn toward 0 by `ridge` times the mean of the diagonal."""
        matrix = self.xx.clone()
        matrix.diagonal().add_(ridge * self.xx.diagonal().mean())
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky_ex(matrix).L).T

    def left(self, solution: torch.Tensor) -> float:
        """Share of y's weighted sum of squares that a solution leaves: 1 for D = 0."""
        rest = self.yy - 2 * (solution.T * self.xy).sum() + ((solution @ self.xx) * solution).sum()
        return float(rest) / self.yy if self.yy else 1.0


class Projection:
    """What a layer's attention or MLP writes into the residual stream, linear in features that are captured.

    The features are the projection's inputs (and 1 for its bias). For a mixture of experts they are the MLP's output,
    and the fitted map goes into every expert's projection.
    """

    def __init__(self, layer: nn.Module, row: Stack, name: str):
        self.name, part = name, find_part(layer, row, name)
        self.experts = isinstance(part, Experts)
        self.module = part.block if isinstance(part, Experts) else part.module
        self.bias = not self.experts and self.module.bias is not None
        self.inputs_first = isinstance(part, Linear) and part.inputs_first
        if isinstance(part, Experts):
            shared = {} if part.shared is None else {"shared": part.shared.mlp.down_proj.weight}
            self.parameters = {"down_proj": part.module.down_proj} | shared
        else:
            self.parameters = dict(part.module.named_parameters())

    def features(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(tokens, inputs [+ 1]) in fp32."""
        x = (output if self.experts else inputs).flatten(0, -2).float()
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x

    def changed(self, name: str, value: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
        """A parameter after the fit, in fp32. `name` ends in bias for the bias; experts come one by one or stacked."""
        value = value.float()
        if self.experts:  # ([experts,] hidden, width), or (experts, width, hidden) in some releases
            by_rows = value.shape[-2] == len(solution)
            return value + (solution @ value if by_rows else value @ solution.T)
        if name.endswith("bias"):
            return value + solution[:, -1]
        change = solution[:, :-1] if self.bias else solution
        return value + (change.T if self.inputs_first else change)

    def alone(self) -> "Projection":
        """What `changed` needs, without holding the model."""
        other = copy(self)
        other.module, other.parameters = None, {}
        return other


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
    entered = torch.empty(0)

    def written(module, inputs, output):
        states.append(store(entered + output))

    def enter(module, inputs):
        nonlocal entered
        entered = inputs[0]

    with (
        layer.register_forward_pre_hook(enter),
        layer.get_submodule(find_mixer(layer, row)).register_forward_hook(written),
    ):
        yield states


class Sides:
    """The uncut stack (teacher) and the cut one (student), advanced side by side over all rows."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        stack: str,
        batches: list[dict],
        judged: range,
        calls: list[tuple[tuple, dict]],
        store: Store = in_memory,
        plan: LayersPlan | None = None,
    ):
        """`judged`: batches that only judge. `calls`: the uncut stack's. `plan`: of layers that the student lacks."""
        self.model, self.stack, self.batches, self.judged, self.store = model, stack, batches, judged, store
        self.row = family.stacks[stack]
        owner, attribute = find_stack(model, self.row)
        self.layers = getattr(owner, attribute)
        self._lose(plan)
        self.teacher = Replay(model, self.row, calls, store)
        with self._cut():
            self.student = Replay(model, self.row, record_calls(model, self.row, batches), store)

    def _lose(self, plan: LayersPlan | None) -> None:
        gone = plan.removed[self.stack] if plan else []
        self.plan, self.kept = plan, [i for i in range(len(self.layers)) if i not in gone]

    def _cut(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model lacks the student's missing layers."""
        return removed(self.model, self.plan) if self.plan else contextlib.nullcontext()

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

    def without(self, plan: LayersPlan) -> "Sides":
        """These sides for a cut of the same stack that is the same up to where they are."""
        other = copy(self)
        other._lose(plan)
        return other

    def refit(self, layer: int, targets: list[torch.Tensor]) -> "Refit":
        """Fit the layer's attention and MLP together, then the MLP on what it gets; in the model, where it helps."""
        names = (find_mixer(self.layers[layer], self.row), self.row.mlp[-1])
        jump: float | None = None
        changes: list[Fit] = []
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

        Targets are states behind the layer, or those between its attention and its MLP. The ridge is the one that
        leaves least on the rows that judge.
        """
        projections = [Projection(self.layers[layer], self.row, name) for name in names]
        fit, judge = LeastSquares(), LeastSquares()
        features: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}

        def gather(index: int, state: torch.Tensor) -> None:
            target = targets[index].to(state.device).flatten(0, -2).float()
            state = between.pop() if behind_attention else state
            weight = self.weight(index, target)
            # One ridge is right for all only if their inputs are alike in size
            for name, x in features.items():
                scales.setdefault(name, x.square().mean().sqrt().clamp_min(1e-12))
            x = torch.cat([features[name] / scales[name] for name in names], 1)
            (judge if index in self.judged else fit).add(x, target - state.flatten(0, -2).float(), weight)

        def capture(projection, _, inputs, output):
            features[projection.name] = projection.features(inputs[0], output)

        with self._cut(), contextlib.ExitStack() as hooks:
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
