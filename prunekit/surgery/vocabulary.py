"""Cut a vocabulary: fewer tokens, and of embedding and output head only their rows."""

import copy
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prunekit.checkpoint import Checkpoint, Outline
from prunekit.errors import PruneKitError
from prunekit.families import configs

from .cut import Account, OfPlan
from .vocabulary_files import (
    Tokenizer,
    changed_files,
    closure,
    fewer,
    ids_in,
    read_tokenizer,
    side_configs,
    staying,
    with_ids,
    written,
)

MULTIPLE = 64  # of rows, as GPUs like a matrix to have


@dataclass(frozen=True)
class VocabularyPlan:
    source: Checkpoint
    outline: Outline  # of what will come out
    tokenizer: Tokenizer
    rows: int  # of the embedding in what comes out, and so tokens but for padding
    stays: frozenset[int]  # ids of the tokens that no cut may take
    notes: list[str] = field(default_factory=list)

    @property
    def rows_before(self) -> int:
        return rows_of(self.source)


@dataclass(frozen=True)
class VocabularyCut(OfPlan):
    """A checkpoint whose embedding and head have fewer rows, and whose tokenizer has as few tokens."""

    plan: VocabularyPlan
    result: Checkpoint
    kept: list[int]  # old ids in the order of the new ones
    tokenizer: Tokenizer
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def account(self) -> Account:
        removed = {"tokens": self.plan.rows_before - self.plan.rows}
        return Account("vocab_cut", removed, self.metrics or None, {"size": self.plan.rows} | self.settings)


def row_tensors(checkpoint: Outline) -> list[str]:
    """The names of the tensors with a row a token: embedding, output head and its bias."""
    return [name for name in checkpoint.tensors if re.fullmatch(checkpoint.family.vocabulary, name)]


def rows_of(checkpoint: Outline) -> int:
    """How many rows they all have; PruneKitError if they haven't the same number."""
    names = row_tensors(checkpoint)
    counts = {checkpoint.tensors[name].shape[:1] for name in names}
    if len(counts) != 1 or counts == {()}:
        raise PruneKitError(
            f"{checkpoint.path}: {', '.join(names) or 'no embedding'}: not the same number of rows in all; the folder "
            "is damaged, copy or download it again"
        )
    return counts.pop()[0]


def _with_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config with the ids that transformers takes where it names none: they are to be renumbered, too."""
    config = copy.deepcopy(checkpoint.config)
    said = {key for part in (config, *configs(config, checkpoint.family.text)) for key in part}
    rows = rows_of(checkpoint)
    return config | {
        key: number for key, number in checkpoint.family.token_ids.items() if key not in said and number < rows
    }


def plan_vocabulary(
    checkpoint: Checkpoint, size: int | None = None, share: float | None = None, multiple: int = MULTIPLE
) -> VocabularyPlan:
    """Plan to keep `size` tokens, or this share of the embedding's rows, rounded up to a `multiple`.

    Raises PruneKitError if that is more than there are, or less than what must stay; for a folder without a
    tokenizer.json, or with one that doesn't fit the model. Reads no weights and writes no file.
    """
    if (size is None) == (share is None):
        raise PruneKitError("say how many tokens to keep: --size or --keep-share")
    before, tokenizer = rows_of(checkpoint), read_tokenizer(checkpoint)
    spoken = written(tokenizer)
    # An added token without a row is never used (Gemma 3's 1B has its larger sisters' token of images); others would be
    last = max((*tokenizer.ids.values(), *spoken), default=-1)
    if last >= before:
        raise PruneKitError(
            f"{tokenizer.folder / 'tokenizer.json'}: {tokenizer.tokens.get(last)!r} is token {last}, the model has "
            f"rows for {before}: copy the tokenizer of the same model"
        )
    said = f"--size {size}" if size is not None else f"--keep-share {share:g}"
    wanted = size if size is not None else round(before * (share or 0))
    rows = -(-max(1, wanted) // multiple) * multiple
    if rows >= before:
        rounded = f", rounded up to a multiple of {multiple} that is {rows:,}" if rows != wanted else ""
        raise PruneKitError(f"{said}: the model has {before:,} tokens{rounded}; nothing to cut")
    config = _with_defaults(checkpoint)
    named = [ids_in(each) for each in (config, *side_configs(checkpoint.path).values())]
    named.append(set(range(checkpoint.family.first_position)))  # positions are counted from padding's number on
    stays = staying(tokenizer, spoken.union(*named)) & set(range(before))
    if len(stays) > rows:
        raise PruneKitError(
            f"{said}: {len(stays):,} tokens must stay: characters or bytes, special and added tokens, what the chat "
            f"template writes; keep so many or more"
        )
    notes = [f"{rows:,} tokens are kept: {wanted:,} rounded up to a multiple of {multiple}"] * (rows != wanted)
    shapes = checkpoint.shapes()
    for name in row_tensors(checkpoint):
        shapes[name] = replace(shapes[name], shape=(rows, *shapes[name].shape[1:]))
    outline = Outline(checkpoint.path, _sized(config, before, rows), shapes)
    return VocabularyPlan(checkpoint, outline, tokenizer, rows, frozenset(stays), notes)


def _sized(value: Any, before: int, rows: int) -> Any:
    """A config with the vocabulary's size changed, wherever it says it."""
    if not isinstance(value, dict):
        return value
    return {
        key: rows if (key, each) == ("vocab_size", before) else _sized(each, before, rows)
        for key, each in value.items()
    }


