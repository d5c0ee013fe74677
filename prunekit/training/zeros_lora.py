"""LoRA on a sparse model: its product has the base's zeros, so that what is merged is what was trained.

MaskLoRA of PERP (Zimmer et al., 2312.15230): a layer computes with W + M * (B A), where M is 0 where W is. It is a
variant of peft's own layers. Saved adapters are plain ones; whoever merges them must put the zeros back, as
export_lora.sh does: then W + B A is zero where W is, and the same elsewhere.
"""

from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional

from prunekit.errors import PruneKitError

from .zeros_settings import SPLIT_UP


class MaskedLora(LoraVariant):
    """What a `Linear` of peft's (also one around transformers' Conv1D) does for an adapter, with the base's zeros."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs) -> None:
        pass

    @staticmethod
    def delta(module: Linear, adapter: str, zeros: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the weight, in its shape."""
        return module.get_delta_weight(adapter).masked_fill(zeros, 0)

    @staticmethod
    def merge_safe(module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if not module.merged:  # then a weight can be 0 by chance
            module.zeros_before_merge = orig_weight == 0
        delta = MaskedLora.delta(module, active_adapter, module.zeros_before_merge)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = MaskedLora.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        delta = MaskedLora.delta(module, active_adapter, module.zeros_before_merge)
        return orig_weight.data - delta.to(orig_weight.dtype)

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs) -> torch.Tensor:
        delta = MaskedLora.delta(module, active_adapter, module.get_base_layer().weight == 0)
        bias = module.lora_B[active_adapter].bias
        return result + functional.linear(
            module.lora_dropout[active_adapter](x),
            delta.T if module.fan_in_fan_out else delta,
            None if bias is None else bias * module.scaling[active_adapter],
        )


def mask_lora(model: nn.Module) -> int:
    """Give the adapters of a model their base's zeros, in layers that have any; returns how many zeros these have.

    Embeddings are left alone. PruneKitError for what no plain matrix can be told of: weights that are quantised or
    split up (ZeRO-3, FSDP), DoRA and other variants.
    """
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, Embedding):
            continue
        weight: Any = getattr(module.get_base_layer(), "weight", None)
        plain = isinstance(module, Linear) and weight is not None and weight.is_floating_point()
        if plain and (getattr(weight, "ds_numel", weight.numel()) > weight.numel() or hasattr(weight, "placements")):
            raise PruneKitError(SPLIT_UP)
        zeros = int((weight == 0).sum()) if plain else 0
        if not plain or (zeros and module.lora_variant and not _only_masked(module)):
            raise PruneKitError(
                f"{name}: keep_zeros takes plain LoRA of unquantised linear layers; leave out what isn't"
            )
        if zeros:
            module.lora_variant = dict.fromkeys(module.lora_A, MaskedLora())
            count += zeros
    return count


def _only_masked(module: LoraLayer) -> bool:
    return all(isinstance(variant, MaskedLora) for variant in module.lora_variant.values())
