"""Merge KV heads: fewer key/value heads, each shared by more query heads (GQA; one head is MQA)."""

import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.checkpoint import (
    TORCH_DTYPES,
    Checkpoint,
    float_bytes,
    heads,
    history_entry,
    layer_numbers,
    statistics,
    write_checkpoint,
)
from prunekit.errors import PruneKitError
from prunekit.families import configs

METHODS = ("mean", "first", "calibrated")


@dataclass(frozen=True)
class KVMerge:
    """What a merge will do: `result`'s k_proj and v_proj are computed when they are written."""

    source: Checkpoint
    result: Checkpoint
    kv_heads: int
    method: str


def merge_heads(values, head_dim: int, kv_heads: int, method: str = "mean"):
    """Merge neighbouring heads of a k_proj or v_proj parameter, an array or tensor in fp32 or wider.

    values: weight (heads * head_dim, hidden) or bias (heads * head_dim,). Returns (kv_heads * head_dim, ...). New
    head i stands for neighbours in order, as transformers' repeat_kv shares heads. Method: mean pooling as in GQA
    (Ainslie et al., 2305.13245), or the first head of each group.
    """
    groups = values.reshape(kv_heads, -1, head_dim, *values.shape[1:])
    merged = groups[:, 0] if method == "first" else groups.mean(1)
    return merged.reshape(-1, *values.shape[1:])


def plan_kv_merge(checkpoint: Checkpoint, kv_heads: int, method: str = "mean") -> KVMerge:
    """Plan to merge the text stack's KV heads to `kv_heads`, a divisor of the present count.

    Raises PruneKitError if it isn't one, if it is the present count, or if the family has no shared KV heads.
    Reads no weights and writes no file.
    """
    family, row = checkpoint.family, checkpoint.family.text
    if family.kv_heads is None:
        raise PruneKitError(f"{family.model_type}: has no form with fewer KV heads than query heads; nothing to merge")
    layers = layer_numbers(checkpoint, "text")
    _, present, head_dim = heads(checkpoint)
    divisors = [n for n in range(1, present) if present % n == 0]
    if kv_heads == present:
        raise PruneKitError(f"--kv-heads {kv_heads}: the model has {present} already; nothing to merge")
    if kv_heads not in divisors:
        raise PruneKitError(
            f"--kv-heads {kv_heads}: the model has {present} KV heads; "
            + (f"choose one of {', '.join(map(str, divisors))}" if divisors else "there is nothing to merge")
        )
    rope = [part | (part.get("rope_parameters") or {}) for part in configs(checkpoint.config, row)]
    if method == "calibrated" and any((part.get("partial_rotary_factor") or 1) != 1 for part in rope):
        raise PruneKitError(
            f"{checkpoint.path}: partial_rotary_factor: calibrated merging takes whole heads to be rotated; use --method mean"
        )
    if method not in METHODS:
        raise PruneKitError(f"--method {method}: choose one of {', '.join(METHODS)}")

    names = rf"{row.prefix}\d+\.(?:{re.escape(row.k)}|{re.escape(row.v)})\.(?:weight|bias)"
    tensors = dict(checkpoint.tensors)
    projections = [name for name in tensors if re.fullmatch(names, name)]
    for name in projections:
        old = tensors[name]
        if not old.shape or old.shape[0] != present * head_dim or old.dtype not in TORCH_DTYPES:
            raise PruneKitError(
                f"{name}: {old.dtype} {list(old.shape)}, where {present} KV heads of {head_dim} have {present * head_dim} "
                "floating-point rows; copy or download it again"
            )
        shape = (kv_heads * head_dim, *old.shape[1:])
        tensors[name] = replace(
            old, shape=shape, compute=partial(_merged_bytes, checkpoint, name, head_dim, kv_heads, method)
        )
    if sum(name.endswith(".weight") for name in projections) != 2 * len(layers):
        raise PruneKitError(f"{checkpoint.path}: not every text layer has {row.k} and {row.v}; the folder is damaged")
    config = copy.deepcopy(checkpoint.config)
    for part in configs(config, row):
        part[family.kv_heads] = kv_heads
    return KVMerge(checkpoint, replace(checkpoint, config=config, tensors=tensors), kv_heads, method)


def _merged_bytes(checkpoint: Checkpoint, name: str, head_dim: int, kv_heads: int, method: str) -> memoryview:
    if method == "calibrated":
        raise ValueError(f"{name}: kv_merge.calibrate_merge has yet to fill this plan")
    merged = merge_heads(checkpoint.read_array(name), head_dim, kv_heads, method)
    return float_bytes(merged, checkpoint.tensors[name].dtype, name)


def apply_kv_merge(
    plan: KVMerge,
    out: str | Path,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the planned checkpoint to OUT and return its new history entry. Raises as `write_checkpoint` does.

    `calibration` is what the entry shall say of it: settings and metrics.
    """
    before, after = statistics(plan.source), statistics(plan.result)
    entry = history_entry(
        "kv_cut",
        plan.source.path,
        before,
        after,
        removed={"kv_heads": before["num_key_value_heads"] - plan.kv_heads},
        metrics=calibration and calibration["metrics"],
        settings={"kv_heads": plan.kv_heads, "method": plan.method} | (calibration["settings"] if calibration else {}),
    )
    write_checkpoint(plan.result, out, entry, overwrite, max_shard_bytes)
    return entry
