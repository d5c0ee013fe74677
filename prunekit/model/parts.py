"""Where the parts of a loaded layer lie: its projections, heads and experts, by the names of the family's row.

What a new architecture does differently in memory is said here, and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.checkpoint import Heads
from prunekit.families import Stack, spot_of


@dataclass(frozen=True)
class Slice:
    """Neighbouring rows or columns of a parameter: `length` of them, from `start` on."""

    parameter: nn.Parameter
    axis: int
    start: int
    length: int

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """A view of them, in the parameter or in what is shaped like it."""
        return value.narrow(self.axis, self.start, self.length)

    def by_head(self, value: torch.Tensor, heads: int) -> torch.Tensor:
        """(heads, head_dim, the rest) of a weight whose heads lie side by side, in fp32."""
        return self.of(value).movedim(self.axis, 0).reshape(heads, self.length // heads, -1).float()


@dataclass(frozen=True)
class Linear:
    """A projection: a module of its own, or the outputs from `start` on of one that is fused of several."""

    name: str  # the row's, which is the checkpoint's, too
    module: nn.Module
    start: int = 0
    length: int | None = None  # None: all outputs

    @property
    def inputs_first(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def matrix(self) -> torch.Tensor:
        """A view of the module's weight, (outputs, inputs)."""
        return self.module.weight.T if self.inputs_first else self.module.weight

    def outputs(self) -> list[Slice]:
        """Where its outputs lie: in the weight, and in the bias if there is one."""
        length = len(self.matrix) if self.length is None else self.length
        where = [(self.module.weight, int(self.inputs_first)), (self.module.bias, 0)]
        return [Slice(parameter, axis, self.start, length) for parameter, axis in where if parameter is not None]

    def inputs(self) -> Slice:
        return Slice(self.module.weight, int(not self.inputs_first), 0, self.matrix.shape[1])


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, whose weights are stacked: down_proj, and gate and up, one behind the other."""

    name: str  # of the projection that writes, as the row names that of a plain MLP
    block: nn.Module  # the MLP: router and experts; what it writes is linear in all their down_proj
    module: nn.Module

    def __len__(self) -> int:
        return len(self.module.down_proj)

    def read(
        self, inputs: tuple, named: dict[str, Any], mask: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What each expert's projections read in a call of the module with these arguments.

        Yields (expert, tokens, states, neurons): (n,) which of the flattened tokens that count were routed to it, and
        what its first (n, hidden) and its last projection (n, width) read of them. mask: as in `text_tokens`.
        """
        given = dict(zip(("hidden_states", "top_k_index"), inputs)) | named
        states, chosen = given["hidden_states"].flatten(0, -2), given["top_k_index"].flatten(0, -2)
        tokens = text_tokens(states, mask)
        for expert in range(len(self)):
            mine = tokens[(chosen[tokens] == expert).any(-1)]
            yield expert, mine, states[mine], self.neurons(expert, states[mine])

    def neurons(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """(n, width): what an expert's last projection reads of what its first ones read, (n, hidden)."""
        first = self.module.gate_up_proj[expert]
        gate, up = (states @ (first if getattr(self.module, "is_transposed", False) else first.T)).chunk(2, -1)
        return self.module.act_fn(gate) * up

    @property
    def router(self) -> nn.Module:
        """Of states (n, hidden) it gives all experts' logits, and the shares and numbers of those chosen."""
        return self.block.gate

    @property
    def normed(self) -> bool:
        """Whether the shares of those chosen are made to sum to 1."""
        return getattr(self.router, "norm_topk_prob", True)

    @property
    def shared(self) -> "Shared | None":
        for name in ("shared_expert", "shared_experts"):
            if hasattr(self.block, name):
                return Shared(name, getattr(self.block, name), getattr(self.block, f"{name}_gate", None))
        return None


@dataclass(frozen=True)
class Shared:
    """The expert that all tokens go through."""

    name: str  # within the mixture
    mlp: nn.Module
    gate: nn.Module | None

    def share(self, states: torch.Tensor) -> torch.Tensor:
        """(n, 1): how much of what it gives counts."""
        return self.gate(states).sigmoid() if self.gate else states.new_ones(len(states), 1)

    def neurons(self, states: torch.Tensor) -> torch.Tensor:
        """(n, width): what its last projection reads."""
        return self.mlp.act_fn(self.mlp.gate_proj(states)) * self.mlp.up_proj(states)


def text_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n,): which of the flattened tokens count: all but padding, or all where the values aren't of text tokens."""
    count = values.shape[:-1].numel()
    if count != mask.numel():
        return torch.arange(count, device=values.device)
    return mask.flatten().nonzero()[:, 0].to(values.device)


def find_part(layer: nn.Module, row: Stack, name: str) -> Linear | Experts:
    """A layer's projection of this name in the row, or the experts that stand in its place."""
    block, _, linear = name.rpartition(".")
    parent = layer.get_submodule(block)
    if hasattr(parent, linear):
        return Linear(name, getattr(parent, linear))
    return Experts(name, parent, parent.experts)


def find_mixer(layer: nn.Module, row: Stack) -> str:
    """The row's name of what a layer's attention writes with, be it full or linear."""
    names = {name for name, _ in layer.named_modules()}
    return next(name for name in row.mixers if name in names)


class LayerParts:
    """A layer's attention, its heads, and what its MLP writes with.

    A layer of linear attention has no heads that its config's counts are of: only `o` and `down`.
    """

    attention: nn.Module
    q: Linear  # the heads' queries, each with its gate behind it where the row has gates
    k: Linear
    v: Linear

    def __init__(self, layer: nn.Module, row: Stack, heads: Heads):
        self.heads = heads
        mixer, modules = find_mixer(layer, row), dict(layer.named_modules())
        self.attends = mixer == row.o
        self.o = Linear(mixer, modules[mixer])
        self.down = find_part(layer, row, row.mlp[-1])
        self.norms = {name: modules[name] for name in (row.q_norm, row.k_norm) if name in modules}
        if not self.attends:
            return
        self.attention = layer.get_submodule(row.q.rpartition(".")[0])  # returns its distributions, if eager
        names, kv = (row.q, row.k, row.v), heads.kv * heads.dim
        fused = [(0, heads.query * heads.dim), (heads.query * heads.dim, kv), (heads.query * heads.dim + kv, kv)]
        where = fused if row.qkv else [(0, None)] * 3
        self.q, self.k, self.v = (Linear(n, layer.get_submodule(n), *w) for n, w in zip(names, where, strict=True))


def place(parameters: dict[str, nn.Parameter], name: str) -> tuple[nn.Parameter, Any] | None:
    """(parameter, part of it) that a checkpoint's tensor is in memory, where experts are stacked; None if it's not
    there.

    parameters: by names that are relative to what `name` is relative to.
    """
    if name in parameters:
        return parameters[name], ...
    spot = spot_of(name)
    if spot.expert is None:
        parameter = parameters.get(f"{spot.name}.{spot.kind}")
        return None if parameter is None else (parameter, ...)
    if spot.last.startswith("down"):
        return parameters[f"{spot.module}.down_proj"], spot.expert
    both = parameters[f"{spot.module}.gate_up_proj"]
    half = both.shape[1] // 2
    return both, (spot.expert, slice(0, half) if spot.last.startswith("gate") else slice(half, None))
