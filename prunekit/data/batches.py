"""Calibration data: rows of text or messages as batches of model inputs, and a model to run them through."""

import argparse
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunekit.arguments import device, positive_int
from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import positions
from prunekit.model.load import load_model
from prunekit.msswift.line import check_names

from .rows import ROWS_CHECKED, Rows, check_messages, iterate
from .templates import check_tokenizer_files, load_template, tokenizer_errors

HELD_OUT = 5  # every fifth row only judges


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs with labels (-100: not counted), on the CPU: to fit on, and to judge by."""

    fit: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    tokens: int


def read_calibration(dataset: str | Path) -> Rows:
    """Rows of a data set, all {"text": ...} or all ms-swift messages. PruneKitError names a row that is neither."""
    rows = Rows(dataset)
    for where, row in iterate(dataset):
        if not isinstance(row, dict) or ("text" in row) != ("text" in (rows or [row])[0]):
            raise PruneKitError(f'{where}: rows must all be {{"text": ...}}, or all have "messages"')
        if "text" not in row:
            check_messages(where, row, images=len(rows) < ROWS_CHECKED)
        elif not (isinstance(row["text"], str) and row["text"].strip()):
            raise PruneKitError(f"{where} has no text")
        rows.append(row)
    if len(rows) < HELD_OUT:
        raise PruneKitError(f"dataset {dataset} has {len(rows)} rows; give hundreds")
    return rows


@dataclass(frozen=True)
class Encoder:
    """`encode`: a row as a model's input with labels, None if it is too long; `collate`: several as one padded batch."""

    encode: Callable[[dict], dict | None]
    collate: Callable[[list[dict]], dict]
    template: Any = None  # ms-swift's, for messages

    def see(self, model) -> None:
        """Have what M-RoPE's position ids are made by."""
        if self.template:
            self.template.model = model


def _text_encoder(checkpoint: Checkpoint, max_length: int) -> Encoder:
    from transformers import AutoTokenizer
    from transformers.data import DataCollatorForSeq2Seq

    with tokenizer_errors(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        check_tokenizer_files(checkpoint, tokenizer)
    # What is padded with is masked, and no label: any token will do
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def encode(row):
        ids = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    return Encoder(encode, DataCollatorForSeq2Seq(tokenizer))


def _message_encoder(
    checkpoint: Checkpoint, name: str, max_length: int, model_type: str | None, template: str | None
) -> Encoder:
    from prunekit.evaluate import DEFAULT_PLUGINS, encode_row, load_plugins

    check_names(model_type, template, DEFAULT_PLUGINS)
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    load_plugins(DEFAULT_PLUGINS)
    encoder = load_template(checkpoint, max_length, model_type, template)
    encoder.set_mode("train")
    return Encoder(lambda row: encode_row(encoder, row, name), encoder.data_collator, encoder)


def encoder_of(
    checkpoint: Checkpoint,
    rows: Rows,
    max_length: int,
    model_type: str | None = None,
    template: str | None = None,
) -> Encoder:
    """What makes a model's inputs of these rows; it has to `see` the model before it encodes.

    Texts are cut to `max_length` tokens, at most to the model's positions; messages, encoded by ms-swift's template
    (`model_type` and `template` are ms-swift's), are refused if longer. PruneKitError for messages for an encoder, and
    for a checkpoint without its tokenizer.
    """
    max_length = min(max_length, positions(checkpoint.config, max_length))
    if "text" in rows[0]:
        return _text_encoder(checkpoint, max_length)
    if not checkpoint.family.causal:
        raise PruneKitError(
            f"{checkpoint.config['model_type']} is an encoder, for which messages have no form: calibrate it on rows "
            '{"text": ...}'
        )
    return _message_encoder(checkpoint, rows.name, max_length, model_type, template)


def into_batches(items: list[dict], batch_tokens: int) -> list[list[dict]]:
    """Items of similar length together, so that little is padded: at most `batch_tokens` a batch, padding included."""
    groups: list[list[dict]] = []
    for item in sorted(items, key=lambda item: len(item["input_ids"])):
        if not groups or len(item["input_ids"]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


def draw_rows(rows: Rows, encode: Callable[[dict], dict | None], max_tokens: int | None) -> list[dict]:
    """Rows in a seeded random order, encoded, until they have about `max_tokens` tokens (None: all). Too long: left out."""
    rows, encoded, tokens = list(rows), [], 0
    random.Random(0).shuffle(rows)
    for row in tqdm(rows, desc="encode", leave=False, disable=None):
        if max_tokens is not None and tokens >= max_tokens:
            break
        if (item := encode(row)) and len(item["input_ids"]) > 1:
            encoded.append(item)
            tokens += len(item["input_ids"])
    return encoded


def calibrate(
    model,
    checkpoint: Checkpoint,
    dataset: str | Path | Rows,
    max_tokens: int = 65_536,
    max_length: int = 512,
    batch_tokens: int = 4096,
    model_type: str | None = None,
    template: str | None = None,
    encoder: Encoder | None = None,
) -> Calibration:
    """Batches of similar length of a calibration set, in all about `max_tokens` tokens (image tokens included).

    Rows, or those of a file, are drawn in a seeded random order and encoded by `encoder` (default: `encoder_of`'s).
    Raises PruneKitError for bad rows.
    """
    rows = dataset if isinstance(dataset, Rows) else read_calibration(dataset)
    max_length = min(max_length, positions(checkpoint.config, max_length))
    encoder = encoder or encoder_of(checkpoint, rows, max_length, model_type, template)
    encoder.see(model)
    encoded = draw_rows(rows, encoder.encode, max_tokens)
    if len(encoded) < HELD_OUT:
        raise PruneKitError(
            f"dataset {rows.name}: {len(encoded)} of its rows fit into {max_length} tokens and {max_tokens} in all; raise --max-length or --calib-tokens"
        )

    def batches(items: list[dict]) -> list[dict[str, Any]]:
        return [dict(encoder.collate(group)) for group in into_batches(items, batch_tokens)]

    fit = [item for number, item in enumerate(encoded) if number % HELD_OUT]
    tokens = sum(len(item["input_ids"]) for item in encoded)
    return Calibration(batches(fit), batches(encoded[::HELD_OUT]), tokens)


def add_calibration_arguments(group) -> None:
    """What a script's user can say of calibration: to an argparse parser, or a group of one."""
    group.add_argument(
        "--calib", metavar="JSONL", help='ms-swift messages, or {"text": ...}, like the data the model is for'
    )
    group.add_argument("--calib-tokens", type=positive_int, default=65_536, metavar="N", help="(default: 65536)")
    group.add_argument("--max-length", type=positive_int, default=2048, metavar="N", help="of a row (default: 2048)")
    group.add_argument("--device", type=device, help="default: cuda if there is one")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in")
    group.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    group.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")


def model_and_calibration(
    checkpoint: Checkpoint,
    arguments: argparse.Namespace,
    offload: str | Path | None = None,
    batch_tokens: int = 4096,
) -> tuple[Any, Calibration]:
    """The model and its calibration data, as `add_calibration_arguments` lets a user choose them."""
    rows = read_calibration(arguments.calib)  # what is bad is named before the model is loaded
    names = arguments.model_type, arguments.template
    encoder = encoder_of(checkpoint, rows, arguments.max_length, *names)
    model = load_model(checkpoint, arguments.device, arguments.dtype, offload)
    data = calibrate(
        model,
        checkpoint,
        rows,
        arguments.calib_tokens,
        arguments.max_length,
        batch_tokens,
        encoder=encoder,
    )
    return model, data
