"""Merge KV heads so that attention stays nearly what it was: closed forms on calibration activations, layer by layer.

V has neither RoPE nor a norm: a group shares the basis that keeps most of what o_proj reads of its values, and the way
back is folded into o_proj. Of K, rotations and scalings of the pairs that RoPE rotates commute with RoPE: a group
shares one combination of its keys per frequency, and the way back is folded into q_proj. Pairs that hardly turn over
the rows share a basis as values do, whatever pair and head their content comes from. Where q and k have a norm behind
their projections (Qwen3), the fold has the right direction, and the norm's gains can be fitted to give it its length.
Then o_proj is refitted to what the original's attention writes, and on request q, k, v, o and norms together, by a few
gradient steps within the layer; what a layer gets comes from the merged ones before it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from tqdm import tqdm

from prunekit.checkpoint import Heads, Tensor, float_bytes, heads
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import Stack
from prunekit.model.offload import bring
from prunekit.model.parts import LayerParts
from prunekit.model.replay import Replay, Store, given, in_memory, record_calls
from prunekit.model.scores import score_batches

from .cut import calibrated_on
from .kv import KVCut, KVPlan
from .kv_math import as_pairs, choose_groups, rotation, shared_basis, shared_keys, turned
from .sides import MADE_UP_KV, Sides

RIDGE = 0.1  # of the fit of a norm's gains, times the mean of the normal matrix's diagonal
# Length matters where gains are uneven within pairs; where they are even, keys that fit badly do harm by fitted ones.
GAINS = (True, False)  # with norms: both are tried, layer by layer
SLOW = 1.0  # radians: pairs that RoPE turns by no more between a row's ends are treated as not turned at all
LEAST_GAIN = 1e-3  # of what is read of the slow pairs, for them to share a basis: per frequency RoPE is kept exactly


class Attention:
    """The parts of a layer's attention that merging changes. Weights are in fp64, biases as their last column."""

    def __init__(self, layer: nn.Module, row: Stack, heads: Heads):
        parts = LayerParts(layer, row, heads)
        self.module, self.norms = parts.attention, list(parts.norms.values())
        self.modules = {part.name: part.module for part in (parts.q, parts.k, parts.v, parts.o)} | parts.norms
        self.q, self.k, self.v, self.o = list(self.modules.values())[:4]
        self.kv_heads, self.head_dim = heads.kv, heads.dim

    def parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        return [(m, name, p) for m in self.modules.values() for name, p in m.named_parameters(recurse=False)]

    def heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) of inputs (tokens, hidden)."""
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def queries_and_keys(self, x: torch.Tensor) -> list[torch.Tensor]:
        """q and k as RoPE gets them."""
        both = [self.heads(self.q, x), self.heads(self.k, x)]
        if self.norms:
            both = [norm(z) for norm, z in zip(self.norms, both)]
        return [z.double() for z in both]


def weight_of(linear: nn.Linear) -> torch.Tensor:
    bias = [] if linear.bias is None else [linear.bias[:, None]]
    return torch.cat([linear.weight, *bias], 1).double()


def put_weight(linear: nn.Module, value: torch.Tensor) -> None:
    """Give a Linear (or norm) a weight (and bias) of any shape, as new parameters: the old ones stay as they are."""
    with torch.inference_mode(False):
        value = value.to(linear.weight.dtype, copy=True)
        weight, bias = (value, None) if getattr(linear, "bias", None) is None else (value[:, :-1], value[:, -1])
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = weight.shape


def put_parameters(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in parameters:
        setattr(module, name, parameter)


@dataclass
class Moments:
    """What merging needs to know of a layer's heads, of many tokens."""

    keys: torch.Tensor  # E[k k^H], (frequencies, KV heads, KV heads), complex
    queries: torch.Tensor  # E|q|^2 summed over the query heads of a KV head, (KV heads, frequencies)
    slow_pairs: torch.Tensor  # which ones RoPE hardly turns, (frequencies,), bool; `slow`: their dimensions
    slow_keys: torch.Tensor  # covariance of those within rows, (KV heads, slow, KV heads, slow)
    slow_queries: torch.Tensor  # E[q q^T] of those, summed like `queries`, (KV heads, slow, slow)
    values: torch.Tensor  # E[v v^T], (KV heads * head_dim, KV heads * head_dim)
    readers: torch.Tensor  # O^T O summed over a KV head's query heads, (KV heads, head_dim, head_dim)
    before_norm: list[torch.Tensor]  # root mean square of each head of q and of k in front of its norm

    def finite(self) -> bool:
        return all(float(z.abs().sum()) < math.inf for z in (self.keys, self.queries, self.values, self.readers))


