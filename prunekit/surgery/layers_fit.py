"""Heal the seams of removed layers: refit what the layers around them write, so that less is missing behind them.

Where layers were removed, the layer before them hands its state on to a layer that used to get another one. Ridge
least squares on calibration activations says how that layer has to write its output so that what is handed on comes
nearest to the uncut model's state there; then the layers behind the seam are refitted to the uncut model's states in
the same way, each on what the refitted ones before it give. All is folded into output projections: shapes stay as
they are, and inference pays nothing. (A linear map in place of the removed layers, folded into the MLP before them, is
the idea of ReplaceMe, 2505.02819. Refitting the projections themselves has more freedom at the same price.)
"""

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prunekit.checkpoint import Checkpoint, Tensor, float_bytes
from prunekit.data.batches import Calibration
from prunekit.families import Stack
from prunekit.model.scores import loss_by_row

from .cut import calibrated_on
from .in_memory import removed
from .layers import LayersCut, LayersPlan, check_healable, find_seams
from .sides import Fit, Sides, reached


@torch.inference_mode()
def fit_layers(
    plan: LayersPlan, model: nn.Module, data: Calibration, quiet: bool | None = None, behind: bool = True
) -> LayersCut:
    """Refit the layer before each seam, then with `behind` the layers behind it up to the next one.

    `model` is the uncut model; it ends up with the refitted weights. Ridges are chosen on the held-out rows, whose loss
    says what is kept: the refit before a seam unless it raises that clearly, those behind it only if they lower it (a
    few dozen labels can't tell that the first helps, which it nearly always does). The cut has a record per seam:
    `stack`, `layer` (the one before it), `removed`, `refitted` (layers, numbered as in the input), `ridge`, `jump_left`
    (share of the jump in the state that the layer before leaves, held out), held-out `loss_before` and `loss_after`.
    Memory: three states per token, and the normal matrix of one layer. Raises as `check_healable` and `reached`.
    """
    check_healable(plan)
    family = plan.source.family
    seams = [seam if behind else replace(seam, behind=()) for seam in find_seams(plan)]
    rows = {stack: reached(model, family, stack, data.fit, data.held_out) for stack in {s.stack for s in seams}}

    def held_out_losses() -> torch.Tensor:
        with removed(model, plan):
            return loss_by_row(model, data.held_out)

    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data.held_out)
    losses, sides = held_out_losses(), None

    def mean_loss() -> float:
        return float(losses.sum()) / labels

    records: list[dict[str, Any]] = []
    computed: dict[str, Tensor] = {}
    with tqdm(total=sum(1 + len(seam.behind) for seam in seams), desc="heal", disable=quiet) as progress:
        for seam in seams:
            if sides is None or sides.stack != seam.stack:
                sides = Sides(model, family, seam.stack, *rows.pop(seam.stack), plan=plan)
            record: dict[str, Any] = {
                "stack": seam.stack,
                "layer": seam.before,
                "removed": list(seam.gone),
                "refitted": [],
            }
            record |= {"ridge": None, "jump_left": 1.0, "loss_before": mean_loss()}
            for layers in filter(None, ((seam.before,), seam.behind)):
                before, refits = copy(sides.student), []
                changed: dict[str, Tensor] = {}
                before.states, before.added = list(before.states), list(before.added)
                for layer in layers:
                    refit = sides.refit(layer, sides.targets(layer))
                    refits.append(refit)
                    for fit in refit.changes:
                        changed |= changed_tensors(plan.result, sides.row, sides.kept.index(layer), fit)
                    if layer == seam.before:
                        record |= {"ridge": refit.ridge, "jump_left": refit.jump_left}
                    progress.update()
                now = held_out_losses() if changed else losses
                worse = now - losses
                if float(worse.sum()) < (_error_of_sum(worse) if layers == (seam.before,) else 0):
                    losses = now
                    computed |= changed
                    record["refitted"] += layers
                else:
                    for refit in reversed(refits):
                        refit.take_back()
                    sides.student = before
                progress.set_postfix_str(f"loss {mean_loss():.4f}")
            records.append(record | {"loss_after": mean_loss()})
    result = replace(plan.result, tensors=plan.result.tensors | computed)
    return LayersCut(plan, result, records, calibrated_on(data, "heal"))


def _error_of_sum(differences: torch.Tensor) -> float:
    """Standard error of the sum of rows' differences (rows,)."""
    return float(differences.std()) * len(differences) ** 0.5 if len(differences) > 1 else 0.0


def changed_tensors(result: Checkpoint, row: Stack, number: int, fit: Fit) -> dict[str, Tensor]:
    """The checkpoint's tensors of a projection, to be computed from the checkpoint's own values on writing."""
    solution = fit.solution.cpu()

    def compute(name: str) -> memoryview:
        changed = fit.projection.changed(name, torch.from_numpy(result.read_array(name)), solution)
        return float_bytes(changed.numpy(), result.tensors[name].dtype, name)

    names = row.tensors_of(result.tensors, number, fit.projection.name)
    return {name: replace(result.tensors[name], compute=partial(compute, name)) for name in names}
