"""What a checkpoint becomes for serving (ONNX, INT8), and what that gains, measured side by side on this machine."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import (
    TORCH_DTYPES,
    Checkpoint,
    check_out,
    history,
    history_entry,
    new_folder,
    open_checkpoint,
    read_config,
    side_files,
    statistics,
    write_json,
    write_records,
)
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, need_packages
from prunekit.families import family_of, positions, text_value
from prunekit.surgery.zeros_weights import measure
from prunekit.tagger.rows import TOKEN_CLASSIFIER, Row, check_labels, encode, load_tokenizer, model_labels, read_rows
from prunekit.tagger.scores import Data

from .run import INPUTS, ONNX, load_served, model_class, pad

FORMATS = ("onnx", "onnx-int8", "torchao-int8", "torchao-int8-dynamic")
ONNX_LIMIT = 2**31  # bytes of a protobuf file
AGREE = 1e-3  # largest difference of logits, as a share of the largest, that an ONNX export in fp32 may have
USE = {
    "onnx": """import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this/folder")
session = onnxruntime.InferenceSession("this/folder/model.onnx")
inputs = tokenizer("some text", return_tensors="np")
logits = session.run(["logits"], {name: inputs[name] for name in ("input_ids", "attention_mask")})[0]""",
    "torchao": """from transformers import {loader}  # and: pip install torchao

model = {loader}.from_pretrained("this/folder", dtype="auto")""",
}


# --- making ----------------------------------------------------------------------------------------------------------


def choose_format(checkpoint: Checkpoint, wanted: str | None) -> str:
    """`wanted`, or INT8 by ONNX where its fp32 file fits into a protobuf, else by torchao.

    PruneKitError for what has no such form: models with a vision tower, and ONNX files over 2 GB.
    """
    numbers = statistics(checkpoint)
    if checkpoint.family.vision:
        raise PruneKitError(
            f"{checkpoint.path}: {checkpoint.family.model_type} has a vision tower; serve it as it is (vLLM)"
        )
    fits = numbers["parameters"] * 4 < ONNX_LIMIT
    form = wanted or ("onnx-int8" if fits else "torchao-int8")
    if form.startswith("onnx") and not fits:
        raise PruneKitError(
            f"--format {form}: {numbers['parameters']:,} parameters in fp32 are more than an ONNX file holds (2 GB); "
            "choose torchao-int8"
        )
    return form


def export_onnx(model, file: Path) -> None:
    """Write a model's forward, input_ids and attention_mask (batch, length) to logits, as one ONNX file.

    Both axes are free. Decoders have no KV cache in it: it scores texts, prompts are read as a whole. Raises
    PruneKitError for what torch.onnx can't export (mixtures of experts).
    """
    import torch
    from torch.onnx import OnnxExporterError

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.extra).logits

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    example = {name: torch.ones(3, 7, dtype=torch.long) for name in INPUTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        try:
            torch.onnx.export(
                Logits().eval(), (), file, kwargs=example, input_names=list(INPUTS), output_names=["logits"],
                dynamic_shapes=dict.fromkeys(INPUTS, axes), external_data=False, dynamo=True, verbose=False,
            )  # fmt: skip
        except OnnxExporterError as error:
            raise PruneKitError(
                f"{type(model).__name__}: torch.onnx can't export it ({type(error).__name__}); choose --format "
                f"torchao-int8"
            ) from error


def quantise_onnx(file: Path, out: Path) -> None:
    """INT8 weights of matrices and embeddings, activations quantised as they come (onnxruntime, no calibration)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # advice to simplify the graph first, as the exporter has done
    try:
        quantize_dynamic(file, out, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)


def quantise_torchao(checkpoint: Checkpoint, folder: Path, dynamic: bool) -> None:
    """INT8 weights of linear layers (not embeddings, nor a head tied to them) as torchao keeps them in safetensors."""
    import transformers
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    model = model_class(checkpoint.config).from_pretrained(
        checkpoint.path, dtype="auto", quantization_config=transformers.TorchAoConfig(config)
    )
    model.save_pretrained(folder)


def _check_inputs(checkpoint: Checkpoint) -> dict[str, Any]:
    """Two rows of random tokens, one padded, of another shape than the export's example."""
    import numpy as np

    vocabulary = text_value(checkpoint.config, "vocab_size")
    ids = np.random.default_rng(0).integers(0, vocabulary, 40).tolist()
    return pad([ids[:24], ids[24:]])


