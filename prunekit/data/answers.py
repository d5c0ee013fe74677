"""What a model answers, by ms-swift's engine, and how good that is."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint import open_checkpoint
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError
from prunekit.families import positions
from prunekit.model.scores import score_batch

from .encode import as_trained, encode_row
from .figures import Figures, chosen, means, perplexity
from .groups import indices_by_group
from .rewards import call_reward, columns_for, failure, guard
from .rows import Rows, is_text, question_of
from .templates import find_template

MAX_LENGTH = 2048  # tokens of a window of text


def load_engine(model: str | Path, device: str | None = None, dtype: str | None = None, model_type: str | None = None,
                template: str | None = None):  # fmt: skip
    """An ms-swift TransformersEngine: `.model` in evaluation mode and `.template` to encode rows for it."""
    import torch
    from swift import TransformersEngine

    checkpoint = open_checkpoint(model, quantised=True)
    check_no_remote_code(checkpoint.path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device != "cpu" else "float32")
    own = checkpoint.config["model_type"]
    try:
        engine = TransformersEngine(
            str(checkpoint.path),
            torch_dtype=getattr(torch, dtype),
            device_map=device,
            model_type=model_type or own,
            template_type=template or find_template(checkpoint, model_type),
        )
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        if model_type in (None, own):
            raise
        raise PruneKitError(f"--model-type {model_type}: {checkpoint.path} is none ({error})") from error
    engine.model.eval()
    engine.template.model = engine.model  # which makes the position ids of M-RoPE
    return engine


def batches_by_length(encoded: list[dict], batch_size: int) -> list[list[int]]:
    """Indexes of rows in batches of similar length, so that little is padded."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def encode_rows(engine, rows: Rows) -> list[dict[str, Any] | None]:
    """Rows with their answers as the model's input; None for those that are longer than it takes."""
    from tqdm import tqdm

    engine.template.set_mode("train")
    return [encode_row(engine.template, row, rows.name) for row in tqdm(rows, desc="encode", leave=False, disable=None)]


def teacher_forced(engine, encoded: list[dict[str, Any]], batch_size: int = 64) -> Figures:
    """token_acc and loss (nats per token) over the answers' tokens, suffix tokens included, as ms-swift's eval.

    `encoded` is what `encode_rows` makes; so are the rows of the figures.
    """
    from tqdm import tqdm

    right, losses, tokens = np.zeros((3, len(encoded)))
    for batch in tqdm(batches_by_length(encoded, batch_size), desc="token_acc", leave=False, disable=None):
        found = score_batch(engine.model, engine.template.data_collator([encoded[index] for index in batch]))
        counted, lost, rows = (values.cpu().numpy() for values in found)
        places = np.array(batch)[rows]
        np.add.at(right, places, counted)
        np.add.at(losses, places, lost)
        np.add.at(tokens, places, 1)
    return {"token_acc": (right, tokens), "loss": (losses, tokens)}


