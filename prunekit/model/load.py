"""A checkpoint as a model in memory."""

import re
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint, quantisation, statistics
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, need_packages

from .light import light_transformers

# Classes without an output head over tokens, whatever their family
HEADLESS = re.compile(r".*(?:(?<!LMHead)Model|For(?:Sequence|Token)Classification|ForQuestionAnswering)")


def check_causal(checkpoint: Checkpoint) -> None:
    """PruneKitError for a model that predicts no next token."""
    name = (checkpoint.config.get("architectures") or [checkpoint.family.model_type])[0]
    if not checkpoint.family.causal or HEADLESS.fullmatch(name):
        raise PruneKitError(f"{checkpoint.path}: {name} predicts no next token to score by; give a causal model")


def check_unpackable(checkpoint: Checkpoint) -> None:
    """PruneKitError for quantised weights of which the package that unpacks them is not installed."""
    method = (quantisation(checkpoint.config) or {}).get("quant_method")
    if method in ("compressed-tensors", "bitsandbytes"):
        need_packages(method.replace("-", "_"), extra="quantise")


def processor_has(*words: str) -> bool:
    """Whether this processor has an instruction set that one of the words is in the name of, as torch calls them."""
    import torch

    capabilities = torch.cpu.get_capabilities().items()
    return any(has and word in name for name, has in capabilities for word in words)


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself: a processor without it takes ten times as long and more."""
    return not device.startswith("cpu") or processor_has("bf16")


def load_model(
    checkpoint: Checkpoint,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | Path | None = None,
):
    """The checkpoint's own class from transformers, in evaluation mode.

    Device: cuda if there is one. Dtype: bfloat16, several times faster than float32 on CPUs that have it, too; but
    float32 on those that don't, and for models of less than 50M parameters. With `offload`, a folder for what has to be
    converted, the text layers stay on disk (accelerate). PruneKitError if tensors of a causal model are missing:
    transformers fills in random ones.
    """
    import torch

    check_no_remote_code(checkpoint.path)
    transformers = light_transformers()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    small = device == "cpu" and statistics(checkpoint)["parameters"] < 50e6
    auto = f"AutoModelFor{'ImageTextToText' if checkpoint.family.vision else 'CausalLM'}"
    cls = getattr(transformers, (checkpoint.config.get("architectures") or [auto])[0], getattr(transformers, auto))
    dtype = getattr(torch, dtype or ("float32" if small or not has_bfloat16(device) else "bfloat16"))
    # Straight to its device: several processes at once would fill the host's memory with copies
    where: dict[str, Any] = {"device_map": {"": device}}
    if offload is not None:
        from accelerate import init_empty_weights

        from .offload import device_map

        config, make = transformers.AutoConfig.from_pretrained(checkpoint.path), getattr(cls, "from_config", cls)
        with init_empty_weights():
            where = {"device_map": device_map(make(config), checkpoint.family.text, device)}
        where["offload_folder"] = str(offload)
    model, found = cls.from_pretrained(checkpoint.path, dtype=dtype, output_loading_info=True, **where)
    if (missing := sorted(found["missing_keys"])) and checkpoint.family.causal and not quantisation(checkpoint.config):
        raise PruneKitError(
            f"{checkpoint.path}: lacks {missing[0]} (1 of {len(missing)}) of {cls.__name__}; copy or download it again"
        )
    return model.eval()