def gather(
    attention: Attention,
    inputs: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    slow_pairs: torch.Tensor,
) -> Moments:
    """inputs: what the projections get, (rows, length, hidden) each; masks: (rows, length), false for padding.

    slow_pairs: those that RoPE hardly turns, (frequencies,), bool.
    """
    slow = slow_pairs.repeat(2).nonzero().flatten()
    keys: Any = 0
    queries: Any = 0
    values: Any = 0
    slow_keys: Any = 0
    slow_queries: Any = 0
    before: list[Any] = [0.0, 0.0]
    tokens = 0
    for rows, mask in zip(inputs, masks):
        x = rows[mask]
        q, k = attention.queries_and_keys(x)
        v = attention.v(x).double()
        pairs = as_pairs(k)
        keys = keys + torch.einsum("tnf,tmf->fnm", pairs, pairs.conj())
        queries = queries + as_pairs(q).abs().square().sum(0)
        values = values + v.T @ v
        # What all keys of a row have in common adds the same to all logits of a query, which softmax doesn't see
        row = mask.nonzero()[:, 0]
        some = k[..., slow].flatten(1)
        mean = some.new_zeros(len(rows), some.shape[1]).index_add(0, row, some)
        some = some - (mean / mask.sum(1, keepdim=True).clamp_min(1))[row]
        slow_keys = slow_keys + some.T @ some
        read = q[..., slow].unflatten(1, (attention.kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        slow_queries = slow_queries + read.mT @ read
        if attention.norms:
            both = (attention.q, attention.k)
            before = [
                total + attention.heads(linear, x).double().square().mean(2).sum(0)
                for total, linear in zip(before, both)
            ]
        tokens += len(x)
    columns = attention.o.weight.double().unflatten(1, (attention.kv_heads, -1, attention.head_dim))
    readers = torch.einsum("ohgd,ohge->hde", columns, columns)
    queries = queries.view(attention.kv_heads, -1, queries.shape[-1]).sum(1) / tokens
    norms = [(total / tokens).sqrt() for total in before] if attention.norms else []
    slow_keys = (slow_keys / tokens).unflatten(0, (attention.kv_heads, -1)).unflatten(2, (attention.kv_heads, -1))
    return Moments(
        keys / tokens, queries, slow_pairs, slow_keys, slow_queries / tokens, values / tokens, readers, norms
    )


@dataclass
class Maps:
    """Linear maps from the old heads, side by side, to the new ones."""

    groups: list[tuple[int, ...]]
    q: torch.Tensor  # (query heads * head_dim, the same): puts the query heads of a group side by side
    k: torch.Tensor  # (new KV heads * head_dim, KV heads * head_dim)
    v: torch.Tensor  # like k
    o: torch.Tensor  # from o_proj's new inputs to its old ones, like q


def plan_layer(moments: Moments, kv_heads: int, query_heads: int) -> Maps:
    """Choose the groups and what they share."""
    count, width = moments.readers.shape[:2]

    slow = moments.slow_pairs.repeat(2).nonzero().flatten()

    def share(group: tuple[int, ...]):
        """(k, q, v, o, what keys and values lose): q and k per head, (head_dim, head_dim)."""
        index, size = torch.tensor(group, device=moments.values.device), len(group)
        a, b, lost_pairs = shared_keys(moments.keys[:, index][:, :, index], moments.queries[index])
        k, q = torch.stack([rotation(c) for c in a]), torch.stack([rotation(c) for c in b.conj()])
        # A query meets half of a pair's error, whatever their phases
        lost_keys = lost_pairs[~moments.slow_pairs].sum() / 2
        if len(slow):
            block = (slice(None), slow[:, None], slow)
            keys = moments.slow_keys[index][:, :, index]
            p, r, lost = shared_basis(keys.flatten(2).flatten(0, 1), moments.slow_queries[index])
            apart = lost_pairs[moments.slow_pairs].sum() / 2
            read = torch.einsum("ndne,nde->", keys, moments.slow_queries[index])
            if apart - lost > LEAST_GAIN * read:
                # The more is read of a dimension, the slower shall be the pair that it goes to
                slowest_last = torch.arange(len(slow)).view(-1, 2).T.flatten()
                p, r, apart = p[slowest_last], r[..., slowest_last], lost
                k[block], q[block] = p.unflatten(1, (size, -1)).transpose(0, 1), r.mT
            lost_keys = lost_keys + apart
        blocks = moments.values.view(count, width, count, width)[index][:, :, index]
        p, r, lost_values = shared_basis(blocks.reshape(size * width, -1), moments.readers[index])
        return k, q, p, r, (lost_keys, lost_values)

    if kv_heads == 1:
        groups = [tuple(range(count))]
    else:
        cost = torch.zeros(2, count, count, dtype=torch.float64)
        for i, j in itertools.combinations(range(count), 2):
            cost[:, i, j] = cost[:, j, i] = torch.stack(share((i, j))[-1]).cpu()
        # Keys lose squared logits, values squared output: each counts as a share of its own sum.
        groups = choose_groups((cost / cost.sum((1, 2), keepdim=True).clamp_min(1e-30)).sum(0), kv_heads)
    per_head = query_heads // count
    zeros = partial(torch.zeros, dtype=moments.values.dtype, device=moments.values.device)
    maps = Maps(
        groups,
        zeros(query_heads, width, query_heads, width),
        zeros(kv_heads, width, count, width),
        zeros(kv_heads, width, count, width),
        zeros(query_heads, width, query_heads, width),
    )
    place = 0
    for number, group in enumerate(groups):
        k, q, p, r, _ = share(group)
        maps.v[number][:, list(group)] = p.view(width, len(group), width)
        for i, head in enumerate(group):
            maps.k[number][:, head] = k[i]
            for query in range(head * per_head, (head + 1) * per_head):
                maps.q[place][:, query] = q[i]
                maps.o[query][:, place] = r[i]
                place += 1
    for name in ("q", "k", "v", "o"):
        value = getattr(maps, name)
        setattr(maps, name, value.reshape(value.shape[0] * width, -1))
    return maps


def fold_before_norm(
    attention: Attention,
    linear: nn.Linear,
    norm: nn.Module,
    change: torch.Tensor,
    before: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    fit_gains: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and gains of q_proj or k_proj and its norm that give about what `change` makes of heads behind the norm.

    change: a map of `Maps`. before: root mean square of each old head in front of the norm, which the fold takes to be
    constant. The direction is right then; how long the result is, the norm decides by its input, the result over the
    gains. So the gains are a metric: nonnegative weights of squares, by least squares over all heads and tokens, drawn
    toward the norm's own, which are exact where heads only differ by signs.
    """
    width = attention.head_dim
    gain = norm(torch.ones(width, dtype=linear.weight.dtype, device=linear.weight.device)).double()
    size = gain.abs().clamp_min(1e-3 * gain.abs().mean())
    blocks = change.view(-1, width, len(before), width)
    used = (blocks != 0).any(3).any(1).double()  # (new heads, old heads)
    mean = (used @ before.square() / used.sum(1)).sqrt()
    scale = mean[:, None] / before.clamp_min(1e-12)
    fold = (blocks * scale[:, None, :, None] * gain).reshape(len(change), -1) @ weight_of(linear)
    if not fit_gains:
        return fold / size.repeat(len(used))[:, None], size
    weight, bias = (fold, None) if linear.bias is None else (fold[:, :-1], fold[:, -1])
    normal, total, rows = torch.zeros(width, width).to(fold), torch.zeros(width).to(fold), 0
    for x in inputs:
        wanted = (norm(attention.heads(linear, x)).double().flatten(1) @ change.T).view(-1, width)
        result = nn.functional.linear(x.double(), weight, bias).view(-1, width)
        length = wanted.square().sum(1) / result.square().sum(1).clamp_min(1e-24)
        squares = (result / size).square() / width * length[:, None]  # their weighted sum shall be 1
        normal += squares.T @ squares
        total += squares.sum(0)
        rows += len(squares)
    missing = total - normal.sum(1)
    normal.diagonal().add_(RIDGE * normal.diagonal().mean())
    metric = (1 + torch.linalg.solve(normal, missing)).clamp_min(0.01)
    size = size * (total @ metric / rows / metric).sqrt()  # the sum is 1 on average
    return fold / size.repeat(len(used))[:, None], size


def merge_layer(
    attention: Attention,
    kv_heads: int,
    moments: Moments,
    inputs: Sequence[torch.Tensor],
    fit_gains: bool = True,
) -> None:
    """Give a layer's attention fewer KV heads. inputs: what its projections get, (tokens, hidden) each."""
    maps = plan_layer(moments, kv_heads, attention.q.out_features // attention.head_dim)
    if attention.norms:
        projections = zip((attention.q, attention.k), attention.norms, (maps.q, maps.k), moments.before_norm)
        (q, q_gain), (k, k_gain) = [fold_before_norm(attention, *each, inputs, fit_gains) for each in projections]
        for norm, gain in zip(attention.norms, (q_gain, k_gain)):
            old = norm(torch.ones_like(norm.weight))
            put_weight(norm, norm.weight + gain - old)  # some families' gains are 1 + weight
    else:
        q, k = maps.q @ weight_of(attention.q), maps.k @ weight_of(attention.k)
    put_weight(attention.v, maps.v @ weight_of(attention.v))
    put_weight(attention.q, q)
    put_weight(attention.k, k)
    o = weight_of(attention.o)
    put_weight(attention.o, torch.cat([o[:, : len(maps.o)] @ maps.o, o[:, len(maps.o) :]], 1))
    attention.module.num_key_value_groups = attention.q.out_features // attention.k.out_features


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
    family, row = plan.source.family, plan.source.family.text
    of_text = heads(plan.source)
    if refine_steps and not row.plain_residual:
        raise PruneKitError(
            f"--refine: {family.model_type} has norms behind attention, which it can't fit; leave it out"
        )
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
    tensors = dict(plan.outline.tensors)
    with tqdm(total=len(sides.layers), desc="merge", disable=quiet) as progress:
        for number, layer in enumerate(sides.layers):
            on_disk = bring(layer)
            attention = Attention(layer, row, of_text)
            came, wanted = original_attention(layer, row, sides.teacher, number)
            entered = enter(layer, attention, sides.student, number)
            wanted = [
                store(y.to(e.device) + MADE_UP_KV * (x.to(e.device) - e))
                for x, y, e in zip(came, wanted, entered.layer)
            ]
            turns = [turned(*named["position_embeddings"]) for _, named in entered.attention]
            slow = torch.stack(turns).amax(0) <= SLOW
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
    }
    return KVCut(plan, replace(plan.outline, tensors=tensors), settings, losses)


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
