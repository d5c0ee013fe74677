"""Words and their tags: read from files, checked against a model's labels, encoded into pieces.

Data are JSONL, {"tokens": ["Ana", ...], "ner_tags": ["B-PER", ...]}, or CoNLL text (a word and, in the last column, its
tag on each line, an empty line between sentences). A word's label is learned and predicted at its first sub-word; rows
longer than the model's positions go on in a further piece, so that no word is lost.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint.provenance import DataDigest
from prunekit.data.rows import iterate, locate
from prunekit.errors import PruneKitError
from prunekit.rules import short

TAG = re.compile(r"O|[BI]-\S+")
COLUMNS = re.compile(r"[ \t]+")  # not \s: a no-break space, which French numbers have, is part of a word
PLACED = re.compile(r"O|[A-Z]-.+")  # models' labels that say where in an entity a word is: B-, I-, some E-, S-, L-, U-

TOKEN_CLASSIFIER, TEXT_CLASSIFIER = "ForTokenClassification", "ForSequenceClassification"


@dataclass(frozen=True)
class Row:
    """A sentence's words and, one a word, their tags."""

    words: list[str]
    tags: list[str]


class Rows(list[Row]):
    """Sentences, and the record of their data set as `data_record` makes it."""

    def __init__(self, rows: Iterable[Row], record: dict[str, Any]):
        super().__init__(rows)
        self.record = record


def read_rows(dataset: str | Path) -> Rows:
    """Rows of a JSONL file (by its suffix) or of CoNLL text. PruneKitError names file and line of what is bad."""
    (path, count), digest = locate(dataset), DataDigest()
    if path.suffix in (".jsonl", ".json"):
        rows = list(_json_rows(iterate(dataset, digest)))
    else:
        try:
            with path.open("rb") as file:
                rows = list(_conll_rows(path, (line.decode("utf-8-sig") for line in digest.reading(file))))[:count]
        except UnicodeDecodeError as error:
            raise PruneKitError(f"dataset {path} is not UTF-8 text ({error.reason}): convert it") from None
    if not rows:
        raise PruneKitError(f"dataset {path} is empty: it needs at least one row")
    return Rows(rows, digest.record(dataset))


def _json_rows(rows: Iterable[tuple[str, Any]]) -> Iterable[Row]:
    for where, row in rows:
        lists: list[Any] = [row.get(key) if isinstance(row, dict) else None for key in ("tokens", "ner_tags")]
        if not all(isinstance(a, list) and a and all(isinstance(b, str) for b in a) for a in lists):
            raise PruneKitError(f'{where}: needs "tokens" and "ner_tags", lists of words and of names like "B-PER"')
        words, tags = lists
        if len(words) != len(tags):
            raise PruneKitError(f"{where}: {len(words)} tokens and {len(tags)} ner_tags; one tag a token")
        yield _row(where, words, tags)


def _conll_rows(path: Path, lines: Iterable[str]) -> Iterable[Row]:
    words, tags = [], []
    for number, line in enumerate([*lines, ""], 1):
        columns = COLUMNS.split(line.strip(" \t\r\n")) if line.strip() else []
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise PruneKitError(f"dataset {path} line {number}: one column; a word and its tag are needed")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield _row(f"dataset {path} line {number - 1}", words, tags)
            words, tags = [], []


def _row(where: str, words: list[str], tags: list[str]) -> Row:
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise PruneKitError(f"{where}: {short(tag)} is no tag; use O, B-TYPE and I-TYPE")
    return Row(words, tags)


def labels_of(rows: Iterable[Row]) -> dict[int, str]:
    """Names of the labels that these rows need, by number: O, then B and I of each type by its name.

    PruneKitError if all words are O.
    """
    types = sorted({tag[2:] for row in rows for tag in row.tags} - {""})
    if not types:
        raise PruneKitError("all tags of the rows are O: a tagger needs entities to learn")
    return dict(enumerate(["O", *(f"{place}-{name}" for name in types for place in "BI")]))


