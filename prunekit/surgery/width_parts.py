"""Where heads and neurons lie in a checkpoint's tensors, and a tensor with only some of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.checkpoint import TORCH_DTYPES, Checkpoint, attending, heads, layer_numbers
from prunekit.errors import PruneKitError
from prunekit.families import Stack, configs, spot_of


@dataclass(frozen=True)
class Part:
    """A tensor of a layer's attention or MLP, and where heads or neurons lie in it."""

    layer: int
    role: str  # q, k, v, o; `in` and `out` of neurons
    axis: int
    expert: int | None = None  # whose; None: no expert's, or those of all experts in one tensor
    stacked: bool = False  # experts are its first axis
    halves: int = 1  # 2: gate and up, one behind the other
    gated: bool = False  # behind each head's queries is its gate

    @property
    def turned(self) -> bool:
        """Whether it is (experts, inputs, outputs), and in memory (experts, outputs, inputs)."""
        return self.stacked and self.axis == (1 if self.role == "out" else 2)

    def unit(self, head_dim: int) -> int:
        """Rows or columns of a head or neuron."""
        return (1 if self.role in ("in", "out") else head_dim) * (1 + self.gated)


def find_parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """The text stack's tensors that have an axis of heads or neurons, by name. Fused q, k and v aren't among them."""
    family, row = checkpoint.family, checkpoint.family.text
    hidden = configs(checkpoint.config, row)[0][family.hidden]
    linears = {row.o: "o"} | dict.fromkeys(row.mlp[:-1], "in") | {row.mlp[-1]: "out"}
    if row.qkv is None:
        linears |= {row.q: "q", row.k: "k", row.v: "v"}
    parts = {}
    for name in checkpoint.tensors:
        if not (within := row.within(name)):
            continue
        layer, spot = within[0], spot_of(within[1])
        reads = spot.name == row.mlp[-1]
        if spot.experts and (not row.experts or spot.kind == "bias"):
            continue
        if spot.expert is not None:
            parts[name] = Part(layer, "out" if reads else "in", int(reads), spot.expert)
        elif spot.stacked:
            # (experts, outputs, inputs) as in memory, or turned, as some releases have it: one that isn't square tells
            of_down, of_both = (name.replace(spot.last, last) for last in ("down_proj", "gate_up_proj"))
            _, rows, columns = checkpoint.tensors[of_down].shape
            turned = rows != hidden if rows != columns else checkpoint.tensors[of_both].shape[2] != hidden
            axis = (1 if turned else 2) if reads else (2 if turned else 1)
            parts[name] = Part(layer, "out" if reads else "in", axis, stacked=True, halves=1 if reads else 2)
        elif (role := linears.get(spot.name)) and spot.kind == "weight":
            rows = 1 if row.inputs_first else 0
            axis = 1 - rows if role in ("o", "out") else rows
            parts[name] = Part(layer, role, axis, gated=row.gated and role == "q")
        elif role in ("q", "k", "v", "in") and spot.kind == "bias":
            parts[name] = Part(layer, role, 0, gated=row.gated and role == "q")
    return parts


def mlp_widths(checkpoint: Checkpoint, parts: dict[str, Part]) -> dict[str, int]:
    """Neurons of each MLP, by the config key that says so: dense layers', experts'. PruneKitError if layers differ."""
    widths: dict[str, int] = {}
    for name, part in parts.items():
        if part.role == "out":
            key = neurons_key(checkpoint.family.text, part.stacked or part.expert is not None)
            width = checkpoint.tensors[name].shape[part.axis]
            if widths.setdefault(key, width) != width:
                raise PruneKitError(f"{name}: {width} neurons, other layers have {widths[key]}; the folder is damaged")
    return widths


def neurons_key(row: Stack, of_experts: bool) -> str:
    """The config key that says how many neurons an MLP, or an expert, has."""
    return row.experts if of_experts and row.experts else row.width


def narrow(array: Any, part: Part, kept: Sequence[int], unit: int = 1, zero: bool = False):
    """An array of a part with only these heads (of `unit` rows or columns) or neurons; with `zero` the others are 0."""
    import numpy as np

    count = array.shape[part.axis] // part.halves
    index = (np.asarray(kept, int)[:, None] * unit + np.arange(unit)).reshape(-1)
    index = np.concatenate([index + half * count for half in range(part.halves)])
    if not zero:
        return array.take(index, part.axis)
    at = tuple(index if axis == part.axis else slice(None) for axis in range(array.ndim))
    result = np.zeros_like(array)
    result[at] = array[at]
    return result


def check_shapes(checkpoint: Checkpoint, parts: dict[str, Part]) -> None:
    """PruneKitError unless every layer has its projections, in floating point, with the heads that the config says."""
    count, kv_count, width = heads(checkpoint)
    wanted = {"q": count, "o": count, "k": kv_count, "v": kv_count}
    attend = attending(checkpoint) if checkpoint.family.text.linear else layer_numbers(checkpoint, "text")
    for layer in layer_numbers(checkpoint, "text"):
        roles = {part.role for part in parts.values() if part.layer == layer}
        needed = {"o", "in", "out"} if layer in attend else {"in", "out"}
        if not needed <= roles or ("q" in roles) != ({"k", "v"} <= roles):
            raise PruneKitError(
                f"{checkpoint.path}: layer {layer} lacks projections of attention or MLP; the folder is damaged"
            )
    for name, part in parts.items():
        tensor = checkpoint.tensors[name]
        if tensor.dtype not in TORCH_DTYPES:
            raise PruneKitError(f"{name}: {tensor.dtype}; only floating-point weights can be cut")
        if part.role in wanted and tensor.shape[part.axis] != wanted[part.role] * part.unit(width):
            raise PruneKitError(
                f"{name}: {list(tensor.shape)}, where {wanted[part.role]} heads of {width} have "
                f"{wanted[part.role] * part.unit(width)}; copy or download it again"
            )
