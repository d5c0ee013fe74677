"""Measure checkpoints on a data set: token_acc and loss as ms-swift counts them, and what is really generated.

    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --dataset data/test.jsonl

token_acc looks good on a model whose generation has collapsed, so both are measured: teacher-forced over every row,
and greedy generation compared with the answer (exact match, character error rate).
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import PLUGINS
from .arguments import Parser
from .chat_templates import find_template
from .checkpoint import open_checkpoint, statistics, write_json
from .errors import PruneKitError, run_script
from .preflight import check_dataset, check_no_remote_code, check_rewards

DEFAULT_PLUGINS = tuple(PLUGINS / name for name in ("qwen_vl_token_ids.py", "gpt2_model.py"))


def read_rows(dataset: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a messages JSONL whose last message is the assistant's; PruneKitError names a line that isn't so."""
    check_dataset(str(dataset))
    rows = []
    with Path(dataset).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) == limit:
                break
            row = json.loads(line)
            if row["messages"][-1]["role"] != "assistant":
                raise PruneKitError(
                    f"dataset {dataset} line {number} ends without an assistant message to compare with"
                )
            rows.append(row)
    return rows


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
    engine = TransformersEngine(
        str(checkpoint.path),
        torch_dtype=getattr(torch, dtype),
        device_map=device,
        model_type=model_type or checkpoint.config["model_type"],
        template_type=template or find_template(checkpoint, model_type),
    )
    engine.model.eval()
    engine.template.model = engine.model  # which makes the position ids of M-RoPE
    return engine


def batches_by_length(encoded: list[dict], batch_size: int) -> list[list[int]]:
    """Indexes of rows in batches of similar length, so that little is padded."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def model_inputs(model, batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as arguments of the model's forward: on its device, no labels, no cache."""
    not_inputs = ("labels", "text_position_ids", "loss_scale")  # the last two are for ms-swift's trainer
    inputs = {key: value for key, value in batch.items() if key not in not_inputs}
    moved = {key: value.to(model.device) for key, value in inputs.items() if hasattr(value, "to")}
    return inputs | moved | {"use_cache": False}


class _Final(Exception):
    """Carries what enters the output head."""


def final_states(model, batch: dict[str, Any]):
    """What the output head gets for a batch: (batch, length, hidden). The head itself isn't run."""

    def stop(_, inputs):
        raise _Final(inputs[0])

    with model.get_output_embeddings().register_forward_pre_hook(stop):
        try:
            model(**model_inputs(model, batch))
        except _Final as reached:
            return reached.args[0]
    raise RuntimeError(f"{type(model).__name__} doesn't call its output head")


def counted_states(states, labels):
    """The states that predict a label other than -100, (n, hidden), their labels (n,) and their rows in the batch (n,)."""
    labels = labels[:, 1:].to(states.device)
    counted = labels != -100
    return states[:, :-1][counted], labels[counted], counted.nonzero()[:, 0]


def logits_in_parts(model, states):
    """(slice, fp32 logits (part, vocabulary)) of states (n, hidden): parts that stay in a CPU's cache are twice as fast."""
    import torch

    head = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    size = 128 if states.device.type == "cpu" else 2048
    for start in range(0, len(states), size):
        logits = head(states[start : start + size]).float()
        yield slice(start, start + size), torch.tanh(logits / cap) * cap if cap else logits


