"""Checkpoints of fewer bits, for vLLM and transformers: which weights, and in a form that others read.

llm-compressor writes what compressed-tensors reads; what ms-swift's `swift export --quant_method` wrote is published.
Only the text layers' projections are quantised: the vision tower is a few per cent of a large model's bytes, embeddings
are looked up, the head decides each token, and a router of experts is tiny and decides where a token goes.
"""

import importlib.util
import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import (
    INDEX,
    TORCH_DTYPES,
    Checkpoint,
    check_out,
    copy_files,
    history,
    history_entry,
    new_folder,
    open_checkpoint,
    quantisation,
    read_config,
    side_files,
    statistics,
    write_json,
    write_records,
)
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError
from prunekit.families import spot_of
from prunekit.surgery.drafts import draft_tensors, drop_drafts

SCHEMES = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16", "gptq": "W4A16"}  # compressed-tensors' names
SWIFT = ("bnb", "block-fp8")  # what `swift export` writes
GROUPS = (128, 64, 32)  # inputs that share a scale where weights have 4 bits; kernels know these
SCALE_BYTES = 2
USE = """# vllm serve this/folder
from transformers import {{loader}}  # and: pip install {package}

model = {{loader}}.from_pretrained("this/folder", dtype="auto")"""


@dataclass(frozen=True)
class QuantisePlan:
    """What becomes of a checkpoint's weights."""

    source: Checkpoint
    method: str  # of SCHEMES
    modules: tuple[str, ...]  # whose weights get fewer bits
    ignore: tuple[str, ...]  # what the others are called, as compressed-tensors reads it: names or "re:" and a regex
    group: int | None  # inputs that share a scale; None: all of a row
    nbytes: int  # of the result

    @property
    def bits(self) -> int:
        return 4 if SCHEMES[self.method] == "W4A16" else 8


def _modules(checkpoint: Checkpoint) -> list[str]:
    """The projections of the text layers, experts' ones, too. PruneKitError for those that have no plain matrix."""
    family = checkpoint.family
    if not family.causal or family.text.inputs_first:
        raise PruneKitError(
            f"{checkpoint.path}: {family.model_type} isn't quantised for vLLM; deploy.py writes its ONNX and INT8 forms"
        )
    found = []
    for name, tensor in checkpoint.tensors.items():
        if not (within := family.text.within(name)):
            continue
        spot = spot_of(within[1])
        if spot.kind != "weight" or spot.last not in family.text.projections and not spot.experts:
            continue
        if spot.stacked or len(tensor.shape) != 2:
            raise PruneKitError(
                f"{checkpoint.path}: {name} holds all experts in one; only folders with a tensor an expert are "
                "quantised: serve it by vllm serve --quantization fp8, which does so while it loads"
            )
        found.append(name.removesuffix(".weight"))
    return found


def plan_quantise(checkpoint: Checkpoint, method: str, group: int | None = None) -> QuantisePlan:
    """`group` is the user's choice of inputs that share a scale, for 4 bits. PruneKitError for what can't be done."""
    check_no_remote_code(checkpoint.path)
    modules = _modules(checkpoint)
    four = SCHEMES[method] == "W4A16"
    if group and not four:
        raise PruneKitError(f"--group {group}: is for 4 bits; {method} has a scale for each row")
    if four:
        inputs = {checkpoint.tensors[f"{name}.weight"].shape[1] for name in modules}
        dividing = [size for size in ((group,) if group else GROUPS) if not any(width % size for width in inputs)]
        if not dividing:
            raise PruneKitError(
                f"{checkpoint.path}: {group or 'none of 128, 64 and 32'} doesn't divide the widths of its projections "
                f"({', '.join(map(str, sorted(inputs)))}): choose another --group, or fp8 or int8"
            )
        group = dividing[0]
    ignore = [*(["re:.*visual\\..*"] if checkpoint.family.vision else []), "re:.*embed_tokens$", "re:.*lm_head$"]
    ignore += [f"re:{checkpoint.family.drafts}"] if checkpoint.family.drafts else []
    known, nbytes = set(modules), checkpoint.nbytes
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module in known:
            scales = math.prod(tensor.shape) // group if group else tensor.shape[0]
            nbytes += math.prod(tensor.shape) * (4 if four else 8) // 8 + scales * SCALE_BYTES - tensor.nbytes
        elif module != name and len(tensor.shape) > 1 and (within := checkpoint.family.text.within(name)):
            ignore.append(f"re:.*\\.{re.escape(within[1].removesuffix('.weight'))}$")  # a router, or a convolution
    plan = QuantisePlan(checkpoint, method, tuple(modules), tuple(dict.fromkeys(ignore)), group, nbytes)
    if wrong := [name for name in modules if any(re.match(pattern[3:], name) for pattern in plan.ignore)]:
        raise ValueError(f"{wrong[0]} would be left as it is")
    return plan


def need_llm_compressor() -> None:
    if importlib.util.find_spec("llmcompressor") is None:
        raise PruneKitError("llm-compressor is not installed: run 'bash lib/llm_compressor.sh', and bash quantise.sh")


