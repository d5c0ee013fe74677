"""What serving formats gain: folders measured side by side on this machine, each in processes of its own (run.py)."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import TORCH_DTYPES, history, open_checkpoint, read_config
from prunekit.errors import PruneKitError, need_packages
from prunekit.families import family_of, positions
from prunekit.surgery.zeros_weights import measure
from prunekit.tagger.rows import TOKEN_CLASSIFIER, Row, check_labels, encode, load_tokenizer, model_labels, read_rows
from prunekit.tagger.scores import METRICS, Data

from .run import ONNX, weight_files


@dataclass(frozen=True)
class Measuring:
    """How models are measured: rows of at most `limit`, batches of `sizes` rows of `length` tokens, in `rounds`."""

    dataset: Path
    limit: int | None = None
    length: int = 128
    sizes: tuple[int, ...] = (1, 32)
    seconds: float = 2.0
    rounds: int = 2
    threads: int | None = None
    device: str = "cpu"


def format_of(folder: Path) -> str:
    """What a served folder holds: onnx, onnx-int8, torchao-..., or the dtype of its safetensors."""
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise PruneKitError(f"{folder}: no config.json with model*.safetensors or model.onnx; give a checkpoint folder")
    if (folder / ONNX).is_file() or read_config(folder).get("quantization_config"):
        entries = history(folder)
        last = entries[-1] if entries and entries[-1].get("stage") == "deploy" else {}
        return (last.get("settings") or {}).get("format", "?")
    dtypes = {tensor.dtype for tensor in open_checkpoint(folder).tensors.values()}
    return "+".join(sorted(TORCH_DTYPES.get(dtype, dtype) for dtype in dtypes))


def zero_share(folder: Path) -> float | None:
    """The share of zeros among the weights of a checkpoint's layers; None for quantised ones."""
    if (folder / ONNX).is_file() or read_config(folder).get("quantization_config"):
        return None
    return measure(open_checkpoint(folder))["sparsity"]


def is_tagger(config: dict[str, Any]) -> bool:
    return str((config.get("architectures") or [""])[0]).endswith(TOKEN_CLASSIFIER)


def metric_names(folder: Path) -> set[str]:
    """What has numbers in the row that `measure_served` makes of a folder."""
    quality = METRICS if is_tagger(read_config(folder)) else ("loss",)
    return {"zeros", "bytes", "peak_memory", "load_seconds", "batches", *quality}


def check_measurable(folders: list[Path], how: Measuring) -> None:
    """PruneKitError if a folder or the rows can't be measured; reads rows, loads nothing."""
    for folder in folders:
        form = format_of(folder)
        if form.startswith("onnx"):
            need_packages("onnxruntime", extra="encoders")
        if how.length > (limit := positions(read_config(folder))):
            raise PruneKitError(f"--length {how.length}: {folder} has {limit} positions; choose at most so many")
        _read(folder, how)


def _read(folder: Path, how: Measuring) -> list[Any]:
    """The rows that a folder is measured on, of the kind that its model is for."""
    config = read_config(folder)
    if not is_tagger(config):
        if not family_of(config).causal:
            raise PruneKitError(f"{folder}: neither a token classifier nor a decoder; only these are measured")
        return _texts(how.dataset, how.limit)
    need_packages("seqeval", extra="encoders")
    rows = read_rows(how.dataset)[: how.limit]
    check_labels(rows, model_labels(config), how.dataset)
    return rows


def _texts(path: Path, limit: int | None) -> list[str]:
    from prunekit.data.batches import read_calibration
    from prunekit.data.rows import is_text

    rows = read_calibration(path)
    if not is_text(rows[0]):
        raise PruneKitError(f'{path}: decoders are measured by their loss on rows {{"text": ...}}; give such')
    return [row["text"] for row in rows][:limit]


