"""Scores of single weights, and of layers, that need a model in memory and calibration data.

wanda     |W| * norm of its input over the tokens (Sun et al., 2306.11695)
gradient  |W| * norm of its gradient over the batches (GBLM-Pruner, 2311.04902, without its activation term)
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prunekit.checkpoint import Checkpoint
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import NAME_PREFIX, spot_of
from prunekit.model.parts import Experts, place, text_tokens
from prunekit.model.replay import find_stack
from prunekit.model.scores import backward_loss, counted_states, final_states, logits_in_parts, model_inputs

from .zeros import Scores
from .zeros_weights import Weight

Layer = tuple[str, int]  # stack, number


def plain_name(name: str) -> str:
    return re.sub(NAME_PREFIX, "", name)


def _batches(data: Calibration, what: str) -> Iterator[dict[str, Any]]:
    yield from tqdm([*data.fit, *data.held_out], desc=what, leave=False, disable=None)


def _run(checkpoint: Checkpoint, model: nn.Module, batch: dict[str, Any]) -> None:
    if checkpoint.family.causal:
        final_states(model, batch)  # the head isn't run
    else:
        inputs = model_inputs(model, batch)
        del inputs["use_cache"]
        model(**inputs)


def _tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(tokens, width) in fp32, without padding."""
    return values.flatten(0, -2)[text_tokens(values, mask)].float()


def watch_inputs(module: nn.Module, mask: Callable[[], torch.Tensor], seen: Callable[..., None]) -> Any:
    """Hook a module: at each call `seen(part, number, values, tokens)` gets what its weights read; returns the handle.

    values: (n, inputs) in fp32; tokens: (n,), which of the flattened tokens they are. Left out is padding, which
    `mask()`, asked once a call, tells. Of a linear module part and number are None. Of stacked experts part is
    gate_up_proj or down_proj, and the values are of the tokens routed to expert `number`.
    """

    def linear(_, inputs: tuple) -> None:
        tokens = text_tokens(inputs[0], mask())
        seen(None, None, inputs[0].flatten(0, -2)[tokens].float(), tokens)

    def routed(_, inputs: tuple, kwargs: dict) -> None:
        for number, tokens, *read in Experts("", module, module).read(inputs, kwargs, mask()):
            for part, values in zip(("gate_up_proj", "down_proj"), read):
                seen(part, number, values.float(), tokens)

    if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
        return module.register_forward_pre_hook(routed, with_kwargs=True)
    return module.register_forward_pre_hook(linear)


def input_norms(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[str, torch.Tensor]:
    """By tensor: the norm of each input over all tokens but padding, (inputs,), for stacked experts (experts, inputs).

    An expert's are over the tokens routed to it. Raises PruneKitError for a tensor whose inputs can't be watched.
    """
    squares: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)
    spots = {name: spot_of(plain_name(name)) for name in weights}
    watched = {spot.module for spot in spots.values()} | {spot.name for spot in spots.values()}

    def add(name: str, module: nn.Module, part: str | None, number: int | None, values, _) -> None:
        total = values.square().sum(0)
        if part is None:
            squares[name] = squares.get(name, 0) + total
        else:
            empty = total.new_zeros(len(module.down_proj), len(total))
            squares.setdefault(f"{name}.{part}", empty)[number] += total

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if (name := plain_name(name)) in watched:
                hooks.callback(watch_inputs(module, lambda: mask, partial(add, name, module)).remove)
        for batch in _batches(data, "activations"):
            mask = batch["attention_mask"]
            _run(checkpoint, model, batch)

    norms = {}
    for name in weights:
        spot = spots[name]
        part = "down_proj" if spot.last.startswith("down") else "gate_up_proj"
        found = squares.get(f"{spot.module}.{part}" if spot.experts else spot.module)
        found = found[spot.expert] if found is not None and spot.expert is not None else found
        if found is None:
            raise PruneKitError(f"{name}: reads nothing of this data, or can't be watched; leave it out with --modules")
        norms[name] = found.sqrt().cpu()
    return norms


