"""Groups of rows, by a column that says what a row is for (skill, source, task), and figures with their errors."""

import math
from collections import Counter
from typing import Any

import numpy as np

from prunekit.errors import PruneKitError

from .rows import Rows

MOST_GROUPS = 30
FEW = 8  # rows, below which a standard error says nothing


def group_of(row: dict[str, Any], column: str) -> str:
    return str(row[column]).strip()


def groups_of(rows: Rows, column: str, least: int = 1) -> list[str]:
    """The group of each row. PruneKitError where the column is missing, has no word for a row, or makes no groups.

    A group has `least` rows or more.
    """
    for number, row in enumerate(rows, 1):
        if type(row.get(column)) not in (str, int) or not group_of(row, column):
            problem = f"has no column {column!r}" if column not in row else f"has no word in its column {column!r}"
            raise PruneKitError(f"dataset {rows.name} row {number} {problem}, to score by: every row needs one")
    found = [group_of(row, column) for row in rows]
    counts = Counter(found)
    if len(counts) > MOST_GROUPS:
        raise PruneKitError(
            f"dataset {rows.name}: column {column!r} has {len(counts)} values, {MOST_GROUPS} are the most: it makes no "
            "groups; name one that does"
        )
    name, count = min(counts.items(), key=lambda pair: pair[1])
    if count < least:
        raise PruneKitError(
            f"dataset {rows.name}: {column} {name!r} has {count} of the {len(rows)} rows, too few to score: give it "
            f"{least} or more, or join it with another"
        )
    return found


def indices_by_group(rows: Rows, column: str | None) -> dict[str, list[int]]:
    """The places in `rows` of each group's rows; without a column all, as "". Raises as `groups_of`."""
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups_of(rows, column) if column else [""] * len(rows)):
        found.setdefault(group, []).append(place)
    return found


def ratio(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(sum of values / sum of weights; its standard error) over samples, both arrays (samples,). NaN of no sample.

    The error is that of a ratio estimator (Cochran, Sampling Techniques, 6.13): of weights 1 it is the mean's.
    """
    count = len(values)
    if not count:
        return math.nan, math.inf
    mean = float(values.sum() / weights.sum())
    rest = values - mean * weights
    error = math.sqrt(float((rest**2).sum()) * count / max(count - 1, 1)) / float(weights.sum())
    return mean, error if count > 1 else math.inf