def _config(plan: QuantisePlan):
    """compressed-tensors' scheme, with our group size."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(SCHEMES[plan.method], ["Linear"])
    if plan.group:
        scheme.weights.group_size = plan.group
    return scheme


def _data_free(plan: QuantisePlan, folder: Path, device: str) -> None:
    """Weights rounded as they are, file by file: no more memory than a file's. Activations get scales as they come."""
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    config = QuantizationConfig(config_groups={"group_0": _config(plan)}, ignore=list(plan.ignore))
    model_free_ptq(plan.source.path, folder, config=config, device=device)


def _gptq(plan: QuantisePlan, folder: Path, model, batches: list[dict[str, Any]]) -> None:
    """GPTQ: each weight rounded so that what those before it lost is made up for, on your rows (arXiv:2210.17323)."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    # The model is traced once, with pictures or without
    alike = Counter(frozenset(batch) for batch in batches).most_common(1)[0][0]
    rows: Any = [{key: batch[key] for key in batch if key != "labels"} for batch in batches if set(batch) == alike]
    if left := len(batches) - len(rows):
        print(f"gptq: {len(rows)} rows; {left} are left out, which have other inputs (pictures, or none) than most")
    recipe = GPTQModifier(config_groups={"group_0": _config(plan)}, ignore=list(plan.ignore))
    oneshot(model=model, recipe=[recipe], dataset=DataLoader(rows, batch_size=None), num_calibration_samples=len(rows))
    counts = Counter(tensor.dtype for tensor in plan.source.tensors.values() if tensor.dtype in TORCH_DTYPES)
    model.to(getattr(torch, TORCH_DTYPES[counts.most_common(1)[0][0]]))  # what stays: it was computed in another
    model.save_pretrained(folder, save_compressed=True)


def adopt(written: Path, source: Checkpoint, folder: Path) -> Checkpoint:
    """Move the weights of a quantised folder that others wrote into FOLDER, beside a config and files of our own.

    Config and side files are the source's: trainers and libraries write theirs with traces. PruneKitError unless the
    config says how the weights are quantised, and agrees with them.
    """
    found = quantisation(read_config(written))
    weights = sorted(written.glob("*.safetensors"))
    if found is None or not weights:
        raise PruneKitError(f"{written}: holds no quantised weights (safetensors)")
    for file in weights:
        shutil.move(file, folder / file.name)
        (folder / file.name).chmod(0o644)  # llm-compressor's are for their owner alone
    if [file.name for file in weights] != ["model.safetensors"]:  # by any other name transformers asks for an index
        shutil.move(written / INDEX, folder / INDEX)
    write_json(folder / "config.json", source.config | {"quantization_config": found})
    copy_files(side_files(source.path), folder)
    return open_checkpoint(folder, quantised=True)


def publish_quantised(
    source: Checkpoint, written: Path, folder: Path, settings: dict[str, Any], extra_files: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """`adopt`, with history and card; returns the new entry. `extra_files` are records of the run: its command."""
    result = adopt(written, source, folder)
    before, after = statistics(source), statistics(result)
    drafts = [] if draft_tensors(result) else draft_tensors(source)  # which transformers leaves out
    if drafts:
        drop_drafts(source, result.config, {})
        write_json(folder / "config.json", result.config)
    left_out = sum(math.prod(source.tensors[name].shape) for name in drafts)
    if before["parameters"] - left_out != after["parameters"]:
        raise PruneKitError(
            f"{written}: has {after['parameters']:,} parameters, {source.path} {before['parameters']:,}: it is none of "
            "its quantised forms"
        )
    method = (quantisation(result.config) or {})["quant_method"]
    entry = history_entry("quantise", source.path, before, after, settings=settings | {"quant_method": method})
    for file in extra_files:
        shutil.copyfile(file, folder / file.name)
    use = USE.format(package="accelerate" if method == "fp8" else method)
    write_records(folder, source.config, after, [*history(source.path), entry], use)
    return entry


def quantise(
    plan: QuantisePlan, out: str | Path, overwrite: bool = False, device: str = "cpu", calibrated: Any = None
) -> dict[str, Any]:
    """Write the checkpoint quantised to OUT, whole or not at all; returns the new history entry.

    `calibrated`, for gptq, is (model, batches of inputs, their record). Raises PruneKitError as `new_folder` does.
    """
    need_llm_compressor()
    check_out(out, plan.source.path, overwrite=overwrite)
    settings: dict[str, Any] = {
        "method": plan.method, "scheme": SCHEMES[plan.method], "group_size": plan.group, "modules": len(plan.modules),
        "kept": list(plan.ignore),
    }  # fmt: skip
    with new_folder(out, overwrite, 2 * plan.nbytes) as folder:
        scratch = folder / ".written"
        scratch.mkdir()
        if plan.method == "gptq":
            model, batches, record = calibrated
            settings["calibration"] = record
            _gptq(plan, scratch, model, batches)
        else:
            _data_free(plan, scratch, device)
        entry = publish_quantised(plan.source, scratch, folder, settings)
        shutil.rmtree(scratch)
    return entry
