"""Sparsity while a model trains: callbacks for transformers' Trainer that keep, deepen or move the zeros of its weights.

`KeepZeros` is a plain TrainerCallback; plugins/sparsity.py hands it and its kin to ms-swift. Gradients of masked weights
are zeroed before the optimizer and DDP see them, so its moments, gradient clipping and weight decay never know of them,
and masked weights are set to zero after each step, whatever optimizer it was.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from .errors import PruneKitError

MASKS = "zero_masks.safetensors"


def weight_matrices(model: nn.Module, modules: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the trained matrices that `modules` (a regex, searched for) names; never embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in embeddings and re.search(modules or "", name):
            if hasattr(parameter, "ds_id") and parameter.numel() < parameter.ds_numel:
                raise PruneKitError(
                    "DeepSpeed ZeRO-3 splits weights up: sparse training needs DEEPSPEED=zero2"
                )
            if parameter.dim() > 1:
                yield name, parameter


class KeepZeros(TrainerCallback):
    """What is zero in the matrices of a model when training begins stays zero, exactly, after every step.

    `modules`: regex of the parameters meant (None: all matrices but embeddings). A resumed run takes its masks from the
    checkpoint, where they are kept beside the weights. Raises PruneKitError if nothing is zero.
    """

    def __init__(self, modules: str | None = None):
        self.modules = modules
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}  # True: stays zero
        self.hooks: list = []

    @property
    def zeros(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        return self.zeros / sum(mask.numel() for mask in self.masks.values())

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = dict(weight_matrices(model, self.modules))
        saved = resumed_from(args, state)
        if saved and (saved / MASKS).is_file():
            self.masks = self._load_masks(saved / MASKS)
        else:
            self.masks = self._first_masks(saved)
        for name, weight in self.weights.items():
            if name in self.masks:
                self.hooks.append(weight.register_hook(partial(self._mask_gradient, name)))
        self._apply()
        if state.is_world_process_zero:
            print(f"sparse training: {self.zeros:,} zeros are kept, {self.sparsity:.2%} of their matrices")

    def _first_masks(self, saved: Path | None) -> dict[str, torch.Tensor]:
        """The masks of a run that begins, or (`saved`) was resumed from a checkpoint without masks."""
        masks = {name: weight.detach() == 0 for name, weight in self.weights.items()}
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        if not masks:
            raise PruneKitError(
                "no trained weight is zero, so there is nothing to keep: sparsify.py makes zeros"
            )
        return masks

    def _load_masks(self, path: Path) -> dict[str, torch.Tensor]:
        masks = {}
        for name, packed in load_file(path).items():
            weight = self.weights[name]
            bits = np.unpackbits(packed.numpy(), count=weight.numel())
            masks[name] = torch.from_numpy(bits).bool().view(weight.shape).to(weight.device)
        return masks

    def _mask_gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(self.masks[name], 0)

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name].masked_fill_(mask, 0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._apply()

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            packed = {name: np.packbits(mask.cpu().numpy()) for name, mask in self.masks.items()}
            draft = folder / f".{MASKS}.new"
            save_file({name: torch.from_numpy(bits) for name, bits in packed.items()}, draft)
            draft.replace(folder / MASKS)


def resumed_from(args, state) -> Path | None:
    """The checkpoint that a training goes on from; None for one that begins."""
    if not state.global_step:
        return None
    named = args.resume_from_checkpoint
    return (
        Path(named) if isinstance(named, str) else Path(args.output_dir) / f"checkpoint-{state.global_step}"
    )