def score_batches(model, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """token_acc and mean loss (nats per token) over all labels but -100, in batches of a causal model's inputs."""
    import torch

    right = total = 0
    loss = 0.0
    with torch.inference_mode():
        for batch in batches:
            states, labels, _ = counted_states(final_states(model, batch), batch["labels"])
            for part, logits in logits_in_parts(model, states):
                right += int((logits.argmax(-1) == labels[part]).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum"))
            total += len(labels)
    return {"token_acc": right / total, "loss": loss / total}


def encode_rows(engine, rows: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Rows with their answers as the model's input; None for those that are longer than it takes."""
    from swift.template import MaxLengthError
    from tqdm import tqdm

    engine.template.set_mode("train")
    encoded: list[dict[str, Any] | None] = []
    for row in tqdm(rows, desc="encode", leave=False, disable=None):
        try:
            encoded.append(engine.template.encode(row))
        except MaxLengthError:
            encoded.append(None)
    return encoded


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


def generate(engine, rows: list[dict[str, Any]], batch_size: int = 64, max_new_tokens: int = 64) -> list[str]:
    """Greedy answers to the rows' messages without the last, white space at the ends stripped."""
    from swift import InferRequest, RequestConfig

    engine.template.set_mode("transformers")
    engine.max_batch_size = batch_size
    requests = [InferRequest(messages=row["messages"][:-1], images=row.get("images", [])) for row in rows]
    config = RequestConfig(max_tokens=max_new_tokens, temperature=0)
    responses = engine.infer(requests, config, use_tqdm=sys.stderr.isatty())
    return [response.choices[0].message.content.strip() for response in responses]


def score_answers(
    answers: list[str], rows: list[dict[str, Any]], rewards: dict[str, float]
) -> dict[str, float]:
    """Exact match, character error rate (edits per reference character) and, if rewards are named, their mean.

    `rewards` gives a weight to each reward that a loaded plugin registers in ms-swift; None (not applicable) counts 0,
    as in ms-swift's own sum.
    """
    from rapidfuzz.distance import Levenshtein
    from swift.rewards import orms

    truths = [str(row["messages"][-1]["content"]).strip() for row in rows]
    edits = sum(Levenshtein.distance(answer, truth) for answer, truth in zip(answers, truths, strict=True))
    scores = {
        "exact_match": sum(map(str.__eq__, answers, truths)) / len(rows),
        "cer": edits / max(1, sum(map(len, truths))),
    }
    if rewards:
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "messages"}
        values = [
            weight * sum(filter(None, orms[name]()(answers, **columns))) for name, weight in rewards.items()
        ]
        scores["reward"] = sum(values) / len(rows)
    return scores


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument("--dataset", nargs="+", required=True, type=Path, help="messages JSONL, one or more")
    parser.add_argument("--limit", type=int, help="rows of each data set to use (default: all)")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced only")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--plugins", nargs="*", type=Path, default=DEFAULT_PLUGINS)
    parser.add_argument(
        "--rewards", nargs="*", default=[], metavar="NAME[=WEIGHT]", help="also the mean of these rewards"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()

    counts = {model: statistics(model) for model in args.model}
    datasets = {dataset.stem: read_rows(dataset, args.limit) for dataset in args.dataset}
    rewards = {
        name: float(weight or 1) for name, _, weight in (reward.partition("=") for reward in args.rewards)
    }
    check_rewards(rewards, args.plugins)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    load_plugins(args.plugins)
    results = []
    for model in args.model:
        engine = load_engine(model, args.device, args.dtype, args.model_type, args.template)
        result = {"model": str(model), "parameters": counts[model]["parameters"], "datasets": {}}
        for name, rows in list(datasets.items()):
            encoded = encode_rows(engine, rows)
            rows = [row for row, item in zip(rows, encoded, strict=True) if item]
            if not rows:
                raise PruneKitError(f"{name}: all rows are longer than {model} takes; give shorter ones")
            if too_long := len(encoded) - len(rows):
                print(f"{name}: {too_long} rows are longer than {model} takes, and left out", file=sys.stderr)
                datasets[name] = rows  # the next models are compared on the same rows
            scores = teacher_forced(engine, list(filter(None, encoded)), args.batch_size)
            if not args.no_generate:
                answers = generate(engine, rows, args.batch_size, args.max_new_tokens)
                scores |= score_answers(answers, rows, rewards)
            result["datasets"][name] = scores
            values = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
            print(f"{model}  {name} ({len(rows)} rows)  {values}", flush=True)
        results.append(result)
        if args.json:
            write_json(args.json, results)


if __name__ == "__main__":
    run_script(main)
