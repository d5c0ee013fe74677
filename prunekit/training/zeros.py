"""Sparsity while a model trains: callbacks for transformers' Trainer that keep, deepen or move its zeros.

`KeepZeros` is a plain TrainerCallback; plugins/sparsity.py hands it and its kin to ms-swift. Gradients of masked
weights are zeroed before the optimizer and DDP see them, so its moments, gradient clipping and weight decay never know
of them, and masked weights are set to zero after each step, whatever optimizer it was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from prunekit.checkpoint import read_json, write_json
from prunekit.checkpoint.records import ZEROS
from prunekit.errors import PruneKitError
from prunekit.families import family_of
from prunekit.surgery.zeros_pick import Cut, find_cuts, sort_keys
from prunekit.surgery.zeros_weights import chooser

from .zeros_lora import mask_lora
from .zeros_settings import SPLIT_UP, Dynamic, Gradual

MASKS = "zero_masks.safetensors"


def weight_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of a model's trained matrices, embeddings left out. PruneKitError if they are split up."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in embeddings:
            if getattr(parameter, "ds_numel", parameter.numel()) > parameter.numel() or hasattr(
                parameter, "placements"
            ):
                raise PruneKitError(SPLIT_UP)
            if parameter.dim() > 1:
                yield name, parameter


class KeepZeros(TrainerCallback):
    """What is zero in the matrices of a model (not in embeddings) when training begins stays zero, exactly.

    A resumed run takes its masks from the checkpoint, where they are kept beside the weights. LoRA adapters get those
    of their base, which doesn't change. Raises PruneKitError if nothing is zero.
    """

    def __init__(self):
        self.under_lora = 0  # zeros of the matrices that adapters add to
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}  # True: stays zero
        self.hooks: list = []

    @property
    def zeros(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        return self.zeros / sum(mask.numel() for mask in self.masks.values())

    def on_train_begin(self, args, state, control, *, model=None, **kwargs):
        self.weights = self._choose(model)
        self.under_lora = mask_lora(model)
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
            if self.under_lora:
                print(f"sparse training: {self.under_lora:,} zeros of the base are kept by its adapters")
            if self.masks:
                print(f"sparse training: {self.zeros:,} zeros are kept, {self.sparsity:.2%} of their matrices")

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in weight_matrices(model) if ".lora_" not in name}

    def _first_masks(self, saved: Path | None) -> dict[str, torch.Tensor]:
        """The masks of a run that begins, or (`saved`) was resumed from a checkpoint without masks."""
        masks = {name: weight.detach() == 0 for name, weight in self.weights.items()}
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        if not masks and not self.under_lora:
            raise PruneKitError("no trained weight is zero, so there is nothing to keep: sparsify.py makes zeros")
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
        while self.hooks:
            self.hooks.pop().remove()

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and self.masks:
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
    return Path(named) if isinstance(named, str) else Path(args.output_dir) / f"checkpoint-{state.global_step}"


def prune_lowest(weights: dict[str, torch.Tensor], sparsity: float, scope: str) -> dict[str, torch.Tensor]:
    """Masks (True: goes) by magnitude: exactly round(sparsity * n) of all, what is zero already first.

    scope: one threshold for all (global), or the same share of each tensor (layer). If more are zero already, only
    these go.
    """

    def keys(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            weight = weights[name].detach()
            yield name, sort_keys(weight.abs(), weight)

    cuts: dict[str, Cut] = {}
    for names in [list(weights)] if scope == "global" else [[name] for name in weights]:
        wanted = round(sparsity * sum(weights[name].numel() for name in names))
        zeros = sum(int((weights[name] == 0).sum()) for name in names)
        cuts |= find_cuts(partial(keys, names), max(wanted, zeros))
    return {name: cuts[name].mask(key) for name, key in keys(weights)}


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for exactly `count` of the lowest of these scores (n,), none below 0; the first ones where they tie."""
    keys = sort_keys(scores, torch.ones_like(scores))
    return find_cuts(lambda: [("", keys)], count)[""].mask(keys)


def moved(mask: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, share: float) -> torch.Tensor:
    """A mask with as many zeros elsewhere: at the smallest weights, no longer at the largest gradients.

    `share` of the weights that are not masked are dropped; as many of all that are masked then, the dropped included,
    grow.
    """
    new, active = mask.clone(), ~mask
    count = min(int(share * int(active.sum())), int(mask.sum()))
    if not count:
        return new
    new[active] = lowest(weight[active].abs(), count)
    candidates = gradient[new].abs()
    new[new.clone()] = lowest(candidates, len(candidates) - count)
    return new


