"""Rows as a model's inputs: texts by its tokenizer, messages by ms-swift's template."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import positions
from prunekit.model.light import light_transformers
from prunekit.msswift.extend import load_plugins
from prunekit.msswift.names import check_names

from .rows import Rows, images_of, is_text, problem_of_image
from .templates import check_tokenizer_files, load_template, tokenizer_errors


def as_trained(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of a row with the columns that ms-swift's data sets keep, each in the form that its templates get."""
    from swift.dataset import RowPreprocessor

    row = copy.deepcopy({name: value for name, value in row.items() if name in RowPreprocessor.standard_keys})
    RowPreprocessor._check_objects(row)
    RowPreprocessor._cast_mm_data(row)
    RowPreprocessor._normalize_tools(row)
    if row.get("images"):
        row["images"] = [{"bytes": None} | image if isinstance(image, dict) else image for image in images_of(row)]
    return row


def encode_row(template, row: dict[str, Any], dataset: str) -> dict[str, Any] | None:
    """A row with its answer as a model's input; None if it is too long. PruneKitError if an image of it is damaged."""
    from swift.template import MaxLengthError

    try:
        return template.encode(as_trained(row))
    except MaxLengthError:
        return None
    except Exception as error:
        problems = (problem_of_image(image, decode=True) for image in images_of(row))
        problem = next(filter(None, problems), None)
        kinds = ValueError | TypeError | AttributeError | LookupError | AssertionError | OSError  # the last: of URLs
        if not problem and isinstance(error, kinds):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problem = f"can't be encoded by ms-swift's {type(template).__name__} ({reason}): {json.dumps(row)[:100]}"
        if problem:
            raise PruneKitError(f"dataset {dataset}: a row {problem}") from error
        raise


@dataclass(frozen=True)
class Encoder:
    """`encode`: a row as a model's input with labels, None if it is too long; `collate`: several as a padded batch.

    `again`: a row that says all twice, of a long text its beginning; None where that is too long, or has pictures.
    """

    encode: Callable[[dict], dict | None]
    collate: Callable[[list[dict]], dict]
    again: Callable[[dict], dict | None]
    template: Any = None  # ms-swift's, for messages

    def see(self, model) -> None:
        """Have what M-RoPE's position ids are made by."""
        if self.template:
            self.template.model = model

    def for_rows(self, rows: Rows) -> "Encoder | None":
        """It for other rows, which errors name; None where one are texts, the others messages."""
        if is_text(rows[0]) == bool(self.template):
            return None
        return _of_template(self.template, rows.name) if self.template else self


def _text_encoder(checkpoint: Checkpoint, max_length: int) -> Encoder:
    transformers = light_transformers()
    with tokenizer_errors(checkpoint):
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
        check_tokenizer_files(checkpoint, tokenizer)
    # What is padded with is masked, and no label: any token will do
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def item(ids):
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    def encode(row):
        return item(tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"])

    def again(row):
        beginning = {"truncation": True, "max_length": max_length // 2}
        once = tokenizer(row["text"], **beginning)["input_ids"]
        return item(once + tokenizer(f"\n\n{row['text']}", add_special_tokens=False, **beginning)["input_ids"])

    return Encoder(encode, transformers.DataCollatorForSeq2Seq(tokenizer), again)


def _message_encoder(
    checkpoint: Checkpoint, name: str, max_length: int, model_type: str | None, template: str | None
) -> Encoder:
    check_names(model_type, template)
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    light_transformers()
    load_plugins()
    encoder = load_template(checkpoint, max_length, model_type, template)
    encoder.set_mode("train")
    return _of_template(encoder, name)


def _of_template(template: Any, name: str) -> Encoder:
    def again(row):
        if any(row.get(kind) for kind in ("images", "videos", "audios")):
            return None
        later = [message for message in row["messages"] if message["role"] != "system"]
        return encode_row(template, row | {"messages": [*row["messages"], *later]}, name)

    return Encoder(lambda row: encode_row(template, row, name), template.data_collator, again, template)


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
    if is_text(rows[0]):
        return _text_encoder(checkpoint, max_length)
    if not checkpoint.family.causal:
        raise PruneKitError(
            f"{checkpoint.config['model_type']} is an encoder, for which messages have no form: calibrate it on rows "
            '{"text": ...}'
        )
    return _message_encoder(checkpoint, rows.name, max_length, model_type, template)
