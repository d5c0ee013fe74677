"""CARE, a peer of kv_cut.py: its decomposition of K and V, written anew from the paper (2603.17946).

Each projection becomes a product of rank r that loses least of what it writes on calibration data (an SVD weighted by
the root of the inputs' second moments), so that r numbers a token would be cached for keys and r for values. With
`adjusted` ranks the same budget is spread over the layers: the next rank goes where it takes away the largest share of
what is still missing, early layers before late ones, small ranks before large (the rule of the authors' code,
FutureMLS-Lab/CARE). As in its zero-shot evaluation full keys are rebuilt from the latent ones before RoPE; the
checkpoint that is written here holds these products, multiplied out: it shows what quality is left, and saves no cache.
"""

import shutil
from pathlib import Path

import torch

from prunekit.checkpoint import new_folder, open_checkpoint
from prunekit.data.batches import Calibration, calibrate
from prunekit.model.load import load_model
from prunekit.model.scores import model_inputs


def second_moments(model, data: Calibration) -> list[torch.Tensor]:
    """Of what enters each text layer's k_proj: (hidden, hidden), summed over the tokens that the masks let through."""
    layers = model.model.layers
    moments = [torch.zeros(model.config.hidden_size, model.config.hidden_size) for _ in layers]
    seen: list[torch.Tensor] = []

    def add(number: int):
        def hook(_, inputs) -> None:
            states = inputs[0][seen[-1]].float()
            moments[number] += states.T @ states

        return hook

    handles = [layer.self_attn.k_proj.register_forward_pre_hook(add(n)) for n, layer in enumerate(layers)]
    with torch.inference_mode():
        for batch in [*data.fit, *data.held_out]:
            seen.append(batch["attention_mask"].bool())
            model.model(**model_inputs(model, batch))
    for handle in handles:
        handle.remove()
    return moments


class Decomposition:
    """A projection's weight (out, hidden), by the directions that matter most on data of the given second moments."""

    def __init__(self, weight: torch.Tensor, moments: torch.Tensor, damping: float = 0.1):
        moments = moments.double() + damping * moments.diagonal().double().mean() * torch.eye(len(moments))
        values, vectors = torch.linalg.eigh(moments)
        root = vectors * values.sqrt() @ vectors.T
        self.down, self.sizes, self.up = torch.linalg.svd(root @ weight.double().T, full_matrices=False)
        self.inverse = vectors * values.rsqrt() @ vectors.T

    def product(self, rank: int) -> torch.Tensor:
        return (self.inverse @ self.down[:, :rank] * self.sizes[:rank] @ self.up[:rank]).T


def adjusted_ranks(sizes: list[torch.Tensor], mean: int) -> list[int]:
    """A rank for each layer, `mean` on average, between a half and twice of it, from its singular values."""
    energies = [each.square() for each in sizes]
    count, ranks = len(sizes), [mean // 2] * len(sizes)

    def gain(layer: int) -> float:
        rank, energy = ranks[layer], energies[layer]
        if rank >= min(2 * mean, len(energy)):
            return -1.0
        late = ((count - layer) / ((count + 1) / 2)) ** 0.5
        return float(energy[rank] / energy[rank:].sum()) * late / (rank / (mean // 2)) ** 0.5

    for _ in range(count * (mean - mean // 2)):
        ranks[max(range(count), key=gain)] += 1
    return ranks


def decompose(folder: Path, out: Path, calib: Path, tokens: int, rank: int, adjusted: bool) -> list[tuple[int, int]]:
    """Write a checkpoint with K and V of that rank (on average) to OUT; the ranks of each layer's K and V."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    moments = second_moments(model, calibrate(model, checkpoint, calib, tokens, 512))
    chosen = []
    for name in ("k_proj", "v_proj"):
        projections = [getattr(layer.self_attn, name) for layer in model.model.layers]
        found = [Decomposition(each.weight.detach(), moment) for each, moment in zip(projections, moments, strict=True)]
        ranks = adjusted_ranks([each.sizes for each in found], rank) if adjusted else [rank] * len(found)
        for projection, decomposition, own in zip(projections, found, ranks, strict=True):
            projection.weight.data = decomposition.product(own).to(projection.weight.dtype)
        chosen.append(ranks)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        for file in folder.glob("token*"):
            shutil.copy(file, partial)
    return list(zip(*chosen, strict=True))
