"""The mathematics of merging heads: what a group shares, by closed forms, and which heads make the groups.

Pure functions of tensors. Pairs are those that RoPE rotates, dimensions i and i + head_dim / 2, as complex numbers.
Where it rotates only a head's first dimensions, `pairing` puts their pairs first, and behind them those that it passes
on, which are pairs that never turn.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

MANY = 2000  # partitions of the heads into groups; more aren't all tried


def shared_keys(moments: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One key for a group's heads, per RoPE frequency: k' = sum_h a_h k_h, and k_h is then about b_h k'.

    moments: E[k k^H], (frequencies, heads, heads), of the pairs (i, i + head_dim / 2) as complex numbers. energy: what
    the heads' queries have of each frequency, (heads, frequencies). Least sum of energy_h |k_h - b_h k'|^2, by the top
    eigenvector. Returns a and b, (heads, frequencies), and what is lost per frequency. E|k'|^2 is the heads' mean; the
    phase, which is free, is the heads' mean one.
    """
    energy = energy.T
    root = energy.clamp_min(1e-12 * energy.max().clamp_min(1e-30)).sqrt()
    values, vectors = torch.linalg.eigh(root[:, :, None] * moments * root[:, None, :])
    a, b = vectors[..., -1].conj() * root, vectors[..., -1] / root
    power = torch.einsum("fn,fnm,fm->f", a, moments, a.conj()).real
    wanted = moments.diagonal(dim1=1, dim2=2).real.mean(1)
    mean = b.sum(1, keepdim=True)
    phase = torch.where(mean.abs() > 1e-9 * b.abs().sum(1, keepdim=True), mean / mean.abs(), 1)
    scale = (wanted / power.clamp_min(1e-30)).clamp_min(1e-30).sqrt()[:, None] * phase
    return (a * scale).T, (b / scale).T, values[:, :-1].sum(1)


