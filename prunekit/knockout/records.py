"""What a scan has measured: records.jsonl, and differences of removals in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.data.groups import ratio
from prunekit.errors import PruneKitError

from .removal import Removal

Table = dict[str, dict[str, np.ndarray]]  # by name and kind, (samples,)
KINDS = ("right", "loss", "kl", "tokens")  # of a sample's scores
METRICS = {"token_acc": "right", "loss": "loss", "kl": "kl"}  # and what of a sample they are means of


def _check_record(record: Any) -> None:
    """ValueError, TypeError, KeyError or AttributeError for what is no line of records.jsonl."""
    names = [*record["gone"], *record["scores"], *record["influence"], *record["seconds"]]
    numbers = [record["batch"], *record["seconds"].values(), record["seconds"]["all"]]
    for total, count in record["influence"].values():
        numbers += [total or 0.0, count]
    for scores in record["scores"].values():
        lists = [scores[kind] for kind in KINDS]
        if len({*map(len, lists)}) != 1:
            raise ValueError("lists differ in length")
        numbers += [value for values in lists for value in values if value is not None]
    if not all(type(name) is str for name in names) or not all(type(n) in (int, float) for n in numbers):
        raise TypeError("a name is no text, or a value no number")


class Records:
    """What was measured, by removed layers and batch; a line of a file each, so that nothing is measured twice.

    Raises PruneKitError for a file that is damaged, save for a last line that a kill tore: that is dropped.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.scores: dict[tuple[tuple[str, ...], int], dict[str, Any]] = {}
        self.layers: dict[tuple[tuple[str, ...], int], tuple[dict[str, Any], dict[str, float]]] = {}
        if file and file.exists():
            raw = file.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    record = json.loads(line)
                    _check_record(record)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise PruneKitError(
                        f"{file} line {number}: is no record of a scan; remove the file and run again"
                    ) from None
                self._take(record)
            if whole != raw:  # a kill tore the last line: it is measured again
                file.write_bytes(whole)

    def _take(self, record: dict[str, Any]) -> None:
        key = (tuple(record["gone"]), record["batch"])
        self.scores.setdefault(key, {}).update(record["scores"])
        self.layers.setdefault(key, (record["influence"], record["seconds"]))

    def add(self, record: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._take(record)

    def table(self, gone: Sequence[Removal], names: Sequence[str]) -> Table:
        """By name: `right`, `loss`, `kl`, `tokens`, each (samples,), over batches in which all names were scored."""
        key = tuple(str(removal) for removal in gone)
        batches = [self.scores[key, index] for index in self.batches(gone, names)]
        return {
            name: {
                kind: np.array([value for scores in batches for value in scores[name][kind]], dtype=float)
                for kind in KINDS
            }
            for name in names
        }

    def batches(self, gone: Sequence[Removal], names: Sequence[str]) -> list[int]:
        """The batches in which all names were scored, in the order of a table's samples."""
        key = tuple(str(removal) for removal in gone)
        return [
            index
            for (removed, index), scores in sorted(self.scores.items())
            if removed == key and all(name in scores for name in names)
        ]


def paired(table: Table, one: str, other: str, metric: str) -> tuple[float, float]:
    """(difference of a metric per token, one less other; its standard error), over the same samples."""
    kind = METRICS[metric]
    return ratio(table[one][kind] - table[other][kind], table[one]["tokens"])