def wanda(checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]) -> Scores:
    """Scores by Wanda, with the dense model's activations. Memory: one number per input of each matrix."""
    norms = input_norms(checkpoint, model, data, weights)

    def score(name: str, values: torch.Tensor) -> torch.Tensor:
        norm = norms[name]
        shape = [
            *norm.shape[:-1],
            *([norm.shape[-1], 1] if weights[name].inputs == -2 else [1, norm.shape[-1]]),
        ]
        return values.float().abs() * norm.view(shape)

    return score


def _check_causal(checkpoint: Checkpoint) -> None:
    if not checkpoint.family.causal:
        raise PruneKitError(
            f"gradients are those of a causal language model's loss, which {checkpoint.family.model_type} has not; "
            "take another score"
        )


def gradient_norms(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[str, torch.Tensor]:
    """By tensor, in the checkpoint's layout: root mean square of its weights' gradients over the batches, in fp32.

    The loss is that of next tokens. Raises PruneKitError for encoders. Memory: the gradients and their squares.
    """
    _check_causal(checkpoint)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    places = {name: found for name in weights if (found := place(parameters, plain_name(name)))}
    if lost := [name for name in weights if name not in places]:
        raise PruneKitError(f"{lost[0]}: not found in the model; leave it out with --modules")
    trained = {id(parameter): parameter for parameter, _ in places.values()}
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    squares = {key: torch.zeros_like(parameter, dtype=torch.float32) for key, parameter in trained.items()}
    count = 0
    for batch in _batches(data, "gradients"):
        states, labels, _ = counted_states(final_states(model, batch), batch["labels"])
        losses = (
            nn.functional.cross_entropy(logits, labels[part], reduction="sum")
            for part, logits in logits_in_parts(model, states)
        )
        (sum(losses) / len(labels)).backward()
        count += 1
        for key, parameter in trained.items():
            if parameter.grad is not None:
                squares[key] += parameter.grad.float().square()
                parameter.grad = None
    model.requires_grad_(False)
    norms = {}
    for name, (parameter, part) in places.items():
        if not squares[id(parameter)].any():
            raise PruneKitError(f"{name}: no gradient of this data reaches it; leave it out with --modules")
        norm = (squares[id(parameter)][part] / count).sqrt().cpu()
        # Releases differ in the order of stacked experts' axes
        norms[name] = norm if norm.shape == checkpoint.tensors[name].shape else norm.transpose(-1, -2)
    return norms


def gradient(checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]) -> Scores:
    """Scores by gradient. Raises as `gradient_norms`."""
    norms = gradient_norms(checkpoint, model, data, weights)
    return lambda name, values: values.float().abs() * norms[name]