def shared_basis(covariance: torch.Tensor, readers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One vector for those of a group's heads: v' = P v of all of them, and v_h is then about R_h v'.

    covariance: E[v v^T] of the group's concatenated vectors, (heads * width, heads * width). readers: the sum of r r^T
    over all r by which a head is read, (heads, width, width): rows of o_proj for values, queries for keys. Least error
    in what is read, by PCA in the readers' metric. Returns P (width, heads * width), R (heads, width, width) and what
    is lost, as squares of what is read. E|v'|^2 is the heads' mean.
    """
    count, width, _ = readers.shape
    eye = torch.eye(width, dtype=readers.dtype, device=readers.device)
    mean = readers.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(readers / mean + 1e-6 * eye)
    half = torch.block_diag(*((vectors * values[:, None].sqrt()) @ vectors.mT))
    back = torch.block_diag(*((vectors / values[:, None].sqrt()) @ vectors.mT))
    energy, basis = torch.linalg.eigh(half @ covariance @ half)
    encode, decode = basis[:, -width:].T @ half, back @ basis[:, -width:]
    power = energy[-width:].sum().clamp_min(1e-30)
    scale = (covariance.diagonal().sum() / count / power).clamp_min(1e-30).sqrt()
    return encode * scale, (decode / scale).view(count, width, width), energy[:-width].sum() * mean


def shared_dimensions(
    covariance: torch.Tensor, readers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One vector for those of a group's heads, dimension by dimension: for values that a gate scales one by one.

    covariance: E[v v^T], (heads, width, heads, width). readers: by how much each is read, (heads, width). Between a
    value and what reads it only scales and an order of the dimensions fold away. So each head's dimensions are assigned
    to the first head's, one to one, as least is lost by it, and what is assigned together shares one value as keys do
    per frequency. Returns P (width, heads * width) and R (heads, width, width) as `shared_basis`, the orders (heads,
    width, width), by which a head's gates follow, and what is lost, as squares of what is read.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, and few models have a gate

    count, width = readers.shape
    power = covariance.flatten(2).flatten(0, 1).diagonal().view(count, width) * readers
    orders = [torch.arange(width)]
    for head in range(1, count):
        both = covariance[0, :, head] * (readers[0][:, None] * readers[head]).sqrt()
        one, other = power[0][:, None], power[head]
        lost = (one + other) / 2 - ((one - other).square() / 4 + both.square()).sqrt()
        orders.append(torch.from_numpy(linear_sum_assignment(lost.cpu().numpy())[1]))
    order = torch.stack(orders).to(covariance.device)
    heads, place = torch.arange(count, device=order.device)[:, None], torch.arange(width, device=order.device)
    aligned = covariance[heads[:, None], order[:, None], heads, order]  # (heads, heads, width)
    a, b, rest = shared_keys(aligned.permute(2, 0, 1), readers.gather(1, order))
    encode, decode, follow = (covariance.new_zeros(count, width, width) for _ in range(3))
    encode[heads, place, order] = a
    decode[heads, order, place] = b
    follow[heads, place, order] = 1
    return encode.transpose(0, 1).flatten(1), decode, follow, rest.sum()


def pairing(rotated: int, head_dim: int) -> torch.Tensor:
    """An order of a head's dimensions, (head_dim,), in which i and i + head_dim / 2 are a pair, those rotated first.

    RoPE rotates the first `rotated` dimensions, each with the one that is rotated / 2 behind it.
    """
    return torch.cat([torch.arange(rotated).view(2, -1), torch.arange(rotated, head_dim).view(2, -1)], 1).flatten()


def turned(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Radians by which RoPE turns each pair over the longest row, (pairs,). cos, sin: (rows, length, head_dim)."""
    angle = torch.atan2(sin.double(), cos.double())[..., : cos.shape[-1] // 2]
    step = torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    way = nn.functional.pad(step.cumsum(1), (0, 0, 1, 0))
    return (way.amax(1) - way.amin(1)).amax(0)


def rotation(c: torch.Tensor) -> torch.Tensor:
    """Multiplication of the pairs (i, i + n) by complex numbers c (n,), as a matrix (2n, 2n)."""
    return torch.cat([torch.cat([c.real.diag(), -c.imag.diag()], 1), torch.cat([c.imag.diag(), c.real.diag()], 1)])


def as_pairs(x: torch.Tensor) -> torch.Tensor:
    """(..., head_dim) as the complex pairs that RoPE rotates, (..., head_dim / 2)."""
    first, second = x.chunk(2, -1)
    return torch.complex(first.contiguous(), second.contiguous())


def partitions(items: Sequence[int], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to split items into groups of a size."""
    if not items:
        yield []
        return
    for others in itertools.combinations(items[1:], size - 1):
        left = [item for item in items[1:] if item not in others]
        for rest in partitions(left, size):
            yield [(items[0], *others), *rest]


def choose_groups(cost: torch.Tensor, groups: int) -> list[tuple[int, ...]]:
    """Equal groups with the least sum of pair costs within them. cost: (heads, heads), symmetric.

    Of many heads not all partitions are tried: neighbours start together, and two change places while that helps.
    """
    count = len(cost)
    size = count // groups
    table = cost.tolist()

    def total(partition):
        return sum(table[i][j] for group in partition for i, j in itertools.combinations(group, 2))

    if math.factorial(count) // (math.factorial(size) ** groups * math.factorial(groups)) <= MANY:
        return min(partitions(range(count), size), key=total)
    best = [tuple(range(start, start + size)) for start in range(0, count, size)]
    improved = True
    while improved:
        improved = False
        for one, two in itertools.combinations(range(count), 2):
            swap = {one: two, two: one}
            trial = [tuple(swap.get(head, head) for head in group) for group in best]
            if total(trial) < total(best) * (1 - 1e-9):
                best, improved = trial, True
    return sorted(tuple(sorted(group)) for group in best)