def _compare(ours, theirs, mask) -> dict[str, float]:
    """How far logits are from the checkpoint's where the mask is 1: largest difference (a share), cosine, same best."""
    import numpy as np

    a, b = (logits[mask.astype(bool)].astype("f8") for logits in (ours, theirs))
    return {
        "largest_difference": float(np.abs(a - b).max() / np.abs(b).max()),
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
        "same_best": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a served folder's weights."""
    onnx = folder / ONNX
    return [onnx] if onnx.is_file() else sorted(folder.glob("model*.safetensors"))


def deploy(checkpoint: Checkpoint, out: str | Path, form: str, overwrite: bool = False) -> dict[str, Any]:
    """Write `checkpoint` to OUT in one of `FORMATS`, whole or not at all; returns the new history entry.

    Its metrics compare the logits of random tokens with the checkpoint's. Raises PruneKitError as `new_folder` does,
    and if an ONNX export computes something else.
    """
    from prunekit.model.load import load_model

    if form.startswith("onnx"):
        need_packages("onnx", "onnxruntime", "onnxscript", extra="encoders")
    else:
        need_packages("torchao", extra="deploy")
    check_no_remote_code(checkpoint.path)
    check_out(out, checkpoint.path, overwrite=overwrite)
    model_class(checkpoint.config)
    numbers, inputs = statistics(checkpoint), _check_inputs(checkpoint)
    expected = load_served(checkpoint.path)(inputs)
    with new_folder(out, overwrite, numbers["parameters"] * 6) as folder:
        if form.startswith("onnx"):
            export_onnx(load_model(checkpoint, "cpu", "float32"), folder / ONNX)
            compared = _compare(load_served(folder)(inputs), expected, inputs["attention_mask"])
            exact = "F32" in {tensor.dtype for tensor in checkpoint.tensors.values()}
            if exact and compared["largest_difference"] > AGREE:
                raise PruneKitError(
                    f"{checkpoint.path}: as ONNX it computes something else (logits differ by "
                    f"{compared['largest_difference']:.1%}); choose --format torchao-int8"
                )
            if form == "onnx-int8":
                (folder / ONNX).rename(folder / "fp32.onnx")
                quantise_onnx(folder / "fp32.onnx", folder / ONNX)
                (folder / "fp32.onnx").unlink()
                compared = _compare(load_served(folder)(inputs), expected, inputs["attention_mask"])
            write_json(folder / "config.json", checkpoint.config)
        else:
            quantise_torchao(checkpoint, folder, dynamic=form.endswith("dynamic"))
            compared = _compare(load_served(folder)(inputs), expected, inputs["attention_mask"])
        for file in side_files(checkpoint.path):
            shutil.copyfile(file, folder / file.name)
        after = numbers | {"bytes": sum(file.stat().st_size for file in weight_files(folder))}
        entry = history_entry("deploy", checkpoint.path, numbers, after, metrics=compared, settings={"format": form})
        entries = [*history(checkpoint.path), entry]
        write_records(folder, checkpoint.config, after, entries, USE[form.split("-")[0]])
    return entry


# --- measuring -------------------------------------------------------------------------------------------------------


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


def check_measurable(folders: list[Path], how: Measuring) -> None:
    """PruneKitError if a folder, the rows or a setting can't be measured; reads rows, loads nothing."""
    for name, value in (
        ("length", how.length),
        ("rounds", how.rounds),
        ("limit", how.limit or 1),
        *(("batches", n) for n in how.sizes),
    ):
        if value < 1:
            raise PruneKitError(f"--{name} {value}: choose 1 or more")
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
    if not str((config.get("architectures") or [""])[0]).endswith(TOKEN_CLASSIFIER):
        if not family_of(config).causal:
            raise PruneKitError(f"{folder}: neither a token classifier nor a decoder; only these are measured")
        return _texts(how.dataset, how.limit)
    need_packages("seqeval", extra="encoders")
    rows = read_rows(how.dataset)[: how.limit]
    check_labels(rows, model_labels(config), how.dataset)
    return rows


def _texts(path: Path, limit: int | None) -> list[str]:
    from prunekit.data.batches import read_calibration

    rows = read_calibration(path)
    if "text" not in rows[0]:
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
    stream = [token for row in ids for token in row]
    stream *= -(-how.length * max(how.sizes) // len(stream))
    timed = [stream[n * how.length : (n + 1) * how.length] for n in range(max(how.sizes))]
    return job | {"token": tokenizer.pad_token_id or 0, "timed": timed}, data


def _measure_once(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "prunekit.serving.run"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{job['folder']}: measuring failed (exit code {done.returncode}): {last}")
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
        result = _measure_once(job if turn < len(folders) else job | {"task": None})
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