def gradient_importance(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[Layer, float]:
    """Importance of each layer: the mean of its weights' gradient scores."""
    scores = gradient(checkpoint, model, data, weights)
    sums: dict[Layer, list[float]] = {}
    for name, weight in weights.items():
        if weight.stack is not None and weight.layer is not None:
            found = scores(name, checkpoint.read(name))
            total = sums.setdefault((weight.stack, weight.layer), [0.0, 0])
            total[0] += float(found.double().sum())
            total[1] += found.numel()
    return {layer: total / count for layer, (total, count) in sums.items()}


class Tally:
    """A mean over tokens for each layer."""

    def __init__(self) -> None:
        self.totals: dict[Layer, list[float]] = {}

    def add(self, layer: Layer, values: torch.Tensor) -> None:
        """values: (tokens,)."""
        total = self.totals.setdefault(layer, [0.0, 0])
        total[0] += float(values.sum())
        total[1] += len(values)

    def means(self) -> dict[Layer, float]:
        return {layer: max(0.0, total / count) for layer, (total, count) in self.totals.items()}


def _watch_layers(
    checkpoint: Checkpoint,
    model: nn.Module,
    weights: dict[str, Weight],
    seen: Callable[[Layer, torch.Tensor, torch.Tensor], None],
) -> contextlib.ExitStack:
    """While it is open, `seen` gets each layer and what enters and leaves it, (batch, length, hidden)."""

    def watch(layer: Layer, module: nn.Module, inputs: tuple, kwargs: dict, output: Any) -> None:
        before = inputs[0] if inputs else kwargs["hidden_states"]
        seen(layer, before, output[0] if isinstance(output, tuple) else output)

    hooks = contextlib.ExitStack()
    for stack in {weight.stack for weight in weights.values() if weight.stack}:
        owner, attribute = find_stack(model, checkpoint.family.stacks[stack])
        for number, layer in enumerate(getattr(owner, attribute)):
            hook = layer.register_forward_hook(partial(watch, (stack, number)), with_kwargs=True)
            hooks.callback(hook.remove)
    return hooks


def _of_activations(
    checkpoint: Checkpoint,
    model: nn.Module,
    data: Calibration,
    weights: dict[str, Weight],
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[Layer, float]:
    """Mean over tokens of what `measure` makes of what enters and leaves each layer, both (tokens, hidden)."""
    tally, mask = Tally(), torch.empty(0)

    def seen(layer: Layer, before: torch.Tensor, after: torch.Tensor) -> None:
        tally.add(layer, measure(_tokens(before, mask), _tokens(after, mask)))

    with _watch_layers(checkpoint, model, weights, seen), torch.inference_mode():
        for batch in _batches(data, "activations"):
            mask = batch["attention_mask"]
            _run(checkpoint, model, batch)
    return tally.means()


def activation_importance(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[Layer, float]:
    """Importance of each layer: 1 - cosine of what enters and leaves it, mean over tokens (ShortGPT, 2403.03853)."""
    cosine = partial(nn.functional.cosine_similarity, dim=-1)
    return _of_activations(checkpoint, model, data, weights, lambda before, after: 1 - cosine(before, after))


def magnitude_importance(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[Layer, float]:
    """Importance of each layer: the mean absolute activation of what leaves it."""
    return _of_activations(checkpoint, model, data, weights, lambda _, after: after.abs().mean(-1))


def output_gradient_importance(
    checkpoint: Checkpoint, model: nn.Module, data: Calibration, weights: dict[str, Weight]
) -> dict[Layer, float]:
    """Importance of each layer: the mean absolute gradient of the loss with respect to what leaves it.

    The loss is the sum over next tokens, so that how rows are batched doesn't matter. Raises PruneKitError for
    encoders. Memory: what a backward pass keeps of a batch.
    """
    _check_causal(checkpoint)
    tally, mask = Tally(), torch.empty(0)

    def seen(layer: Layer, _, after: torch.Tensor) -> None:
        if after.requires_grad:
            rows = mask  # of this batch: the gradient comes later
            after.register_hook(lambda grad: tally.add(layer, _tokens(grad, rows).abs().mean(-1)))

    model.requires_grad_(False)
    roots = []  # a graph has to begin somewhere: at the smallest weight of each first layer
    for stack in {weight.stack for weight in weights.values() if weight.stack}:
        owner, attribute = find_stack(model, checkpoint.family.stacks[stack])
        roots.append(min(getattr(owner, attribute)[0].parameters(), key=torch.numel).requires_grad_(True))
    with _watch_layers(checkpoint, model, weights, seen), torch.enable_grad():
        for batch in _batches(data, "gradients"):
            mask = batch["attention_mask"]
            backward_loss(model, batch)
    for root in roots:
        root.grad = None
    model.requires_grad_(False)
    return tally.means()


IMPORTANCE = {
    "gradient": gradient_importance,
    "output-gradient": output_gradient_importance,
    "activation": activation_importance,
    "magnitude": magnitude_importance,
}
SCORES_OF = {"wanda": wanda, "gradient": gradient}
