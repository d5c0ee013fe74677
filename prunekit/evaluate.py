"""Measure checkpoints on a data set: token_acc and loss as ms-swift counts them, and what is really generated.

    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --dataset data/test.jsonl

token_acc looks good on a model whose generation has collapsed, so both are measured: teacher-forced over every row,
and greedy generation compared with the answer (exact match, character error rate).
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from prunekit import PLUGINS
from prunekit.arguments import Parser, device, finite_float, new_file, positive_int
from prunekit.checkpoint import Checkpoint, open_checkpoint, statistics, write_json
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.data.rows import Rows, check_messages, images_of, iterate, locate, problem_of_image
from prunekit.data.templates import find_template, load_template
from prunekit.errors import PruneKitError, run_script
from prunekit.model.scores import score_batches
from prunekit.msswift.line import check_names, check_rewards

DEFAULT_PLUGINS = tuple(PLUGINS / name for name in ("qwen_vl_token_ids.py", "gpt2_model.py"))


def read_rows(dataset: str | Path, limit: int | None = None) -> Rows:
    """The first rows of messages whose last one is the assistant's; PruneKitError names a row that isn't so."""
    rows = Rows(dataset)
    for where, row in islice(iterate(dataset), limit):
        check_messages(where, row)
        check_answered(where, row)
        rows.append(row)
    return rows


def check_answered(where: str, row: dict[str, Any]) -> None:
    """PruneKitError for messages that aren't a question, at the least, and an assistant's text."""
    if row["messages"][-1]["role"] != "assistant" or not isinstance(row["messages"][-1]["content"], str):
        raise PruneKitError(f"{where} ends without an assistant message to compare with")
    if len(row["messages"]) == 1:
        raise PruneKitError(f"{where} has no question before its answer")


def check_causal(checkpoint: Checkpoint) -> None:
    """PruneKitError for a model that predicts no next token."""
    if not checkpoint.family.causal:
        raise PruneKitError(
            f"{checkpoint.path}: {checkpoint.family.model_type} predicts no next token to score by; give a causal model"
        )


def load_plugins(plugins: Iterable[str | Path]) -> None:
    """Import ms-swift plugins the way its --external_plugins does."""
    from swift.utils import import_external_file

    for plugin in plugins:
        import_external_file(str(plugin))


def load_engine(model: str | Path, device: str | None = None, dtype: str | None = None, model_type: str | None = None,
                template: str | None = None):  # fmt: skip
    """An ms-swift TransformersEngine: `.model` in evaluation mode and `.template` to encode rows for it."""
    import torch
    from swift import TransformersEngine

    checkpoint = open_checkpoint(model)
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


def encode_row(template, row: dict[str, Any], dataset: str) -> dict[str, Any] | None:
    """A row with its answer as a model's input; None if it is too long. PruneKitError if an image of it is damaged."""
    from swift.template import MaxLengthError

    try:
        return template.encode(row)
    except MaxLengthError:
        return None
    except Exception as error:
        problems = (problem_of_image(image, decode=True) for image in images_of(row))
        problem = next(filter(None, problems), None)
        kinds = ValueError | TypeError | AttributeError | LookupError | AssertionError
        if not problem and isinstance(error, kinds):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problem = f"can't be encoded by ms-swift's {type(template).__name__} ({reason}): {json.dumps(row)[:100]}"
        if problem:
            raise PruneKitError(f"dataset {dataset}: a row {problem}") from error
        raise


def encode_rows(engine, rows: Rows) -> list[dict[str, Any] | None]:
    """Rows with their answers as the model's input; None for those that are longer than it takes."""
    from tqdm import tqdm

    engine.template.set_mode("train")
    return [encode_row(engine.template, row, rows.name) for row in tqdm(rows, desc="encode", leave=False, disable=None)]


def teacher_forced(engine, encoded: list[dict[str, Any]], batch_size: int = 64) -> dict[str, float]:
    """token_acc and mean loss (nats per token) over the answers' tokens, suffix tokens included, as ms-swift's eval.

    `encoded` is what `encode_rows` makes.
    """
    from tqdm import tqdm

    batches = (
        engine.template.data_collator([encoded[index] for index in batch])
        for batch in tqdm(batches_by_length(encoded, batch_size), desc="token_acc", leave=False, disable=None)
    )
    return score_batches(engine.model, batches)