def _job(folder: Path, how: Measuring) -> tuple[dict[str, Any], Any]:
    """What serving.measure shall do with a folder, and what scores its predictions (None: it does so itself)."""
    from transformers import AutoTokenizer

    config = read_config(folder)
    job = {
        "folder": str(folder), "device": how.device, "sizes": list(how.sizes), "seconds": how.seconds,
        "threads": how.threads or len(os.sched_getaffinity(0)), "task": None,
    }  # fmt: skip
    data = None
    rows, length = _read(folder, how), min(512, positions(config))
    if isinstance(rows[0], Row):
        labels, tokenizer = model_labels(config), load_tokenizer(folder)
        data = Data(*encode(rows, tokenizer, labels, length), labels)
        job |= {"task": "ner", "features": data.features}
        ids = [feature["input_ids"] for feature in data.features]
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in rows]
        job |= {"task": "loss", "rows": [row for row in ids if len(row) > 1]}
        if not job["rows"]:
            raise PruneKitError(f"{how.dataset}: no text is longer than one of {folder}'s tokens; give longer ones")
    stream = [token for row in ids for token in row]
    stream *= -(-how.length * max(how.sizes) // len(stream))
    timed = [stream[n * how.length : (n + 1) * how.length] for n in range(max(how.sizes))]
    return job | {"token": tokenizer.pad_token_id or 0, "timed": timed}, data


def measure_once(job: dict[str, Any], module: str = "prunekit.serving.run") -> dict[str, Any]:
    """What a module says of a job, in a process of its own. PruneKitError with its last line if that fails."""
    command = [sys.executable, "-m", module]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0:
            last = f"signal {-done.returncode} ended it, for want of memory, perhaps"
        raise PruneKitError(f"{job['folder']}: measuring failed (exit code {done.returncode}): {last}")
    return json.loads(done.stdout)


def measure_served(folders: list[Path], how: Measuring, quiet: bool | None = None) -> list[dict[str, Any]]:
    """Measure folders side by side: each in processes of its own, in turns, so that a busy moment hits all alike.

    Returns a row for each: model, format, bytes (of weight files), zeros (share, None where quantised), peak_memory
    (bytes, of the process), load_seconds, batches ({size: latency in s, throughput in rows/s}, the best round's),
    and quality: `f1` (with precision, recall, entities) or `loss`; `layers` and `parameters` from config and history.
    """
    from tqdm import tqdm

    rows, jobs = [], []
    for folder in folders:
        row = {"model": str(folder), "format": format_of(folder), "zeros": zero_share(folder)}
        row["bytes"] = sum(file.stat().st_size for file in weight_files(folder))
        rows.append(row | {"peak_memory": 0, "batches": {}})
        jobs.append(_job(folder, how))
    turns = [number for _ in range(how.rounds) for number in range(len(folders))]
    for turn, number in enumerate(tqdm(turns, desc="measure", leave=False, disable=quiet)):
        (job, data), row = jobs[number], rows[number]
        result = measure_once(job if turn < len(folders) else job | {"task": None})
        row["peak_memory"] = max(row["peak_memory"], result["peak_memory"])
        row["load_seconds"] = min(row.get("load_seconds", 1e9), result["load_seconds"])
        for size, times in result["batches"].items():
            if size not in row["batches"] or times["latency"] < row["batches"][size]["latency"]:
                row["batches"][size] = times
        if "predicted" in result:
            row |= data.scores(result["predicted"])
        elif "loss" in result:
            row["loss"] = result["loss"]
    return rows


def served_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure_served` as text, the first one being what the others are compared with."""
    sizes, first = list(rows[0]["batches"]), rows[0]
    quality = "f1" if "f1" in first else "loss"
    width = max(len(row["model"]) for row in rows) + 2
    head = f"{'model':{width}}{'format':22}{'zeros':>7}{'file MB':>10}{'':>7}{'peak MB':>9}"
    head += "".join(f"{f'batch {size}: ms':>15}{'rows/s':>9}{'':>7}" for size in sizes) + f"{quality.upper():>9}"
    lines = [head]
    for row in rows:
        zeros = "" if row["zeros"] is None else f"{row['zeros']:.1%}"
        line = f"{row['model']:{width}}{row['format']:22}{zeros:>7}{row['bytes'] / 1e6:>10.1f}"
        line += f"{row['bytes'] / first['bytes']:>6.2f}x{row['peak_memory'] / 1e6:>9.0f}"
        for size in sizes:
            times, base = row["batches"][size], first["batches"][size]
            line += f"{times['latency'] * 1e3:>15.2f}{times['throughput']:>9.1f}"
            line += f"{base['latency'] / times['latency']:>6.2f}x"
        lines.append(line + f"{row[quality]:>9.4f}")
    return "\n".join(lines)


def where_zeros_save_nothing(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each sparse model: what its zeros do to file and time, as measured against the first one."""
    first, lines = rows[0], []
    for row in rows[1:]:
        if (row["zeros"] or 0) - (first["zeros"] or 0) < 0.01 or row["bytes"] < 0.99 * first["bytes"]:
            continue
        size = max(row["batches"], key=int)
        speed = first["batches"][size]["latency"] / row["batches"][size]["latency"]
        lines.append(
            f"{row['model']}: {row['zeros']:.1%} of its layers' weights are zero, and that saves nothing here: its "
            f"file is "
            f"{row['bytes'] / first['bytes']:.2f} and its speed {speed:.2f} times that of {first['model']}, since "
            "files and kernels treat zeros as any number; INT8 and removed layers, heads or neurons do save"
        )
    return lines
