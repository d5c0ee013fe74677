"""Merge KV heads on calibration data, layer by layer: what a layer gets comes from the merged ones before it.

Heads are merged in closed form (kv_merge.py). Then o_proj is refitted to what the original's attention writes, and on
request q, k, v, o and norms together, by a few gradient steps within the layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate.utils import recursively_apply
from torch import nn
from tqdm import tqdm

from prunekit.checkpoint import Tensor, float_bytes, heads
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import Stack
from prunekit.model.offload import bring
from prunekit.model.parts import find_mixer
from prunekit.model.replay import Replay, Store, given, in_memory, record_calls
from prunekit.model.scores import score_batches

from .cut import calibrated_on
from .kv import KVCut, KVPlan, check_refinable
from .kv_math import turned
from .kv_merge import Attention, gather, merge_layer, put_parameters
from .sides import MADE_UP_KV, Sides

# Length matters where gains are uneven within pairs; where they are even, keys that fit badly do harm by fitted ones.
GAINS = (True, False)  # with norms: both are tried, layer by layer
SLOW = 1.0  # radians: pairs that RoPE turns by no more between a row's ends are treated as not turned at all


def loss_behind(replay: Replay, model: nn.Module, batches: dict[int, dict]) -> float:
    """The loss of a model whose layers were all run, by what is behind them. batches: by their place in the replay."""
    loss = tokens = 0.0
    for index, batch in batches.items():
        last = {replay.done - 1: replay.states[index].to(replay.device)}
        with given(replay.owner, replay.attribute, last, replay.done):
            counted = int((batch["labels"][:, 1:] != -100).sum())
            loss += score_batches(model, [batch])["loss"] * counted
            tokens += counted
    return loss / tokens


@dataclass
class Entered:
    """What a layer, its attention and its projections get in the student, per batch."""

    layer: list[torch.Tensor]
    attention: list[tuple[tuple, dict]]
    projections: list[torch.Tensor]


def enter(layer: nn.Module, attention: Attention, student: Replay, number: int) -> Entered:
    entered = Entered([], [], [])
    student.step(number)
    with (
        layer.register_forward_pre_hook(lambda _, inputs: entered.layer.append(inputs[0])),
        attention.module.register_forward_pre_hook(
            lambda _, inputs, named: entered.attention.append((inputs, named)), with_kwargs=True
        ),
        attention.q.register_forward_pre_hook(lambda _, inputs: entered.projections.append(inputs[0])),
    ):
        student.step(number + 1, keep=False)
    return entered


def original_attention(
    layer: nn.Module, row: Stack, teacher: Replay, number: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The original's states in front of layer `number`, and what its attention writes, per batch."""
    came: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    teacher.step(number)
    with (
        layer.register_forward_pre_hook(lambda _, inputs: came.append(teacher.store(inputs[0]))),
        layer.get_submodule(row.o).register_forward_hook(
            lambda _, inputs, output: written.append(teacher.store(output))
        ),
    ):
        teacher.step(number + 1)
    return came, written


def fit_output(sides: Sides, number: int, behind: list[torch.Tensor]) -> float:
    """Refit o_proj by ridge least squares, if that helps; the weighted squares that are missing then, held out.

    behind: the states wanted behind attention, per batch.
    """
    fit = sides.fit(number, (sides.row.o,), behind, behind_attention=True)
    if fit.left < fit.before:
        fit.apply()
    return min(fit.left, fit.before)


