"""Precision, recall and F1 of entities, as seqeval has them (https://github.com/chakki-works/seqeval).

An entity counts if its type and both its ends are right.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .rows import join

METRICS = ("precision", "recall", "f1", "entities")


def entity_scores(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """precision, recall and f1 over all entities, and by type in `entities` (there with `support`), from 0 to 1."""
    from seqeval.metrics import classification_report

    report = classification_report(truth, predicted, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1"}
    scores = {
        key: {name: float(values[theirs]) for theirs, name in names.items()} | {"support": int(values["support"])}
        for key, values in report.items()
    }
    overall = scores["micro avg"]
    entities = {key: value for key, value in scores.items() if not key.endswith(" avg")}
    return {name: overall[name] for name in names.values()} | {"entities": entities}


def scores_table(scores: dict[str, Any]) -> str:
    """`entity_scores` as text, a line a type."""
    lines = [f"{'':24}{'precision':>10}{'recall':>10}{'F1':>10}{'entities':>10}"]
    for name, row in {**scores["entities"], "all": scores}.items():
        support = row.get("support", sum(each["support"] for each in scores["entities"].values()))
        lines.append(f"{name:24}{row['precision']:>10.4f}{row['recall']:>10.4f}{row['f1']:>10.4f}{support:>10}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Data:
    """Encoded rows: pieces, the rows' tags and the names of the labels, as `encode` makes them."""

    features: list[dict[str, list[int]]]
    truth: list[list[str]]
    labels: dict[int, str]

    def scores(self, predicted: Iterable[int]) -> dict[str, Any]:
        """`entity_scores` of predicted label numbers, a word after the other through all features."""
        return entity_scores(self.truth, join(predicted, self.labels, self.truth))
