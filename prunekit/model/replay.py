"""The layer stacks of a loaded model: cut in memory, and run layer by layer from states that are kept.

A stack is an nn.ModuleList whose owner's forward runs it in a loop. Everything around that loop (embeddings, masks,
rotary positions, DeepStack features between layers, vision taps) stays the owner's own code: stand-ins in the list
feed it a kept state, and stop it after the layers that are wanted.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prunekit.families import Stack

from .scores import model_inputs


def find_stack(model: nn.Module, row: Stack) -> tuple[nn.Module, str]:
    """(owner, attribute): the module whose forward loops over this stack, and the name of its ModuleList."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and re.fullmatch(row.prefix, f"{name}."):
            parent, _, attribute = name.rpartition(".")
            return model.get_submodule(parent), attribute
    raise ValueError(f"{type(model).__name__} has no layers named like {row.prefix}")


Store = Callable[[torch.Tensor], torch.Tensor]


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Stop(Exception):
    pass


class _Given(nn.Module):
    """Stands in for the layer whose output is known."""

    def __init__(self, state: torch.Tensor):
        super().__init__()
        self.state = state

    def forward(self, *_, **__):
        return self.state


class _Pass(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


@contextlib.contextmanager
def given(owner: nn.Module, attribute: str, states: dict[int, torch.Tensor], start: int) -> Iterator[None]:
    """Within the block the first `start` layers don't run: each hands on its kept state, else what it gets."""
    layers = getattr(owner, attribute)
    before = [_Given(states[position]) if position in states else _Pass() for position in range(start)]
    setattr(owner, attribute, nn.ModuleList([*before, *layers[start:]]))
    try:
        yield
    finally:
        setattr(owner, attribute, layers)


class _End(nn.Module):
    """Stands in for the layer after the last one wanted: keeps what would have entered it."""

    def forward(self, hidden_states, *_, **__):
        self.entered = hidden_states
        raise _Stop


def record_calls(model: nn.Module, row: Stack, batches: Sequence[dict[str, Any]]) -> list[tuple[tuple, dict]]:
    """The (args, kwargs) with which the stack's owner is called for each batch; its layers aren't run."""
    owner, _ = find_stack(model, row)
    calls = []

    def record(_, args, kwargs):
        calls.append((args, kwargs))
        raise _Stop

    with owner.register_forward_pre_hook(record, with_kwargs=True), torch.inference_mode():
        for batch in batches:
            with contextlib.suppress(_Stop):
                model(**model_inputs(model, batch))
    return calls


class Replay:
    """One stack, run forward in steps over recorded calls: each layer is computed once, whatever stops lie between.

    `states[i]` is the raw output of layer `done - 1` for call i, (batch, length, hidden) or (patches, hidden);
    `added[i]` the sum of what the owner added between the layers before (DeepStack's features), 0.0 if nothing.
    `store` says where states are kept: it gets one and returns the same, in memory or on disk.
    """

    def __init__(self, model: nn.Module, row: Stack, calls: list[tuple[tuple, dict]], store: Store = in_memory):
        self.owner, self.attribute = find_stack(model, row)
        self.calls, self.done, self.store = calls, 0, store
        self.device = model.device
        self.states: list[Any] = [None] * len(calls)
        self.added: list[torch.Tensor | float] = [0.0] * len(calls)

    @torch.inference_mode()
    def step(
        self,
        end: int,
        seen: Callable[[int, torch.Tensor], None] = lambda index, state: None,
        keep: bool = True,
    ) -> None:
        """Run layers `done` to `end` - 1 on every call.

        `seen(i, state)` gets what enters layer `end` in call i, or what leaves the last layer, less all that the owner
        added. With `keep` the new states replace the old ones.
        """
        for index in range(len(self.calls)):
            output, added, entered = self._run(index, end)
            if keep:
                self.states[index] = output if output is None else self.store(output)
                self.added[index] = added
            if output is not None and entered is not output:
                added = added + (entered - output)
            seen(index, entered if isinstance(added, float) else entered - added)
        if keep:
            self.done = end

    def _run(self, index: int, end: int) -> tuple[torch.Tensor | None, torch.Tensor | float, torch.Tensor]:
        """(output of layer end - 1, sum of what was added before that layer, what enters layer end)."""
        args, kwargs = self.calls[index]
        output, added = self.states[index], self.added[index]
        if output is not None:
            output = output.to(self.device)
        layers, stop = getattr(self.owner, self.attribute), _End()

        def enter(_, inputs):
            nonlocal added
            if output is not None and inputs[0] is not output:
                added = added + (inputs[0] - output)

        def leave(_, inputs, result):
            nonlocal output
            output = result

        before = [*[_Pass()] * (self.done - 1), *([_Given(output)] if self.done else [])]
        stand_ins = nn.ModuleList([*before, *layers[self.done : end], *[stop] * (len(layers) - end)])
        with contextlib.ExitStack() as undo:
            for layer in layers[self.done : end]:
                undo.enter_context(layer.register_forward_pre_hook(enter))
                undo.enter_context(layer.register_forward_hook(leave))
            undo.callback(setattr, self.owner, self.attribute, layers)
            setattr(self.owner, self.attribute, stand_ins)
            with contextlib.suppress(_Stop):
                self.owner(*args, **kwargs)
        return output, added, output if end == len(layers) else stop.entered
