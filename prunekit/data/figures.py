"""Figures of rows: of each row its part, of all rows or some their means, of two models how sure a difference is."""

import math
from collections.abc import Sequence

import numpy as np

Figures = dict[str, tuple[np.ndarray, np.ndarray]]  # by metric: what each row adds above and below the line, (rows,)

RESAMPLES, LEVEL = 10_000, 0.95
BLOCK = 2_000_000  # counts of rows drawn at once: 16 MB


def perplexity(loss: float) -> float:
    """Of a loss in nats a token."""
    return math.exp(min(loss, 700))  # more overflows


def ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return above / np.maximum(below, 1)  # all truths may be empty


def chosen(figures: Figures, places: Sequence[int]) -> Figures:
    """The figures of these rows alone, in this order."""
    index = np.asarray(places, int)
    return {name: (above[index], below[index]) for name, (above, below) in figures.items()}


def means(figures: Figures) -> dict[str, float]:
    """Each metric over all rows."""
    return {name: float(ratios(above.sum(), below.sum())) for name, (above, below) in figures.items()}


def paired_differences(before: Figures, after: Figures, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Of each metric that both have, `after` less `before`, and the ends of its bootstrap interval of 95%.

    The rows of both are the same, in the same order. They are drawn again with both models' values together, which
    takes out what makes a row hard for either (percentile bootstrap; Efron and Tibshirani, 1993, chapter 13).
    """
    names = [name for name in before if name in after]
    if not names:
        return {}
    values = np.stack([column for name in names for column in (*before[name], *after[name])], axis=1).astype(float)
    count, generator = len(values), np.random.default_rng(seed)
    draws, left = [], RESAMPLES
    while left:
        block = min(left, max(1, BLOCK // count))
        times = generator.multinomial(count, np.full(count, 1 / count), size=block)
        draws.append(_differences(times @ values))
        left -= block
    found = _differences(values.sum(0, keepdims=True))[0]
    low, high = np.quantile(np.concatenate(draws), ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return {name: (float(found[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}


def _differences(sums: np.ndarray) -> np.ndarray:
    """(draws, metrics) of sums (draws, 4 * metrics)."""
    parts = sums.reshape(len(sums), -1, 4)
    return ratios(parts[..., 2], parts[..., 3]) - ratios(parts[..., 0], parts[..., 1])
