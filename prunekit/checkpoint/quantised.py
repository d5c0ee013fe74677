"""Quantised folders: which of their tensors stand for a model's weights, and of what shape these are."""

import math
import re
from collections.abc import Mapping
from typing import Any

from prunekit.errors import PruneKitError

from .format import DTYPE_BYTES, Outline, Shape

METHODS = ("compressed-tensors", "bitsandbytes", "fp8")  # that we write and read; as config.json calls them
BITMASK = "prunekit-bitmask"  # of prunekit.packed, which alone reads it
# What lies beside a weight that was quantised, in all three
BESIDE = re.compile(
    r".+\.(?:weight_(?:scale|scale_inv|zero_point|shape|g_idx|global_scale|format)|SCB"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))"
)
_PACKED, _FOUR_BITS = ".weight_packed", ".quant_state."


def quantisation(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a config says of how its weights are quantised; None if they aren't."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                return found if isinstance(found, dict) else {"quant_method": str(found)}
    return None


def check_quantisation(config: dict[str, Any]) -> None:
    """PruneKitError for weights quantised in a way that we can't count."""
    method = (quantisation(config) or {}).get("quant_method")
    if method not in METHODS:
        raise PruneKitError(f"weights quantised by {str(method)[:40]!r} aren't read; those of {', '.join(METHODS)} are")


def _bits(config: dict[str, Any]) -> int:
    """Of a packed weight."""
    try:
        groups = (quantisation(config) or {})["config_groups"].values()
        [bits] = {group["weights"]["num_bits"] for group in groups}
        if bits in (2, 4, 8):
            return bits
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise PruneKitError("quantization_config doesn't say of how many bits packed weights are, or not of 2, 4 or 8")


def weights_of(outline: Outline) -> Mapping[str, Shape]:
    """Its tensors as the model has them: packed weights by their own names and shapes, without scales and the like.

    Weights of 4 bits by bitsandbytes have one axis: their file doesn't say how many rows. Of what isn't quantised
    these are its tensors.
    """
    if quantisation(outline.config) is None:
        return outline.tensors
    weights = {}
    for name, tensor in outline.tensors.items():
        if name.endswith(_PACKED):
            packed = 8 * DTYPE_BYTES[tensor.dtype] // _bits(outline.config)
            name = name.removesuffix(_PACKED) + ".weight"
            weights[name] = Shape(tensor.dtype, (*tensor.shape[:-1], tensor.shape[-1] * packed))
        elif not BESIDE.fullmatch(name):
            weights[name] = Shape(tensor.dtype, tensor.shape)
    for name in outline.tensors:
        weight, found, _ = name.partition(_FOUR_BITS)
        if found and weight in weights:
            weights[weight] = Shape("U8", (2 * math.prod(weights[weight].shape),))
    return weights