class MovingSparsity(KeepZeros):
    """What gradual and dynamic pruning share: the layers' projections, and a history in OUTPUT/sparsity.json."""

    def __init__(self, settings: Gradual | Dynamic, trainer=None):
        super().__init__()
        self.settings, self.trainer = settings, trainer
        self.history: dict[str, Any] = {"settings": asdict(settings), "events": []}

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        choose = chooser(family_of(model.config.to_dict()), self.settings.modules)
        chosen = {name: weight for name, weight in weight_matrices(model) if choose(name)}
        if not chosen:
            raise PruneKitError(f"modules={self.settings.modules}: matches no trained weight")
        return chosen

    def on_train_begin(self, args, state, control, **kwargs):
        if resumed_from(args, state):
            self.history = read_json(Path(args.output_dir) / ZEROS)
            if self.history["settings"] != asdict(self.settings):
                raise PruneKitError(
                    f"{args.output_dir}: holds a run with other settings of sparsity: {self.history['settings']}"
                )
            self.history["events"] = [e for e in self.history["events"] if e["step"] < state.global_step]
        super().on_train_begin(args, state, control, **kwargs)
        self._write_history(args, state)  # what is resumed before its first event reads it, too

    def _write_history(self, args, state) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / ZEROS, self.history)

    def _forget(self, optimizer, name: str, mask: torch.Tensor) -> None:
        """Clear the optimizer's moments of these weights."""
        for value in getattr(optimizer, "state", {}).get(self.weights[name], {}).values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value.masked_fill_(mask, 0)


class GradualPruning(MovingSparsity):
    """Deepens sparsity in a few events, as `Gradual` says, and keeps it between them.

    With a trainer that has a validation set, each event's quality before pruning, after it, and after retraining goes
    into the history. Resumed, it goes on where it was.
    """

    settings: Gradual

    def _first_masks(self, saved: Path | None) -> dict[str, torch.Tensor]:
        return {name: weight.detach() == 0 for name, weight in self.weights.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.settings.events > state.max_steps:
            raise PruneKitError(f"events={self.settings.events}: more than the run's {state.max_steps} steps")
        self.metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        self.higher = bool(args.greater_is_better) and not self.metric.endswith("loss")
        self.history |= {"metric": self.metric, "stopped_before": None} | self.history
        self.levels = dict(zip(self.settings.steps(state.max_steps), self.settings.levels()))
        if self.settings.worse and getattr(self.trainer, "eval_dataset", None) is None:
            raise PruneKitError("worse: a stop rule needs a validation set")
        super().on_train_begin(args, state, control, **kwargs)
        if self.history["stopped_before"] and self.history["stopped_before"] >= state.global_step:
            self.history["stopped_before"] = None

    def _quality(self) -> float | None:
        if getattr(self.trainer, "eval_dataset", None) is None:
            return None
        found = self.trainer.evaluate(metric_key_prefix="pruning")
        return next((v for key, v in found.items() if key.removeprefix("pruning_") == self.metric), None)

    def _too_bad(self, quality: float | None) -> bool:
        events, worse = self.history["events"], self.settings.worse
        if worse is None or quality is None or not events:
            return False
        dense = events[0]["before"]
        return not (quality >= dense * (1 - worse) if self.higher else quality <= dense * (1 + worse))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        level, events = self.levels.get(state.global_step), self.history["events"]
        if level is None or self.history["stopped_before"] is not None:
            return
        before = self._quality()
        if events:
            events[-1]["retrained"] = before
        if self._too_bad(before):
            self.history["stopped_before"] = state.global_step
            print(f"sparse training: no more pruning, {self.metric} {before:.4f} is too bad at {self.sparsity:.1%}")
        else:
            self.masks = prune_lowest(self.weights, level, self.settings.scope)
            self._apply()
            for name, mask in self.masks.items():
                self._forget(optimizer, name, mask)
            event = {"step": state.global_step, "sparsity": self.sparsity, "zeros": self.zeros}
            events.append(event | {"before": before, "after": self._quality(), "retrained": None})
            if self.trainer is not None:
                self.trainer.log({"sparsity": self.sparsity})
        self._write_history(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self.history["events"]:
            self.history["events"][-1]["retrained"] = self._quality()
        self._write_history(args, state)
        super().on_train_end(args, state, control, **kwargs)


class DynamicSparsity(MovingSparsity):
    """Moves zeros as `Dynamic` says: each matrix always has as many of them as in the beginning."""

    settings: Dynamic

    def __init__(self, settings: Dynamic, trainer=None):
        super().__init__(settings, trainer)
        self.share = 0.0  # that moves in this step

    def _first_masks(self, saved: Path | None) -> dict[str, torch.Tensor]:
        if saved:  # what has just grown is zero, too, so that zeros don't tell the masks
            raise PruneKitError(f"{saved}: has no {MASKS}, so it isn't whole; remove it, and run again")
        if self.settings.sparsity:
            return prune_lowest(self.weights, self.settings.sparsity, "global")
        return super()._first_masks(saved)

    def on_step_begin(self, args, state, control, **kwargs):
        self.share = self.settings.share_at(state.global_step, state.max_steps)

    def _mask_gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.share else super()._mask_gradient(name, gradient)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self.share:
            return
        count = 0
        for name, mask in self.masks.items():
            weight = self.weights[name]
            if weight.grad is None:
                raise PruneKitError("dynamic sparsity reads gradients, which DeepSpeed splits up: set DEEPSPEED=")
            self.masks[name] = new = moved(mask, weight, weight.grad, self.share)
            count += int((new & ~mask).sum())
            weight.grad.masked_fill_(new, 0)
            weight.masked_fill_(new, 0)
            self._forget(optimizer, name, new | mask)
        self.history["events"].append({"step": state.global_step, "share": self.share, "moved": count})
        self._write_history(args, state)
        if self.trainer is not None:
            self.trainer.log({"sparsity": self.sparsity, "moved": count})