def generate(
    engine,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 64,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
) -> tuple[list[str], list[bool]]:
    """Answers to the rows' messages without their answer, white space at the ends stripped; which of them were cut.

    They are greedy at temperature 0. An answer is cut that has `max_new_tokens` tokens, and none that ends it.
    """
    from swift import InferRequest, RequestConfig

    engine.template.set_mode("transformers")
    engine.max_batch_size = batch_size
    names = {each.name for each in fields(InferRequest)}  # messages, images, videos, tools, ...
    given = ({name: value for name, value in as_trained(row).items() if name in names and value} for row in rows)
    requests = [InferRequest(**each | {"messages": question_of(each["messages"])}) for each in given]
    config = RequestConfig(max_tokens=max_new_tokens, temperature=temperature, return_details=True)
    found = [response.choices[0] for response in engine.infer(requests, config, use_tqdm=sys.stderr.isatty())]
    eos = engine.generation_config.eos_token_id
    ends = {engine.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    cut = [choice.finish_reason == "length" and choice.token_ids[-1] not in ends for choice in found]
    return [choice.message.content.strip() for choice in found], cut


def encode_texts(engine, rows: Rows, max_length: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Texts, rows {"text": ...}, as the model's input: windows of `max_length` tokens, and the place of each one's row.

    Tokens are the tokenizer's own, a first one that it puts before a text included. Each window begins anew: its first
    token is told by nothing, and not counted.
    """
    from tqdm import tqdm

    windows, places = [], []
    for place, row in enumerate(tqdm(rows, desc="encode", leave=False, disable=None)):
        ids = engine.tokenizer(row["text"])["input_ids"]
        for start in range(0, len(ids), max_length):
            if len(window := ids[start : start + max_length]) > 1:
                windows.append({"input_ids": window, "labels": [-100, *window[1:]], "length": len(window)})
                places.append(place)
    return windows, places


def judge_texts(engine, rows: Rows, batch_size: int = 64, max_length: int = MAX_LENGTH) -> "Judged":
    """token_acc and loss of texts, in windows of `max_length` tokens, at most as many as the model has positions."""
    max_length = min(max_length, positions(engine.model.config.to_dict(), max_length))
    windows, places = encode_texts(engine, rows, max_length)
    kept = sorted(set(places))  # a text of one token says nothing
    taken = Rows(rows.name, (rows[place] for place in kept))
    if not taken:
        return Judged(taken, {})
    index = np.searchsorted(kept, places)
    engine.template.set_mode("train")
    figures: Figures = {}
    for name, parts in teacher_forced(engine, windows, batch_size).items():
        above, below = (np.bincount(index, part, len(kept)) for part in parts)  # of rows, not of windows
        figures[name] = above, below
    return Judged(taken, figures)


def figures_of_answers(answers: list[str], rows: Sequence[dict[str, Any]], rewards: dict[str, float]) -> Figures:
    """Exact match, character error rate (edits per reference character) and, if rewards are named, their sum.

    Answers and truths are compared in Unicode's NFC: Qwen's tokenizer, say, writes no accent as a character of its own.
    `rewards` gives a weight to each reward that a loaded plugin registers in ms-swift; None (not applicable) counts 0,
    as in ms-swift's own sum, and so does a row that it fails on.
    """
    from rapidfuzz.distance import Levenshtein
    from swift.rewards import orms

    given = [row["messages"][-1]["content"] for row in rows]
    said, truths = ([unicodedata.normalize("NFC", text).strip() for text in texts] for texts in (answers, given))
    ones = np.ones(len(rows))
    figures = {
        "exact_match": (np.array([*map(str.__eq__, said, truths)], float), ones),
        "cer": (np.array([*map(Levenshtein.distance, said, truths)], float), np.array([*map(len, truths)], float)),
    }
    if rewards:
        columns, total = columns_for(rows)(answers, list(range(len(rows)))), np.zeros(len(rows))
        for name, weight in rewards.items():
            values = call_reward(guard(orms[name](), name), answers, columns)
            total += weight * np.array([value or 0.0 for value in values])
        figures["reward"] = (total, ones)
    return figures


def score_answers(answers: list[str], rows: Sequence[dict[str, Any]], rewards: dict[str, float]) -> dict[str, float]:
    """The means of `figures_of_answers`."""
    return means(figures_of_answers(answers, rows, rewards))


@dataclass(frozen=True)
class Judged:
    """What a model makes of a data set: of the rows that it takes."""

    rows: Rows
    figures: Figures
    answers: list[str] = field(default_factory=list)  # none where nothing was generated
    cut: list[bool] = field(default_factory=list)  # of each of them, as `generate` says

    def among(self, rows: Rows) -> "Judged":
        """The same of some of these rows, in their order."""
        places = {id(row): place for place, row in enumerate(self.rows)}
        index = [places[id(row)] for row in rows]
        answers = [self.answers[place] for place in index] if self.answers else []
        cut = [self.cut[place] for place in index] if self.cut else []
        return replace(self, rows=rows, figures=chosen(self.figures, index), answers=answers, cut=cut)

    def scores(self, by: str | None = None) -> dict[str, Any]:
        """Means over all rows, and the answers' `tokens`. Of texts the loss is said as perplexity, too.

        With `by`, a column: its `groups` have the same means of their rows, and their `samples`.
        """

        def of(figures: Figures) -> dict[str, Any]:
            found = means(figures)
            return found | ({"perplexity": perplexity(found["loss"])} if is_text(self.rows[0]) else {})

        scores = of(self.figures)
        if "loss" in self.figures:
            scores["tokens"] = int(self.figures["loss"][1].sum())
        if self.answers:
            scores |= {"n_cut": sum(self.cut), "cut_share": sum(self.cut) / len(self.rows)}
        if by:
            scores["groups"] = {
                group: of(chosen(self.figures, places)) | {"samples": len(places)}
                for group, places in sorted(indices_by_group(self.rows, by).items())
            }
        return scores


def judge(
    engine,
    rows: Rows,
    rewards: dict[str, float],
    batch_size: int = 64,
    max_new_tokens: int | None = 64,
    max_length: int = MAX_LENGTH,
) -> Judged:
    """Teacher-forced figures and, unless `max_new_tokens` is None, those of greedy answers. Texts: `judge_texts`."""
    if is_text(rows[0]):
        return judge_texts(engine, rows, batch_size, max_length)
    encoded = encode_rows(engine, rows)
    taken = Rows(rows.name, (row for row, item in zip(rows, encoded, strict=True) if item))
    if not taken:
        return Judged(taken, {})
    figures = teacher_forced(engine, list(filter(None, encoded)), batch_size)
    if max_new_tokens is None:
        return Judged(taken, figures)
    answers, cut = generate(engine, taken, batch_size, max_new_tokens)
    return Judged(taken, figures | figures_of_answers(answers, taken, rewards), answers, cut)


def check_columns(rewards: Iterable[str], rows: Rows) -> None:
    """PruneKitError if a reward can't score the first row's own answer: it needs a column that the data set lacks."""
    from swift.rewards import orms

    truth = [rows[0]["messages"][-1]["content"]]
    for name in rewards:
        try:
            call_reward(orms[name](), truth, columns_for(rows)(truth, [0]))
        except Exception as error:
            raise PruneKitError(f"--rewards {name}: can't score dataset {rows.name}: it {failure(error)}") from None
