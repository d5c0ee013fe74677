"""Work on models larger than memory: layers stay on disk until their turn, and what is kept of them goes back there."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from prunekit.families import Stack

from .replay import Store, find_stack


def on_disk(folder: str | Path) -> Store:
    """A store that maps tensors from nameless files in `folder`: what is mapped needn't stay in memory.

    A process that dies leaves none behind. The store raises OSError if the disk is full.
    """

    def store(tensor: torch.Tensor) -> torch.Tensor:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Before the map is: writing to it kills the process if the disk is full
            os.posix_fallocate(file.fileno(), 0, max(tensor.nbytes, 1))
            raw = np.memmap(file, np.uint8, "r+", shape=(tensor.nbytes,))
        mapped = torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
        return mapped.copy_(tensor)

    return store


def device_map(model: nn.Module, row: Stack, device: str) -> dict[str, str]:
    """accelerate's map: the layers of a stack on disk, all that is around them on `device`. The model may be empty."""
    layers = getattr(*find_stack(model, row))
    stack = next(name for name, module in model.named_modules() if module is layers)
    places = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if stack.startswith(f"{prefix}{name}."):
                visit(f"{prefix}{name}.", child)
            else:
                places[prefix + name] = "disk" if prefix + name == stack else device

    visit("", model)
    return places


def bring(layer: nn.Module) -> bool:
    """Load a layer that accelerate keeps on disk, for good. False, and nothing done, if it is in memory."""
    hooked = [module for module in layer.modules() if hasattr(module, "_hf_hook")]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    remove_hook_from_module(layer, recurse=True)
    return bool(hooked)