def model_labels(config: dict[str, Any], kind: str = TOKEN_CLASSIFIER) -> dict[int, str]:
    """A classifier's labels by number; PruneKitError if the config is none's of this kind.

    Of tokens a label that is a type alone (PER) is I-PER: seqeval would take its first letter for the place.
    """
    names = config.get("id2label")
    if not str((config.get("architectures") or [""])[0]).endswith(kind):
        what = "token" if kind == TOKEN_CLASSIFIER else "text"
        raise PruneKitError(
            f"{config.get('architectures')}: no {what} classifier; train it with ner_run.py --new-head first"
        )
    if not isinstance(names, dict) or names.keys() != {str(number) for number in range(len(names))}:
        raise PruneKitError('config.json: "id2label" does not number the labels from 0; mend it')
    labels = {number: names[str(number)] for number in range(len(names))}
    if kind == TEXT_CLASSIFIER:
        return labels
    return {number: name if PLACED.fullmatch(name) else f"I-{name}" for number, name in labels.items()}


def tag_numbers(labels: dict[int, str]) -> dict[str, int]:
    """The number of the label that each tag is learned as: its own, or of B-TYPE that of I-TYPE where there is no B."""
    numbers = {name: number for number, name in labels.items()}
    return {f"B-{name[2:]}": number for name, number in numbers.items() if name.startswith("I-")} | numbers


def check_labels(rows: Iterable[Row], labels: dict[int, str], dataset: str | Path) -> None:
    """PruneKitError if a tag in the rows is none that a model of these labels can learn."""
    known = tag_numbers(labels)
    for tag in sorted({tag for row in rows for tag in row.tags}):
        if tag not in known:
            raise PruneKitError(
                f"dataset {dataset}: its tag {tag} is none of the model's labels ({', '.join(sorted(labels.values()))}"
                "); rename the tags, or train a new head: ner_run.py --new-head"
            )


def load_tokenizer(folder: Path):
    """The folder's fast tokenizer, which knows the words that sub-words are of."""
    from transformers import AutoTokenizer

    try:  # RoBERTa's kind has to be told that words stand alone; the others take no notice
        tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    except Exception as error:  # of files that aren't as they should be, tokenizers raises that itself
        raise PruneKitError(f"{folder}: its tokenizer can't be loaded ({error})".split("\n")[0]) from None
    if not tokenizer.is_fast:
        raise PruneKitError(f"{folder}: has no tokenizer.json, which says what sub-words belong to what word")
    if tokenizer.pad_token is None:
        raise PruneKitError(f"{folder}: its tokenizer has no padding token; name one in tokenizer_config.json")
    return tokenizer


def pieces_of(words: list[str], tokenizer, max_length: int) -> list[tuple[list[int], list[int | None]]]:
    """A text as pieces of at most `max_length` sub-words: their ids, and at a word's first one its number, else None.

    Words of which the tokenizer makes nothing (a lone control character) are in none.
    """
    encoded = tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=max_length, return_overflowing_tokens=True
    )
    pieces, last = [], -1
    for piece, ids in enumerate(encoded["input_ids"]):
        firsts: list[int | None] = []
        for word in encoded.word_ids(piece):
            new = word is not None and word > last
            firsts.append(word if new else None)
            last = word if new else last
        pieces.append((ids, firsts))
    return pieces


def encode(
    rows: Iterable[Row], tokenizer, labels: dict[int, str], max_length: int
) -> tuple[list[dict[str, list[int]]], list[list[str]]]:
    """(features, tags): pieces of at most `max_length` sub-words, and each row's tags for `join`.

    A feature has input_ids, attention_mask and labels: the number of a word's tag at its first sub-word, else -100.
    Words of which the tokenizer makes nothing are left out of both.
    """
    numbers = tag_numbers(labels)
    features, truth = [], []
    for row in rows:
        seen: list[str] = []
        for ids, firsts in pieces_of(row.words, tokenizer, max_length):
            targets = [-100 if word is None else numbers[row.tags[word]] for word in firsts]
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": targets})
            seen += [row.tags[word] for word in firsts if word is not None]
        truth.append(seen)
    return features, truth


def join(predicted: Iterable[int], labels: dict[int, str], truth: list[list[str]]) -> list[list[str]]:
    """Predicted label numbers, a word after the other through all features, as rows of tags like `truth`."""
    names = iter([labels[int(number)] for number in predicted])
    return [[next(names) for _ in row] for row in truth]
