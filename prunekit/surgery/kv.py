"""Merge KV heads: fewer key/value heads, each shared by more query heads (GQA; one head is MQA)."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prunekit.checkpoint import (
    TORCH_DTYPES,
    Checkpoint,
    Outline,
    attending,
    float_bytes,
    heads,
    layer_numbers,
)
from prunekit.errors import PruneKitError
from prunekit.families import configs

from .cut import Account, OfPlan
from .drafts import drop_drafts

# Of a group's heads, along axis 1. These need no data.
MERGES: dict[str, Callable[[Any], Any]] = {
    "mean": lambda groups: groups.mean(1),
    "first": lambda groups: groups[:, 0],
}
METHODS = (*MERGES, "calibrated")


@dataclass(frozen=True)
class KVPlan:
    source: Checkpoint
    outline: Outline  # of what will come out: `cut_kv` or `kv_fit.fit_kv` computes k_proj and v_proj
    kv_heads: int
    method: str
    notes: list[str]  # what the user should know, one line each


@dataclass(frozen=True)
class KVCut(OfPlan):
    """A checkpoint with fewer KV heads, whose changed tensors are computed when they are written."""

    plan: KVPlan
    result: Checkpoint
    settings: dict[str, Any] = field(default_factory=dict)  # of the fit, like metrics
    metrics: dict[str, float] = field(default_factory=dict)

    def account(self) -> Account:
        plan = self.plan
        settings = {"kv_heads": plan.kv_heads, "method": plan.method} | self.settings
        removed = {"kv_heads": heads(plan.source).kv - plan.kv_heads}
        return Account("kv_cut", removed, self.metrics or None, settings)


def merge_heads(values, head_dim: int, kv_heads: int, method: str = "mean"):
    """Merge neighbouring heads of a k_proj or v_proj parameter, an array or tensor in fp32 or wider.

    values: weight (heads * head_dim, hidden) or bias (heads * head_dim,). Returns (kv_heads * head_dim, ...). New
    head i stands for neighbours in order, as transformers' repeat_kv shares heads. Method: mean pooling as in GQA
    (Ainslie et al., 2305.13245), or the first head of each group.
    """
    groups = values.reshape(kv_heads, -1, head_dim, *values.shape[1:])
    return MERGES[method](groups).reshape(-1, *values.shape[1:])


def plan_kv(checkpoint: Checkpoint, kv_heads: int, method: str = "mean") -> KVPlan:
    """Plan to merge the text stack's KV heads to `kv_heads`, a divisor of the present count.

    Raises PruneKitError if it isn't one, if it is the present count, or if the family has no shared KV heads.
    Reads no weights and writes no file.
    """
    family, row = checkpoint.family, checkpoint.family.text
    if family.kv_heads is None:
        raise PruneKitError(f"{family.model_type}: has no form with fewer KV heads than query heads; nothing to merge")
    _, present, head_dim = heads(checkpoint)
    divisors = [n for n in range(1, present) if present % n == 0]
    if kv_heads == present:
        raise PruneKitError(f"--kv-heads {kv_heads}: the model has {present} already; nothing to merge")
    if kv_heads not in divisors:
        raise PruneKitError(
            f"--kv-heads {kv_heads}: the model has {present} KV heads; "
            + (f"choose one of {', '.join(map(str, divisors))}" if divisors else "there is nothing to merge")
        )
    if method not in METHODS:
        raise PruneKitError(f"--method {method}: choose one of {', '.join(METHODS)}")

    shapes, projections = checkpoint.shapes(), _projections(checkpoint)
    for name in projections:
        old = checkpoint.tensors[name]
        if not old.shape or old.shape[0] != present * head_dim or old.dtype not in TORCH_DTYPES:
            raise PruneKitError(
                f"{name}: {old.dtype} {list(old.shape)}, where {present} KV heads of {head_dim} have "
                f"{present * head_dim} "
                "floating-point rows; copy or download it again"
            )
        shapes[name] = replace(shapes[name], shape=(kv_heads * head_dim, *old.shape[1:]))
    layers = attending(checkpoint) if row.linear else layer_numbers(checkpoint, "text")
    if sum(name.endswith(".weight") for name in projections) != 2 * len(layers):
        raise PruneKitError(f"{checkpoint.path}: not every text layer has {row.k} and {row.v}; the folder is damaged")
    config = copy.deepcopy(checkpoint.config)
    for part in configs(config, row):
        part[family.kv_heads] = kv_heads
    notes = drop_drafts(checkpoint, config, shapes)
    return KVPlan(checkpoint, Outline(checkpoint.path, config, shapes), kv_heads, method, notes)


def check_refinable(plan: KVPlan) -> None:
    """PruneKitError if what attention writes goes through a norm, so that no layer can be fitted to it."""
    family = plan.source.family
    if not family.text.plain_residual:
        raise PruneKitError(
            f"--refine: {family.model_type} has norms behind attention, which it can't fit; leave it out"
        )


def _projections(checkpoint: Checkpoint) -> list[str]:
    """Names of the text stack's k_proj and v_proj parameters."""
    row = checkpoint.family.text
    names = rf"{row.prefix}\d+\.(?:{re.escape(row.k)}|{re.escape(row.v)})\.(?:weight|bias)"
    return [name for name in checkpoint.tensors if re.fullmatch(names, name)]


def cut_kv(plan: KVPlan) -> KVCut:
    """Neighbouring heads merged by the plan's method, one of `MERGES`: it looks at no data."""
    source, head_dim = plan.source, heads(plan.source).dim

    def compute(name: str) -> memoryview:
        merged = merge_heads(source.read_array(name), head_dim, plan.kv_heads, plan.method)
        return float_bytes(merged, source.tensors[name].dtype, name)

    merged = {
        name: replace(source.tensors[name], shape=plan.outline.tensors[name].shape, compute=partial(compute, name))
        for name in _projections(source)
    }
    tensors = {
        name: merged.get(name, tensor) for name, tensor in source.tensors.items() if name in plan.outline.tensors
    }
    return KVCut(plan, replace(source, config=plan.outline.config, tensors=tensors))