def generate(
    engine, rows: Sequence[dict[str, Any]], batch_size: int = 64, max_new_tokens: int = 64
) -> tuple[list[str], int]:
    """Greedy answers to the rows' messages without the last, white space at the ends stripped; how many were cut.

    An answer is cut that has `max_new_tokens` tokens, and none that ends it.
    """
    from swift import InferRequest, RequestConfig

    engine.template.set_mode("transformers")
    engine.max_batch_size = batch_size
    requests = [InferRequest(messages=row["messages"][:-1], images=row.get("images") or []) for row in rows]
    config = RequestConfig(max_tokens=max_new_tokens, temperature=0, return_details=True)
    found = [response.choices[0] for response in engine.infer(requests, config, use_tqdm=sys.stderr.isatty())]
    eos = engine.generation_config.eos_token_id
    ends = {engine.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    cut = sum(choice.finish_reason == "length" and choice.token_ids[-1] not in ends for choice in found)
    return [choice.message.content.strip() for choice in found], cut


def score_answers(answers: list[str], rows: Sequence[dict[str, Any]], rewards: dict[str, float]) -> dict[str, float]:
    """Exact match, character error rate (edits per reference character) and, if rewards are named, their mean.

    `rewards` gives a weight to each reward that a loaded plugin registers in ms-swift; None (not applicable) counts 0,
    as in ms-swift's own sum.
    """
    from rapidfuzz.distance import Levenshtein
    from swift.rewards import orms

    truths = [row["messages"][-1]["content"].strip() for row in rows]
    edits = sum(Levenshtein.distance(answer, truth) for answer, truth in zip(answers, truths, strict=True))
    scores = {
        "exact_match": sum(map(str.__eq__, answers, truths)) / len(rows),
        "cer": edits / max(1, sum(map(len, truths))),
    }
    if rewards:
        columns = _columns(rows)
        values = [weight * sum(filter(None, orms[name]()(answers, **columns))) for name, weight in rewards.items()]
        scores["reward"] = sum(values) / len(rows)
    return scores


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What rewards get beside the answers: by column, one item a row."""
    return {key: [row.get(key) for row in rows] for key in rows[0] if key != "messages"}


def _check_columns(rewards: Iterable[str], rows: Rows) -> None:
    """PruneKitError if a reward can't score the first row's own answer: it needs a column that the data set lacks."""
    from swift.rewards import orms

    for name in rewards:
        try:
            orms[name]()([rows[0]["messages"][-1]["content"]], **_columns(rows[:1]))
        except (TypeError, ValueError, KeyError, AssertionError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise PruneKitError(f"--rewards {name}: can't score dataset {rows.name} ({reason})") from None


def _reward(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    return name, finite_float(weight) if equals else 1.0


def read_datasets(names: Sequence[str], limit: int | None) -> dict[str, Rows]:
    """Data sets by what results call them: the file's name without its ending, all that was named where that is no one's alone."""
    stems = [locate(name)[0].stem for name in names]
    keys = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise PruneKitError(f"--dataset {twice[0]}: is named twice")
    return {key: read_rows(name, limit) for key, name in zip(keys, names)}


def measure_model(
    model: Path,
    template: str | None,
    datasets: dict[str, Rows],
    rewards: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Scores by data set. Takes out of `datasets` what this model can't take: the next ones are compared on the same rows."""
    engine = load_engine(model, args.device, args.dtype, args.model_type, template)
    found = {}
    for name, rows in list(datasets.items()):
        encoded = encode_rows(engine, rows)
        rows = Rows(rows.name, (row for row, item in zip(rows, encoded, strict=True) if item))
        if not rows:
            raise PruneKitError(f"{name}: all rows are longer than {model} takes; give shorter ones")
        if too_long := len(encoded) - len(rows):
            print(f"{name}: {too_long} rows are longer than {model} takes, and left out", file=sys.stderr)
            datasets[name] = rows
        scores = teacher_forced(engine, list(filter(None, encoded)), args.batch_size)
        if not args.no_generate:
            answers, cut = generate(engine, rows, args.batch_size, args.max_new_tokens)
            scores |= score_answers(answers, rows, rewards) | {"n_cut": cut, "cut_share": cut / len(rows)}
            if cut:
                print(
                    f"warning: {name}: {cut} of {len(rows)} answers of {model} were cut at {args.max_new_tokens} tokens: "
                    "if right ones are as long, raise --max-new-tokens",
                    file=sys.stderr,
                )
        found[name] = scores
        values = "  ".join(
            f"{key} {value:d}" if isinstance(value, int) else f"{key} {value:.4f}" for key, value in scores.items()
        )
        print(f"{model}  {name} ({len(rows)} rows)  {values}", flush=True)
    return found


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        help="messages, one file or more: JSONL, or FILE#20 for 20 rows",
    )
    parser.add_argument("--limit", type=positive_int, help="rows of each data set to use (default: all)")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced only")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="of a generated answer (default: 64)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="rows (default: 64)")
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--plugins", nargs="*", type=Path, default=DEFAULT_PLUGINS)
    parser.add_argument(
        "--rewards",
        nargs="*",
        type=_reward,
        default=[],
        metavar="NAME[=WEIGHT]",
        help="also the mean of these rewards",
    )
    parser.add_argument("--json", type=new_file, help="also write the results here")
    args = parser.parse_args()
    rewards = dict(args.rewards)
    if rewards and args.no_generate:
        parser.error("--rewards are for what is generated: leave out --no-generate")

    checkpoints = [open_checkpoint(model) for model in args.model]
    for checkpoint in checkpoints:
        check_causal(checkpoint)
        check_no_remote_code(checkpoint.path)
    datasets = read_datasets(args.dataset, args.limit)
    check_rewards(rewards, args.plugins)
    check_names(args.model_type, args.template, args.plugins)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    load_plugins(args.plugins)
    for rows in datasets.values():
        _check_columns(rewards, rows)
    templates = [args.template or find_template(checkpoint, args.model_type) for checkpoint in checkpoints]
    for checkpoint, template in zip(checkpoints, templates):
        load_template(checkpoint, None, args.model_type, template)
    results = []
    for model, checkpoint, template in zip(args.model, checkpoints, templates):
        found = measure_model(model, template, datasets, rewards, args)
        gc.collect()  # an engine is a circle: it would stay beside the next one
        results.append({"model": str(model), "parameters": statistics(checkpoint)["parameters"], "datasets": found})
        if args.json:
            write_json(args.json, results)


if __name__ == "__main__":
    run_script(main)