def gains(tokenizer: Tokenizer, uses: Mapping[int, int]) -> dict[int, int]:
    """By id, how many tokens more the text would have without each; uses: how often it has which.

    Of BPE that is how often a merge is applied, also on the way to a longer token: each time it saves one.
    """
    gained = dict(uses)
    for number in sorted(tokenizer.parts, key=lambda number: -len(tokenizer.tokens[number])):
        for part in tokenizer.parts[number] if gained.get(number) else ():
            gained[part] = gained.get(part, 0) + gained[number]
    if tokenizer.falls_back:  # a character alone stands for its bytes, but never for less than what is made of it
        for token, number in tokenizer.ids.items():
            if len(token) == 1 and number in gained:
                gained[number] *= max(1, len(token.encode("utf-8", "surrogatepass")) - 1)
    return gained


def choose(plan: VocabularyPlan, uses: Mapping[int, int]) -> list[int]:
    """The old ids that stay, in their order: with every token what it is made of.

    Those that gain most; of equals, such as those that the text doesn't use, what the tokenizer's makers counted more
    often, which has the lower number. Rows without a token come last: they are padding.
    """
    tokenizer, gained = plan.tokenizer, gains(plan.tokenizer, uses)
    kept = set(plan.stays)

    def order(number: int) -> tuple[bool, int, int]:
        return number not in tokenizer.tokens, -gained.get(number, 0), number

    for number in sorted(range(plan.rows_before), key=order):
        if len(kept) == plan.rows:
            break
        if number not in kept and len(more := closure(tokenizer, number, kept)) <= plan.rows - len(kept):
            kept |= more
    return sorted(kept)


def cut_vocabulary(plan: VocabularyPlan, uses: Mapping[int, int]) -> VocabularyCut:
    """Keep the tokens that a text needs most, which has each so often (`vocabulary_fit.count_uses`)."""
    source, kept = plan.source, choose(plan, uses)
    new = {old: number for number, old in enumerate(kept)}
    beyond = plan.rows - plan.rows_before
    new |= {old: old + beyond for old in plan.tokenizer.tokens if old >= plan.rows_before}  # they still have no row
    after = fewer(plan.tokenizer, new)
    config = with_ids(plan.outline.config, lambda number: new.get(number, number))
    tensors = dict(source.tensors)
    for name in row_tensors(source):
        shape = plan.outline.tensors[name].shape
        tensors[name] = replace(tensors[name], shape=shape, compute=partial(_rows, source, name, kept))
    files = changed_files(plan.tokenizer, after, new)
    return VocabularyCut(plan, replace(source, config=config, tensors=tensors, files=files), kept, after)


def _rows(source: Checkpoint, name: str, kept: Collection[int]) -> memoryview:
    """The bytes of these rows, in this order: only they are read."""
    tensor = source.tensors[name]
    width = tensor.nbytes // tensor.shape[0]
    data = bytearray(width * len(kept))
    view, place = memoryview(data), 0
    with tensor.file.open("rb") as file:
        for start, count in _runs(kept):
            size = count * width
            if os.preadv(file.fileno(), [view[place : place + size]], tensor.start + start * width) != size:
                raise PruneKitError(f"{tensor.file}: shorter than its header says; copy or download it again")
            place += size
    return view


def _runs(numbers: Collection[int]) -> list[tuple[int, int]]:
    """(first, how many) of neighbours in a rising list."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs
