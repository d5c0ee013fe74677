"""What a log of tagged texts (`log_line`) says: how sure, how fast, how far from what the model was trained on."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint import history
from prunekit.errors import PruneKitError
from prunekit.rules import REAL
from prunekit.tagger.rows import read_rows

PERCENTILES = (50, 95, 99)
METRICS = ("texts", "words", "confidence", "unsure", "latency", "labels", "psi", "psi_by_chance")
UNSURE = 0.5  # a text with a word whose label is less probable than that


def read_log(file: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The records of the latest model in a log, the last so many of them; what is written just now is left out.

    PruneKitError names a line that `log_line` doesn't write.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise PruneKitError(
            f"{file} is not UTF-8 text ({error.reason}): give a log of prunekit.ner tag --log"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            raise PruneKitError(f"{file} line {number}: is none of prunekit.ner tag --log; give its log, or mend it")
        records.append(record)
    if not records:
        raise PruneKitError(f"{file} is empty: nothing was tagged yet")
    return [record for record in records if record["model"] == records[-1]["model"]][-(last or 0) :]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    labels, sure = record.get("labels"), [record.get("confidence"), record.get("lowest")]
    return (
        isinstance(record.get("model"), str)
        and isinstance(record.get("time"), str)
        and REAL.holds(record.get("latency"))
        and isinstance(labels, dict)
        and all(type(count) is int and count > 0 for count in labels.values())
        and (all(REAL.holds(value) for value in sure) if labels else sure == [None, None])
    )


def by_type(labels: Mapping[str, int]) -> Counter[str]:
    """Counts of types (and O) that there are, of counts of labels: B-PER and I-PER (E-, S-, ...) are PER."""
    counts: Counter[str] = Counter()
    for label, count in labels.items():
        counts[label[2:] if label[1:2] == "-" else label] += count
    return +counts


def reference_of(path: Path) -> Counter[str]:
    """Words by type: of a data set's rows, or of what a model was trained on, as its folder says.

    PruneKitError if the folder doesn't say it: a model that ner_run.py hasn't trained.
    """
    if not path.is_dir():
        return by_type(Counter(tag for row in read_rows(path) for tag in row.tags))
    for entry in reversed(history(path)):
        settings = entry.get("settings")
        counts = settings.get("label_counts") if isinstance(settings, dict) else None
        if isinstance(counts, dict) and all(type(count) is int and count >= 0 for count in counts.values()):
            return by_type(counts)
    raise PruneKitError(f"{path}: its history has no labels of its training rows; give these: --reference data.jsonl")


def psi(expected: Mapping[str, int], actual: Mapping[str, int]) -> dict[str, float]:
    """What each type adds to the population stability index: (p - q) ln(p / q), the shares p now and q expected.

    Half a word is added to each count, so that what was never there has a share, too. Their sum is the index
    (Siddiqi 2006 reads below 0.1 as stable, above 0.25 as shifted).
    """
    names = sorted(expected.keys() | actual.keys())
    q, p = (np.array([counts.get(name, 0) + 0.5 for name in names]) for counts in (expected, actual))
    q, p = q / q.sum(), p / p.sum()
    return dict(zip(names, ((p - q) * np.log(p / q)).tolist()))


def summary(records: list[dict[str, Any]], reference: Mapping[str, int] | None) -> dict[str, Any]:
    """texts, words, since and until (UTC); confidence (a word's mean), unsure (share of texts with a word below 0.5);
    latency in seconds, p50, p95 and p99 over the texts; labels: share of words by type. With a reference: its shares,
    psi, and psi_by_chance, what the index would be on average with no drift, were words independent.
    """
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(by_type(record["labels"]))
    words = counts.total()
    sure = [(record["confidence"], sum(record["labels"].values())) for record in records if record["labels"]]
    latency = np.percentile([record["latency"] for record in records], PERCENTILES)
    found: dict[str, Any] = {
        "model": records[-1]["model"],
        "texts": len(records),
        "words": words,
        "since": min(record["time"] for record in records),
        "until": max(record["time"] for record in records),
        "confidence": sum(mean * count for mean, count in sure) / words if words else None,
        "unsure": sum(record["lowest"] < UNSURE for record in records if record["labels"]) / len(records),
        "latency": {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, latency)},
        "labels": {name: {"share": count / words} for name, count in sorted(counts.items())},
    }
    if reference and words:
        parts, total = psi(reference, counts), sum(reference.values())
        for name, part in parts.items():
            found["labels"].setdefault(name, {"share": 0.0})
            found["labels"][name] |= {"reference": reference.get(name, 0) / total, "psi": part}
        found["psi"] = sum(parts.values())
        found["psi_by_chance"] = (len(parts) - 1) * (1 / words + 1 / total)
    return found


def table(found: Mapping[str, Any]) -> str:
    """`summary` as text."""
    latency = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found["latency"].items())
    sure = "" if found["confidence"] is None else f"{found['confidence']:.3f}"
    lines = [
        f"{found['model']}: {found['texts']:,} texts, {found['words']:,} words, {found['since']} to {found['until']}",
        f"latency     {latency}",
        f"confidence  {sure} (mean of words); {found['unsure']:.1%} of the texts have a word below {UNSURE}",
        f"{'':24}{'share':>10}{'reference':>12}{'PSI':>10}",
    ]
    for name, row in _largest_first(found["labels"].items()):
        reference, part = (f"{row[key]:.4f}" if key in row else "" for key in ("reference", "psi"))
        lines.append(f"{name:24}{row['share']:>10.4f}{reference:>12}{part:>10}")
    if "psi" in found:
        chance = f"about {found['psi_by_chance']:.4f} by chance alone"
        lines.append(f"{'all':24}{'':>22}{found['psi']:>10.4f}  ({chance}; below 0.1: stable, above 0.25: shifted)")
    return "\n".join(lines)


def _largest_first(rows: Iterable[tuple[str, dict[str, float]]]) -> list[tuple[str, dict[str, float]]]:
    return sorted(rows, key=lambda item: -item[1]["share"])
