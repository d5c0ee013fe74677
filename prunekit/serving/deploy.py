"""What a checkpoint becomes for serving: ONNX, INT8."""

import logging
import warnings
from pathlib import Path
from typing import Any

from prunekit.checkpoint import (
    Checkpoint,
    check_out,
    copy_files,
    history,
    history_entry,
    new_folder,
    side_files,
    statistics,
    write_json,
    write_records,
)
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, need_packages
from prunekit.families import text_value
from prunekit.model.load import processor_has

from .run import INPUTS, ONNX, load_served, model_class, pad, weight_files

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


def sums_overflow() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which overflow: x86 without VNNI."""
    import torch

    architecture = torch.cpu.get_capabilities().get("architecture")
    return architecture == "x86_64" and not processor_has("vnni", "amx_int8")


def quantise_onnx(file: Path, out: Path) -> None:
    """INT8 weights of matrices and embeddings, activations quantised as they come (onnxruntime, no calibration).

    Of 7 bits where the processor's sums would overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # advice to simplify the graph first, as the exporter has done
    try:
        quantize_dynamic(file, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=sums_overflow())
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
    """How far logits are from the checkpoint's where the mask is 1: largest difference (a share), cosine, same best.

    Those of whole texts (batch, n) all count.
    """
    import numpy as np

    counted = mask.astype(bool) if ours.ndim == 3 else ...
    a, b = (logits[counted].astype("f8") for logits in (ours, theirs))
    return {
        "largest_difference": float(np.abs(a - b).max() / np.abs(b).max()),
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
        "same_best": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


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
            if exact and not compared["largest_difference"] <= AGREE:  # NaN, too
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
        copy_files(side_files(checkpoint.path), folder)
        after = numbers | {"bytes": sum(file.stat().st_size for file in weight_files(folder))}
        entry = history_entry("deploy", checkpoint.path, numbers, after, metrics=compared, settings={"format": form})
        entries = [*history(checkpoint.path), entry]
        write_records(folder, checkpoint.config, after, entries, USE[form.split("-")[0]])
    return entry
