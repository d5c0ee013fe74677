"""Merge a layer's KV heads so that its attention stays nearly what it was: closed forms on calibration activations.

V has neither RoPE nor a norm: a group shares the basis that keeps most of what o_proj reads of its values, and the way
back is folded into o_proj. Of K, rotations and scalings of the pairs that RoPE rotates commute with RoPE: a group
shares one combination of its keys per frequency, and the way back is folded into q_proj. Pairs that hardly turn over
the rows share a basis as values do, whatever pair and head their content comes from. Where q and k have a norm behind
their projections (Qwen3), the fold has the right direction, and the norm's gains can be fitted to give it its length.
Dimensions that RoPE doesn't rotate are pairs that never turn. Where a gate scales what a head hands to o_proj
(Qwen3.5), values are shared dimension by dimension, and the gates follow the order of their head's.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import Heads
from prunekit.families import Stack
from prunekit.model.parts import LayerParts

from .kv_math import as_pairs, choose_groups, pairing, rotation, shared_basis, shared_dimensions, shared_keys

RIDGE = 0.1  # of the fit of a norm's gains, times the mean of the normal matrix's diagonal
LEAST_GAIN = 1e-3  # of what is read of the slow pairs, for them to share a basis: per frequency RoPE is kept exactly


class Attention:
    """The parts of a layer's attention that merging changes. Weights are in fp64, biases as their last column."""

    def __init__(self, layer: nn.Module, row: Stack, heads: Heads):
        parts = LayerParts(layer, row, heads)
        self.module, self.norms = parts.attention, list(parts.norms.values())
        self.modules = {part.name: part.module for part in (parts.q, parts.k, parts.v, parts.o)} | parts.norms
        self.q, self.k, self.v, self.o = list(self.modules.values())[:4]
        self.kv_heads, self.head_dim, self.gated = heads.kv, heads.dim, row.gated
        self.rotated = heads.dim  # dimensions of a head that RoPE rotates

    def parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        return [(m, name, p) for m in self.modules.values() for name, p in m.named_parameters(recurse=False)]

    def heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) of inputs (tokens, hidden)."""
        if projection is self.q and self.gated:
            return projection(x).unflatten(-1, (-1, 2, self.head_dim))[..., 0, :]
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim): by how much each dimension is scaled in front of o_proj."""
        return self.q(x).unflatten(-1, (-1, 2, self.head_dim))[..., 1, :].double().sigmoid()

    def weight(self, projection: nn.Linear) -> torch.Tensor:
        """`weight_of` a projection's heads, without their gates."""
        weight = weight_of(projection)
        return self.by_half(weight)[:, 0].flatten(0, 1) if projection is self.q and self.gated else weight

    def by_half(self, weight: torch.Tensor) -> torch.Tensor:
        """q_proj's weight by head, and of each head its queries and its gates: (heads, 2, head_dim, inputs)."""
        return weight.unflatten(0, (-1, 2, self.head_dim))

    def queries_and_keys(self, x: torch.Tensor) -> list[torch.Tensor]:
        """q and k as RoPE gets them, their dimensions in the order of `pairing`."""
        both = [self.heads(self.q, x), self.heads(self.k, x)]
        if self.norms:
            both = [norm(z) for norm, z in zip(self.norms, both)]
        return [z.double()[..., pairing(self.rotated, self.head_dim)] for z in both]


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
    order: torch.Tensor  # of a head's dimensions in keys and queries, (head_dim,)
    gated: torch.Tensor | None  # the readers' diagonals times E[gate^2], (KV heads, head_dim)

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
    gates: Any = 0
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
        if attention.gated:
            gates = gates + attention.gates(x).square().sum(0)
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
    read = None
    if attention.gated:
        by_head = (gates / tokens).unflatten(0, (attention.kv_heads, -1)) * columns.square().sum(0)
        read = by_head.sum(1)
    return Moments(
        keys / tokens,
        queries,
        slow_pairs,
        slow_keys,
        slow_queries / tokens,
        values / tokens,
        readers,
        norms,
        pairing(attention.rotated, attention.head_dim),
        read,
    )


@dataclass
class Maps:
    """Linear maps from the old heads, side by side, to the new ones."""

    groups: list[tuple[int, ...]]
    q: torch.Tensor  # (query heads * head_dim, the same): puts the query heads of a group side by side
    k: torch.Tensor  # (new KV heads * head_dim, KV heads * head_dim)
    v: torch.Tensor  # like k
    o: torch.Tensor  # from o_proj's new inputs to its old ones, like q
    gates: torch.Tensor  # from the old heads' gates to the new ones, like q


def plan_layer(moments: Moments, kv_heads: int, query_heads: int) -> Maps:
    """Choose the groups and what they share."""
    count, width = moments.readers.shape[:2]

    slow = moments.slow_pairs.repeat(2).nonzero().flatten()

    def share(group: tuple[int, ...]):
        """(k, q, v, o, gates, what keys and values lose): all but v per head, (head_dim, head_dim)."""
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
        if moments.gated is None:
            follow = blocks.new_zeros(size, width, width)
            p, r, lost_values = shared_basis(blocks.reshape(size * width, -1), moments.readers[index])
        else:
            p, r, follow, lost_values = shared_dimensions(blocks, moments.gated[index])
        return k, q, p, r, follow, (lost_keys, lost_values)

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
        zeros(query_heads, width, query_heads, width),
    )
    place = 0
    for number, group in enumerate(groups):
        k, q, p, r, follow, _ = share(group)
        maps.v[number][:, list(group)] = p.view(width, len(group), width)
        for i, head in enumerate(group):
            maps.k[number][:, head] = k[i]
            for query in range(head * per_head, (head + 1) * per_head):
                maps.q[place][:, query] = q[i]
                maps.o[query][:, place] = r[i]
                maps.gates[place][:, query] = follow[i]
                place += 1
    back = moments.order.argsort()
    for name in ("q", "k", "v", "o", "gates"):
        value = getattr(maps, name)
        if name in ("q", "k"):
            value = value[:, back][..., back]
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
    fold = (blocks * scale[:, None, :, None] * gain).reshape(len(change), -1) @ attention.weight(linear)
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
    maps = plan_layer(moments, kv_heads, attention.o.in_features // attention.head_dim)
    if attention.norms:
        projections = zip((attention.q, attention.k), attention.norms, (maps.q, maps.k), moments.before_norm)
        (q, q_gain), (k, k_gain) = [fold_before_norm(attention, *each, inputs, fit_gains) for each in projections]
        for norm, gain in zip(attention.norms, (q_gain, k_gain)):
            old = norm(torch.ones_like(norm.weight))
            put_weight(norm, norm.weight + gain - old)  # some families' gains are 1 + weight
    else:
        q, k = maps.q @ attention.weight(attention.q), maps.k @ weight_of(attention.k)
    if attention.gated:
        gates = maps.gates @ attention.by_half(weight_of(attention.q))[:, 1].flatten(0, 1)
        q = torch.stack([z.unflatten(0, (-1, attention.head_dim)) for z in (q, gates)], 1).flatten(0, 2)
    put_weight(attention.v, maps.v @ weight_of(attention.v))
    put_weight(attention.q, q)
    put_weight(attention.k, k)
    o = weight_of(attention.o)
    put_weight(attention.o, torch.cat([o[:, : len(maps.o)] @ maps.o, o[:, len(maps.o) :]], 1))
    attention.module.num_key_value_groups = attention.o.in_features // attention.k.out_features
