"""What all cuts share: a plan decides, by shapes alone; what it or a fit makes of it is a cut, which is written.

A plan of X is an `XPlan`: nothing is computed yet, and there is nothing to write. A cut, `XCut`, has a checkpoint whose
tensors can all be read or computed, and says what the history shall say of it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prunekit import errors
from prunekit.checkpoint import Checkpoint, history_entry, statistics, write_checkpoint
from prunekit.data.batches import Calibration


@dataclass(frozen=True)
class Account:
    """What the history shall say of a cut, besides the sizes before and after it."""

    stage: str
    removed: dict[str, Any]
    metrics: dict[str, float] | None = None
    settings: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)  # entries of its own


class Cut(Protocol):
    @property
    def source(self) -> Checkpoint: ...

    @property
    def result(self) -> Checkpoint: ...

    def account(self) -> Account: ...


class OfPlan:
    """What cuts have of their plan."""

    plan: Any

    @property
    def source(self) -> Checkpoint:
        return self.plan.source


def write_cut(cut: Cut, out: str | Path, overwrite: bool = False, max_shard_bytes: int | None = None) -> dict[str, Any]:
    """Write a cut's checkpoint to OUT and return its new history entry. Raises as `write_checkpoint` does."""
    account = cut.account()
    entry = history_entry(
        account.stage,
        cut.source.path,
        statistics(cut.source),
        statistics(cut.result),
        account.removed,
        account.metrics,
        account.settings,
    )
    entry |= account.more
    if errors.started is not None:
        entry["seconds"] = round(time.monotonic() - errors.started, 1)
    write_checkpoint(cut.result, out, entry, overwrite, max_shard_bytes)
    return entry


def calibrated_on(data: Calibration, key: str = "calib") -> dict[str, Any]:
    """What settings say of the data that a cut was fitted on; `key` says which rows the user named."""
    return {key: data.record.get("path"), "calibration_data": [data.record], "calibration_tokens": data.tokens}
