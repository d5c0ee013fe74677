"""Entities of plain texts, by a token classifier in whatever format it is served, and a line of log for each text.

A text's words are runs of letters and digits, with hyphens, dots and @ between them; every other sign is a word of its
own, as in most data that taggers are trained on. Rows of `{"tokens": [...]}` come with their own words.
"""

import json
import re
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint import read_config
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.data.rows import iterate
from prunekit.errors import PruneKitError, need_packages
from prunekit.families import positions
from prunekit.tagger.rows import load_tokenizer, model_labels, pieces_of

from .run import ONNX, load_served, weight_files, word_logits


@cache
def _word() -> re.Pattern[str]:
    """A word of a text; made when there is one to be split, which takes 14 ms."""
    # Accents and vowel signs that are characters of their own (é as two, all Hindi), and what joins letters (Persian)
    marks = "\u200c\u200d" + "".join(chr(n) for n in range(0x300, 0x1F000) if unicodedata.category(chr(n))[0] == "M")
    return re.compile(rf"\w[\w{marks}]*(?:[-.@]\w[\w{marks}]*)*|[^\w\s]")


@dataclass(frozen=True)
class Text:
    """A text and where its words are: (start, end), in characters."""

    text: str
    words: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str) -> "Text":
        return cls(text, [match.span() for match in _word().finditer(text)])

    @classmethod
    def joined(cls, tokens: list[str]) -> "Text":
        """Words with a space between them."""
        ends = np.cumsum([len(token) + 1 for token in tokens]).tolist()
        return cls(" ".join(tokens), [(end - 1 - len(token), end - 1) for token, end in zip(tokens, ends)])


@dataclass(frozen=True)
class Tagged:
    """What a tagger says of a text: its entities; of each word the label, and the probability that it gives it."""

    text: str
    entities: list[dict[str, Any]]
    labels: list[str]
    confidence: list[float]

    def line(self) -> str:
        """Text and entities as a line of JSON."""
        return json.dumps({"text": self.text, "entities": self.entities}, ensure_ascii=False) + "\n"


def read_texts(file: Path) -> list[Text]:
    """The texts of a file: of a .jsonl the rows' "text" or "tokens", else its lines, empty ones too.

    PruneKitError names file and line of what is bad.
    """
    if file.suffix == ".jsonl":
        return [_text_of(where, row) for where, row in iterate(file)]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise PruneKitError(f"{file} is not UTF-8 text ({error.reason}): convert it") from None
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise PruneKitError(f"{file} is empty: give a text a line")
    return [Text.of(line) for line in lines]


def _text_of(where: str, row: Any) -> Text:
    text, tokens = (row.get(key) if isinstance(row, dict) else None for key in ("text", "tokens"))
    if isinstance(text, str):
        return Text.of(text)
    if isinstance(tokens, list) and all(isinstance(token, str) and token for token in tokens):
        return Text.joined(tokens)
    raise PruneKitError(f'{where}: needs "text", or "tokens", a list of words')


def check_text(text: str, where: str) -> None:
    """PruneKitError for half a character, which JSON can say and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PruneKitError(f"{where}: has a lone surrogate; mend the text") from None


def check_tagger(folder: Path) -> dict[int, str]:
    """The labels of a folder with a token classifier; PruneKitError if it is none, or what runs it isn't installed."""
    check_no_remote_code(folder)
    config = read_config(folder)
    labels = model_labels(config)
    if not weight_files(folder):
        raise PruneKitError(f"{folder}: neither *.safetensors nor {ONNX} here; give a checkpoint folder")
    if (folder / ONNX).is_file():
        need_packages("onnxruntime", extra="encoders")
    elif config.get("quantization_config"):
        need_packages("torchao", extra="deploy")
    return labels


class Tagger:
    """A token classifier's folder, loaded as `load_served` does. Its methods may be called from several threads."""

    def __init__(self, folder: str | Path, threads: int | None = None, device: str = "cpu"):
        self.folder = Path(folder)
        self.labels = check_tagger(self.folder)
        need_packages("seqeval", extra="encoders")
        self.tokenizer = load_tokenizer(self.folder)
        self.run = load_served(self.folder, threads, device)
        self.max_length = min(512, positions(read_config(self.folder)))
        self._lock = threading.Lock()

    def tag(self, texts: list[Text], batch_size: int = 32) -> list[Tagged]:
        """The texts' entities, `batch_size` pieces of them at once.

        Entities are seqeval's, as in scores: `label` (a type), `text`, `start` and `end` (characters, the end not in
        it), `score` (the mean probability that the words' labels have). A word of which the tokenizer makes nothing is
        O, and the model is not sure of it at all (confidence 0).
        """
        features: list[dict[str, Any]] = []
        places = []
        with self._lock:  # a tokenizer that cuts is in one thread only
            for number, text in enumerate(texts):
                words = [text.text[start:end] for start, end in text.words]
                for ids, firsts in pieces_of(words, self.tokenizer, self.max_length) if words else ():
                    features.append({"input_ids": ids, "labels": [-100 if word is None else 0 for word in firsts]})
                    places.append((number, [word for word in firsts if word is not None]))
        labels = [["O"] * len(text.words) for text in texts]
        confidence = [[0.0] * len(text.words) for text in texts]
        logits = word_logits(self.run, features, self.tokenizer.pad_token_id or 0, batch_size)
        for (number, numbers), scores in zip(places, logits):
            best = scores.argmax(-1)
            sure = 1 / np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)
            for word, label, probability in zip(numbers, best, sure):
                labels[number][word], confidence[number][word] = self.labels[int(label)], float(probability)
        return [_tagged(*each) for each in zip(texts, labels, confidence)]


def _tagged(text: Text, labels: list[str], confidence: list[float]) -> Tagged:
    from seqeval.metrics.sequence_labeling import get_entities

    entities = []
    for label, first, last in get_entities(labels):
        start, end = text.words[first][0], text.words[last][1]
        score = float(np.mean(confidence[first : last + 1]))
        entities.append({"label": label, "text": text.text[start:end], "start": start, "end": end, "score": score})
    return Tagged(text.text, entities, labels, confidence)


def log_line(model: Path, tagged: Tagged, seconds: float, together: int = 1) -> str:
    """What is to be watched of a text that was tagged, as a line of JSON; nothing of the text itself is in it.

    time (UTC), model (its folder), latency (seconds of the call), together (texts of the call), words, labels (words by
    label), confidence and lowest (mean and least probability of the words' labels; null without words).
    """
    sure = tagged.confidence
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "model": str(model.resolve()),
        "latency": seconds,
        "together": together,
        "words": len(sure),
        "labels": dict(Counter(tagged.labels)),
        "confidence": float(np.mean(sure)) if sure else None,
        "lowest": min(sure, default=None),
    }
    return json.dumps(record) + "\n"
