"""Which weights of a checkpoint zeros are chosen from or counted in: those of its projections, or named ones."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from prunekit.checkpoint import TORCH_DTYPES, Checkpoint, layer_numbers, statistics
from prunekit.errors import PruneKitError
from prunekit.families import Family, Spot, Stack, configs, spot_of


@dataclass(frozen=True)
class Weight:
    """Where a weight matrix stands in the model, and which of its axes are the inputs."""

    stack: str | None = None
    layer: int | None = None
    inputs: int = -1


def _is_projection(row: Stack, spot: Spot) -> bool:
    """Whether it is a weight of a layer's projection, or of a mixture's experts."""
    block = row.mlp[-1].rpartition(".")[0]
    plain = {row.q, row.k, row.v, row.o, *row.linear, *row.mlp, *map(row.beside_experts, row.mlp)}
    return spot.kind == "weight" and spot.name in ({*row.mlp, f"{block}.gate_up_proj"} if spot.experts else plain)


def chooser(family: Family, modules: str | None) -> Callable[[str], tuple[str | None, int | None] | None]:
    """What says of a matrix's name if it is chosen, and of which stack and layer it is (None, None: of none).

    Chosen are the layers' projections in whose names the regex `modules` is found (None: all). Embeddings, output
    heads, routers and whatever else is no layer's projection must match it from end to end. PruneKitError for a bad
    regex.
    """
    try:
        wanted = re.compile(modules or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise PruneKitError(f"--modules {(modules or '')[:80]!r}: not a regular expression ({error})") from None

    def choose(name: str) -> tuple[str | None, int | None] | None:
        for stack, row in family.stacks.items():
            if (within := row.within(name)) and _is_projection(row, spot_of(within[1])):
                return (stack, within[0]) if wanted.search(name) else None
        return (None, None) if modules and wanted.fullmatch(name) else None

    return choose


def choose_weights(checkpoint: Checkpoint, modules: str | None = None) -> dict[str, Weight]:
    """The weight matrices to sparsify, by name: what `chooser` chooses. PruneKitError if that is nothing."""
    family, chosen = checkpoint.family, {}
    choose = chooser(family, modules)
    for stack in family.stacks:
        layer_numbers(checkpoint, stack)  # raises if the folder is damaged
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) < 2 or not (found := choose(name)):
            continue
        owner, layer = found
        axis = _input_axis(checkpoint, family.stacks[owner], name, tensor.shape) if owner else -1
        chosen[name] = Weight(owner, layer, axis)
        if tensor.dtype not in TORCH_DTYPES:
            raise PruneKitError(f"{name}: has dtype {tensor.dtype}; leave it out with --modules")
    if not chosen:
        some = next(filter(chooser(family, None), checkpoint.tensors))
        raise PruneKitError(f"--modules {(modules or '')[:80]!r}: matches no weight; they are named like {some}")
    return chosen


def _input_axis(checkpoint: Checkpoint, row: Stack, name: str, shape: tuple[int, ...]) -> int:
    if row.inputs_first:
        return -2
    if len(shape) < 3:
        return -1
    # All experts in one: releases differ in the order of the axes, so the hidden size has to tell
    hidden = configs(checkpoint.config, row)[0][checkpoint.family.hidden]
    reads_hidden = spot_of(name).last != row.mlp[-1].rpartition(".")[2]
    return -1 if (shape[-1] == hidden) == reads_hidden or shape[-1] == shape[-2] else -2


def count_zeros(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """How many values of each of these tensors are zero, read a tensor at a time."""
    names = tqdm(names, desc="count zeros", leave=False, disable=None)
    return {name: int((checkpoint.read(name) == 0).sum()) for name in names}


def sparsity_record(checkpoint: Checkpoint, zeros: Mapping[str, int]) -> dict[str, Any]:
    """What a history says of sparsity: zeros, their share of the chosen weights, of all parameters, and by tensor.

    zeros: how many each chosen tensor of the checkpoint's has, or shall have.
    """
    sizes = {name: math.prod(checkpoint.tensors[name].shape) for name in zeros}
    count, chosen = sum(zeros.values()), sum(sizes.values())
    return {
        "zeros": count,
        "weights": chosen,
        "sparsity": count / chosen,
        "of_all_parameters": count / statistics(checkpoint)["parameters"],
        "tensors": {name: zeros[name] / sizes[name] for name in zeros},
    }


def measure(checkpoint: Checkpoint, modules: str | None = None) -> dict[str, Any]:
    """`sparsity_record` of what is zero in a checkpoint's chosen weights now."""
    return sparsity_record(checkpoint, count_zeros(checkpoint, choose_weights(checkpoint, modules)))
