"""Run and measure a folder as it is served, whatever it holds: safetensors, torchao's INT8 safetensors, or ONNX.

    python -m prunekit.serving.run < job.json > result.json

`deploy.py` starts this once for each model, so that a model's memory is its own process's and ONNX models run without
torch. Peak memory is what Linux counts (VmHWM): weights, activations, and the libraries that this way of serving needs.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint import read_config
from prunekit.errors import PruneKitError
from prunekit.rules import short

ONNX = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
# Classes that return something else, whatever their family
NO_LOGITS = re.compile(r".*(?:(?<!LMHead)Model|ForPreTraining|ForQuestionAnswering)")
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # the inputs (batch, length) to logits (batch, length, n)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a served folder's weights."""
    onnx = folder / ONNX
    return [onnx] if onnx.is_file() else sorted(folder.glob("model*.safetensors"))


def _onnx(folder: Path, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / ONNX, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["logits"], inputs)[0]


def _torch(folder: Path, threads: int | None, device: str) -> Run:
    import torch
    import transformers

    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = model_class(read_config(folder)).from_pretrained(folder, dtype="auto").to(device).eval()
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    @torch.inference_mode()
    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {key: torch.from_numpy(value).to(device) for key, value in inputs.items()}
        return model(**tensors, **extra).logits.float().cpu().numpy()

    return run


def model_class(config: dict[str, Any]):
    """transformers' class of a config; PruneKitError if it names none that transformers has, or one without logits."""
    import transformers

    names = config.get("architectures") or ["none"]
    if not hasattr(transformers, names[0]):
        raise PruneKitError(f"config.json: architectures {short(names)}: transformers has no such class")
    if NO_LOGITS.fullmatch(names[0]):
        raise PruneKitError(
            f"{names[0]} gives no logits of tokens or labels, which is what is served here; give a model with a head"
        )
    return getattr(transformers, names[0])


def load_served(folder: str | Path, threads: int | None = None, device: str = "cpu") -> Run:
    """A folder as one function from input_ids and attention_mask (int64) to float32 logits. ONNX runs on the CPU.

    `threads`: default is what torch and onnxruntime take by themselves.
    """
    folder = Path(folder)
    return _onnx(folder, threads) if (folder / ONNX).is_file() else _torch(folder, threads, device)


def pad(rows: list[list[int]], token: int = 0) -> dict[str, np.ndarray]:
    """Rows of token ids as one batch, padded on the right."""
    ids = np.full((len(rows), max(map(len, rows))), token, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return dict(zip(INPUTS, (ids, mask)))


def in_batches(rows: Sequence[Sized], size: int) -> list[list[int]]:
    """Numbers of rows, of similar length together."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def word_logits(run: Run, features: list[dict[str, list[int]]], token: int, size: int = 32) -> list[np.ndarray]:
    """Of each feature the logits (counted, labels) wherever it has a label (not -100)."""
    rows = [feature["input_ids"] for feature in features]
    found: list[np.ndarray] = [np.empty(0)] * len(features)
    for batch in in_batches(rows, size):
        for number, logits in zip(batch, run(pad([rows[number] for number in batch], token))):
            counted = np.array(features[number]["labels"]) != -100
            found[number] = logits[: len(counted)][counted]
    return found


def predict_labels(run: Run, features: list[dict[str, list[int]]], token: int, size: int = 32) -> list[int]:
    """The best label's number wherever a feature has a label (not -100), through all features in their order."""
    return [int(best) for logits in word_logits(run, features, token, size) for best in logits.argmax(-1)]


def mean_loss(run: Run, rows: list[list[int]], token: int, size: int = 8) -> float:
    """Loss of a causal model on rows of tokens: nats per token, the first of each row not counted."""
    total, count = 0.0, 0
    for batch in in_batches(rows, size):
        logits = run(pad([rows[number] for number in batch], token))
        for number, row in zip(batch, logits):
            scores, targets = row[: len(rows[number]) - 1], np.array(rows[number][1:])
            top = scores.max(-1)
            total += float(
                (np.log(np.exp(scores - top[:, None]).sum(-1)) + top).sum(dtype="f8")
                - scores[np.arange(len(targets)), targets].sum(dtype="f8")
            )
            count += len(targets)
    return total / count


def time_batch(run: Run, inputs: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Median time of a batch (s) over at least `seconds` and three runs, after one that doesn't count; rows/s of it."""
    run(inputs)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    return {"latency": median, "throughput": len(inputs["input_ids"]) / median, "repeats": len(times)}


def peak_memory(device: str = "cpu") -> int:
    """Bytes that this process has held at most: of RAM, or what torch has taken of a GPU's memory."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load and measure one folder as `job` says (see prunekit/serving/measure.py, which makes it)."""
    start = time.perf_counter()
    run = load_served(job["folder"], job["threads"], job["device"])
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    if job["task"] == "ner":
        result["predicted"] = predict_labels(run, job["features"], job["token"])
    elif job["task"] == "loss":
        result["loss"] = mean_loss(run, job["rows"], job["token"])
    result["batches"] = {
        str(size): time_batch(run, pad(job["timed"][:size], job["token"]), job["seconds"]) for size in job["sizes"]
    }
    on_cpu = (Path(job["folder"]) / ONNX).is_file()
    return result | {"peak_memory": peak_memory("cpu" if on_cpu else job["device"])}


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure what the JSON on stdin says, and write the result, and nothing else, to stdout as JSON."""
    output = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the result
    result = measure(json.load(sys.stdin))
    with open(output, "w") as stream:  # noqa: PTH123
        json.dump(result, stream)


if __name__ == "__main__":
    answer(measure)