def refine(
    attention: Attention,
    sides: Sides,
    entered: Entered,
    wanted: Sequence[torch.Tensor],
    steps: int,
    rate: float = 0.02,
) -> tuple[float, float]:
    """Fit a layer's q, k, v, o and norms to what the original's attention writes, by Adam, the layer alone.

    entered: what the layer gets from the merged ones before it. wanted: what the original's attention writes. Both per
    batch; one batch a step, the learning rate is a share of each parameter's root mean square and falls as a cosine.
    Computes in the model's dtype, the parameters meanwhile in fp32. Returns the share of the weighted squares of what
    is wanted that is missing on the rows that judge, before and after; what makes it larger is left as it was.
    """
    start = attention.parameters()
    dtype, device = attention.o.weight.dtype, attention.o.weight.device
    fit = [index for index in range(len(wanted)) if index not in sides.judged]

    def missing(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted squares that are missing, those of what is wanted)"""
        # Clones: what was computed in inference mode can't take part in a backward pass
        inputs, named = recursively_apply(torch.clone, entered.attention[index])
        target = wanted[index].to(device)
        weight = sides.weight(index, entered.layer[index] + target)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            written = attention.module(*inputs, **named)[0]
        target = target.flatten(0, -2).float()
        rest = (target - written.flatten(0, -2).float()).square().sum(1)
        return rest @ weight, target.square().sum(1) @ weight

    def judge() -> float:
        sums = [torch.stack(missing(index)) for index in sides.judged]
        rest, all_of_it = torch.stack(sums).sum(0).tolist()
        return rest / max(all_of_it, 1e-30)

    before = judge()
    # Copies: in fp32 a step would otherwise change what is put back where it made things worse
    copies = [(m, n, p.to(torch.float32, copy=True)) for m, n, p in start]
    put_parameters([(m, n, nn.Parameter(p, requires_grad=True)) for m, n, p in copies])
    try:
        groups = [
            {"params": [p], "lr": rate * float(p.detach().square().mean().sqrt().clamp_min(1e-6))}
            for _, _, p in attention.parameters()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            with torch.enable_grad():
                rest, all_of_it = missing(fit[step % len(fit)])
                (rest / all_of_it).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    finally:
        put_parameters(
            [(m, n, nn.Parameter(p.detach().to(dtype), requires_grad=False)) for m, n, p in attention.parameters()]
        )
    after = judge()
    if not after < before:
        put_parameters(start)
    return before, min(before, after)


@torch.no_grad()
def fit_kv(
    plan: KVPlan,
    model: nn.Module,
    data: Calibration,
    refine_steps: int = 0,
    store: Store = in_memory,
    quiet: bool | None = None,
) -> KVCut:
    """Merge the KV heads of `model`; the cut writes what it then has.

    `model` is the unmerged one. In memory, it ends up merged; layers that accelerate keeps on disk are loaded one after
    the other, and are gone when they are done. `refine_steps`: of Adam, a layer. `store` says where states and what is
    to be written are kept. Metrics are the loss on the held-out rows, `held_out_loss_unmerged` and `held_out_loss`.
    Memory: one layer and some square matrices of its size, and six states per token if they aren't stored on disk.
    PruneKitError for activations that aren't finite, fewer tokens than dimensions, or refining a family that has norms
    behind its projections.
    """
    if refine_steps:
        check_refinable(plan)
    family, row = plan.source.family, plan.source.family.text
    of_text = heads(plan.source)
    batches = [*data.fit, *data.held_out]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data.fit)
    needed = of_text.kv // plan.kv_heads * of_text.dim
    if tokens < needed:
        raise PruneKitError(
            f"{tokens} calibration tokens to fit {needed} dimensions of a group of heads: give more rows or raise "
            f"--calib-tokens"
        )
    judged = range(len(data.fit), len(batches))
    sides = Sides(model, family, "text", batches, judged, record_calls(model, row, batches), store)
    masks = [batch["attention_mask"].to(model.device).bool() for batch in data.fit]
    tensors = {name: tensor for name, tensor in plan.source.tensors.items() if name in plan.outline.tensors}
    with tqdm(total=len(sides.layers), desc="merge", disable=quiet) as progress:
        for number, layer in enumerate(sides.layers):
            on_disk = bring(layer)
            if find_mixer(layer, row) != row.o:  # linear attention, which has no KV heads
                sides.teacher.step(number + 1)
                sides.student.step(number + 1)
                if on_disk:
                    layer.to("meta")
                progress.update()
                continue
            attention = Attention(layer, row, of_text)
            came, wanted = original_attention(layer, row, sides.teacher, number)
            entered = enter(layer, attention, sides.student, number)
            wanted = [
                store(y.to(e.device) + MADE_UP_KV * (x.to(e.device) - e))
                for x, y, e in zip(came, wanted, entered.layer)
            ]
            turns = [turned(*named["position_embeddings"]) for _, named in entered.attention]
            turn = torch.stack(turns).amax(0)
            attention.rotated = 2 * len(turn)
            slow = nn.functional.pad(turn, (0, of_text.dim // 2 - len(turn))) <= SLOW
            moments = gather(attention, entered.projections, masks, slow)
            fitted = [x[mask] for x, mask in zip(entered.projections, masks)]
            if not moments.finite():
                raise PruneKitError(
                    f"{plan.source.path}: layer {number} has activations that are not finite; try --dtype float32"
                )
            behind = [store(x + y.to(x.device)) for x, y in zip(entered.layer, wanted)]
            before = attention.parameters()
            best = (math.inf, before)
            for fit_gains in GAINS if attention.norms and row.plain_residual else GAINS[:1]:
                put_parameters(before)
                merge_layer(attention, plan.kv_heads, moments, fitted, fit_gains)
                missing = fit_output(sides, number, behind) if row.plain_residual else 0.0
                if missing < best[0]:
                    best = (missing, attention.parameters())
            put_parameters(best[1])
            if refine_steps:
                refine(attention, sides, entered, wanted, refine_steps)
            sides.student.step(number + 1)
            for name, module in attention.modules.items():
                tensors |= _written(tensors, row.tensors_of(tensors, number, name), module, store)
            if on_disk:
                layer.to("meta")
            progress.update()
    for part in (model.config, model.config.get_text_config()):
        if family.kv_heads and hasattr(part, family.kv_heads):
            setattr(part, family.kv_heads, plan.kv_heads)
    held_out = dict(zip(judged, data.held_out))
    losses = {
        "held_out_loss_unmerged": loss_behind(sides.teacher, model, held_out),
        "held_out_loss": loss_behind(sides.student, model, held_out),
    }
    settings = calibrated_on(data) | {
        "longest_row": max(int(batch["attention_mask"].sum(1).max()) for batch in data.fit),
        "refine_steps": refine_steps,
        "repeat": data.repeat,
    }
    return KVCut(plan, replace(plan.source, config=plan.outline.config, tensors=tensors), settings, losses)


def _written(tensors: dict[str, Tensor], names: dict[str, str], module: nn.Module, store: Store) -> dict[str, Tensor]:
    """A module's tensors, with the values it has in memory. names: theirs, each weight or bias."""

    def compute(value: torch.Tensor, dtype: str, name: str) -> memoryview:
        return float_bytes(value.float().numpy(), dtype, name)

    values = {name: store(value.detach().cpu()) for name, value in module.named_parameters(recurse=False)}
    return {
        name: replace(
            tensors[name],
            shape=tuple(values[kind].shape),
            compute=partial(compute, values[kind], tensors[name].dtype, name),
        )
        for name, kind in names.items()
    }
