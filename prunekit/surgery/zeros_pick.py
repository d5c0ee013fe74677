"""Choose the weights with the lowest scores: exactly so many, ties included, a tensor at a time.

Scores become integer keys that sort as they do. The key below which weights go is found by counting: a histogram of the
keys' upper half, then one of the lower half, so that neither all scores nor all weights are ever in memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

HALF = 16


def sort_keys(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """int32 keys in the order of non-negative scores (any shape, read as fp32); zero weights come first, with key 0."""
    bits = scores.float().abs().contiguous().view(torch.int32)  # floats of one sign sort as their bits do
    return torch.where(weights == 0, 0, bits.clamp(max=2**31 - 2) + 1)


@dataclass(frozen=True)
class Cut:
    """Of one tensor: everything below `key` goes, and the first `ties` of what equals it; `count` in all, if known."""

    key: int
    ties: int = 0
    count: int | None = None

    def mask(self, keys: torch.Tensor) -> torch.Tensor:
        """True where a weight goes; the shape of keys."""
        mask = keys < self.key
        equal = (keys == self.key).flatten().nonzero()[: self.ties, 0]
        mask.view(-1)[equal] = True
        return mask


@dataclass(frozen=True)
class RowCut:
    """Of one tensor: the lowest of each row go, `count` in all, as many in each row as can be.

    A row is the weights of one output, or with `group` that many neighbours of it, of which `count` go in each.
    `inputs` is the tensor's input axis.
    """

    count: int
    inputs: int = -1
    group: int | None = None

    def mask(self, keys: torch.Tensor) -> torch.Tensor:
        """True where a weight goes; the shape of keys."""
        moved = keys.movedim(self.inputs, -1)
        rows = moved.reshape(-1, self.group or moved.shape[-1])
        order = rows.argsort(dim=-1, stable=True)
        chosen = torch.arange(rows.shape[1], device=keys.device) < self._counts(rows)[:, None]
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, chosen)
        return mask.reshape(moved.shape).movedim(-1, self.inputs)

    def _counts(self, rows: torch.Tensor) -> torch.Tensor:
        if self.group:
            return torch.full_like(rows[:, 0], self.count)
        zeros = (rows == 0).sum(1)  # rows that have more zeros already leave less to the others
        level, above = 0, rows.shape[1]
        while level < above:
            middle = (level + above + 1) // 2
            if int(zeros.clamp(min=middle).sum()) <= self.count:
                level = middle
            else:
                above = middle - 1
        counts = zeros.clamp(min=level)
        more = ((zeros <= level) & (counts < rows.shape[1])).nonzero()[: self.count - int(counts.sum()), 0]
        counts[more] += 1
        return counts


def find_cuts(keys: Callable[[], Iterable[tuple[str, torch.Tensor]]], count: int) -> dict[str, Cut]:
    """One cut through all tensors, by name, after which exactly `count` of their weights are chosen.

    `keys()` yields (name, keys), three times over. Of equal keys the first tensors' go first.
    """

    def histogram(halves: Iterable[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(2**HALF, dtype=torch.int64)
        for half in halves:
            total += torch.bincount(half.flatten(), minlength=2**HALF).cpu()
        return total

    upper, below = _bin_of(histogram(part >> HALF for _, part in keys()), count)
    inside = (part[part >> HALF == upper] & (2**HALF - 1) for _, part in keys())
    lower, below_in_bin = _bin_of(histogram(inside), count - below)
    key, ties = (upper << HALF) + lower, count - below - below_in_bin
    cuts = {}
    for name, part in keys():
        taken = min(ties, int((part == key).sum()))
        cuts[name] = Cut(key, taken, int((part < key).sum()) + taken)
        ties -= taken
    return cuts


def _bin_of(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """(bin in which the count-th item lies, number of items in the bins before)."""
    sums = histogram.cumsum(0)
    place = min(int(torch.searchsorted(sums, max(count, 1))), len(sums) - 1)
    return place, int(sums[place] - histogram[place])
