"""Texts and their labels: read from JSONL {"text": ..., "label": "positive"}, encoded, and scored as scikit-learn does.

Texts longer than the model's positions are cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint.provenance import DataDigest
from prunekit.data.rows import iterate
from prunekit.errors import PruneKitError


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


class Texts(list[Labelled]):
    """Texts, and the record of their data set as `data_record` makes it."""

    record: dict[str, Any]


def read_labelled(dataset: str | Path) -> Texts:
    """The rows of a JSONL file. PruneKitError names file and line of what is bad."""
    digest, texts = DataDigest(), Texts()
    for where, row in iterate(dataset, digest):
        text, label = (row.get(key) if isinstance(row, dict) else None for key in ("text", "label"))
        if not isinstance(text, str) or not isinstance(label, str) or not label:
            raise PruneKitError(f'{where}: needs "text" and "label", the name of a class like "positive"')
        texts.append(Labelled(text, label))
    texts.record = digest.record(dataset)
    return texts


def classes_of(texts: Iterable[Labelled]) -> dict[int, str]:
    """The labels of these texts by number, in the order of their names. PruneKitError if all have the same."""
    names = sorted({text.label for text in texts})
    if len(names) < 2:
        raise PruneKitError(f"all rows have the label {names[0]!r}: a classifier needs two or more")
    return dict(enumerate(names))


def check_classes(texts: Iterable[Labelled], labels: dict[int, str], dataset: str | Path) -> None:
    """PruneKitError if a text's label is none of the model's."""
    for label in sorted({text.label for text in texts} - set(labels.values())):
        raise PruneKitError(
            f"dataset {dataset}: its label {label[:80]!r} is none of the model's ({', '.join(sorted(labels.values()))})"
            "; rename it, or train a new head: ner_run.py --new-head"
        )


@dataclass(frozen=True)
class TextData:
    """Encoded texts: input_ids, attention_mask and, as `labels`, the number of the label; and the labels' names."""

    features: list[dict[str, Any]]
    labels: dict[int, str]

    @classmethod
    def encoded(cls, texts: Iterable[Labelled], tokenizer, labels: dict[int, str], max_length: int) -> "TextData":
        """Each text as at most `max_length` sub-words."""
        numbers = {name: number for number, name in labels.items()}
        features = []
        for text in texts:
            ids = tokenizer(text.text, truncation=True, max_length=max_length)["input_ids"]
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": numbers[text.label]})
        return cls(features, labels)

    def scores(self, predicted: Iterable[int]) -> dict[str, Any]:
        """accuracy; precision, recall and f1, means over the labels that are there or predicted; those of each label.

        Of each in `entities`, with its `support` (texts), as `entity_scores` has them of each type.
        """
        from sklearn.metrics import precision_recall_fscore_support

        truth = [self.labels[feature["labels"]] for feature in self.features]
        said = [self.labels[int(number)] for number in predicted]
        names = sorted({*truth, *said})
        columns = precision_recall_fscore_support(truth, said, labels=names, zero_division=0)
        scores = dict(zip(("precision", "recall", "f1"), columns))
        each = {
            label: {name: float(values[place]) for name, values in scores.items()} | {"support": int(columns[3][place])}
            for place, label in enumerate(names)
        }
        means = {name: float(values.mean()) for name, values in scores.items()}
        return {"accuracy": sum(map(str.__eq__, truth, said)) / len(truth), **means, "entities": each}
