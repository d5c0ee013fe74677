"""Calibration data: rows of text or messages as batches of model inputs, and a model to run them through."""

import argparse
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunekit.arguments import device, positive_int
from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import positions
from prunekit.model.load import check_causal, load_model

from .encode import Encoder, encoder_of
from .rows import ROWS_CHECKED, Rows, check_row, is_text

HELD_OUT = 5  # every fifth row only judges
BESIDE_CALIB = ("calib_tokens", "max_length", "device", "dtype", "model_type", "template")  # flags of no use without it


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs with labels (-100: not counted), on the CPU: to fit on, and to judge by."""

    fit: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    tokens: int
    record: dict[str, Any] = field(default_factory=dict)  # of the rows, for histories: path, sha256, count
    repeat: float = 0.0  # share of the rows that were to say all twice


def read_calibration(dataset: str | Path) -> Rows:
    """Rows of a data set, all {"text": ...} or all ms-swift messages. PruneKitError names a row that is neither."""
    rows = Rows(dataset)

    def check(where: str, row: Any) -> None:
        check_row(where, row, is_text((rows or [row])[0]), images=len(rows) < ROWS_CHECKED)

    if len(rows.read(check)) < HELD_OUT:
        raise PruneKitError(f"dataset {dataset} has {len(rows)} rows; give hundreds")
    return rows


def into_batches(items: list[dict], batch_tokens: int) -> list[list[dict]]:
    """Items of similar length together, so that little is padded: at most `batch_tokens` a batch, padding included."""
    groups: list[list[dict]] = []
    for item in sorted(items, key=lambda item: len(item["input_ids"])):
        if not groups or len(item["input_ids"]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


def draw_rows(rows: Rows, encode: Callable[[dict], dict | None], max_tokens: int | None) -> list[dict]:
    """Rows in a seeded random order, encoded, up to about `max_tokens` tokens (None: all).

    Left out is what is too long, and what has no label to be judged by: a question alone.
    """
    drawn, encoded, tokens = list(rows), [], 0
    random.Random(0).shuffle(drawn)
    for row in tqdm(drawn, desc="encode", leave=False, disable=None):
        if max_tokens is not None and tokens >= max_tokens:
            break
        if (item := encode(row)) and any(label != -100 for label in item["labels"][1:]):
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
    repeat: float = 0.0,
) -> Calibration:
    """Batches of similar length of a calibration set, in all about `max_tokens` tokens (image tokens included).

    Rows, or those of a file, are drawn in a seeded random order and encoded by `encoder` (default: `encoder_of`'s);
    this share of them (`repeat`) says all it says twice, where it can. Raises PruneKitError for bad rows.
    """
    rows = dataset if isinstance(dataset, Rows) else read_calibration(dataset)
    max_length = min(max_length, positions(checkpoint.config, max_length))
    encoder = encoder or encoder_of(checkpoint, rows, max_length, model_type, template)
    encoder.see(model)
    number = itertools.count()

    def encode(row: dict) -> dict | None:
        share = next(number) * repeat
        return int(share + repeat) > int(share) and encoder.again(row) or encoder.encode(row)

    encoded = draw_rows(rows, encode, max_tokens)
    if len(encoded) < HELD_OUT:
        raise PruneKitError(
            f"dataset {rows.name}: {len(encoded)} of its rows have text or an answer and fit into {max_length} tokens "
            f"and {max_tokens} in all; give rows with answers, or raise --max-length or --calib-tokens"
        )

    def batches(items: list[dict]) -> list[dict[str, Any]]:
        return [dict(encoder.collate(group)) for group in into_batches(items, batch_tokens)]

    fit = [item for number, item in enumerate(encoded) if number % HELD_OUT]
    tokens = sum(len(item["input_ids"]) for item in encoded)
    return Calibration(batches(fit), batches(encoded[::HELD_OUT]), tokens, rows.record, repeat)


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
    repeat: float = 0.0,
) -> tuple[Any, Calibration]:
    """The model and its calibration data, as `add_calibration_arguments` lets a user choose them; see `calibrate`."""
    if checkpoint.family.causal:
        check_causal(checkpoint)
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
        repeat=repeat,
    )
    return model, data
