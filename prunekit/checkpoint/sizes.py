"""How large a checkpoint is, from its headers alone."""

import math
import re
from pathlib import Path
from typing import Any

from prunekit.families import configs, spot_of

from .agreement import attending, heads, is_tied, layer_numbers
from .folder import open_checkpoint
from .format import Outline
from .quantised import weights_of

BUFFERS = re.compile(r"(?:.*\.)?(?:position_ids|inv_freq|attn\.(?:masked_)?bias)$")  # saved, but no parameters


def statistics(checkpoint_or_path: Outline | str | Path) -> dict[str, Any]:
    """Sizes of a checkpoint, from its headers alone.

    Returns parameters (tied weights counted once), parameters_by_component (text: the layers; vision: the whole tower;
    embedding: token embeddings and output head; other), bytes (of weights), num_hidden_layers, vision_depth (None
    without a vision tower), num_attention_heads, num_key_value_heads, head_dim, neurons (of an MLP, or of each expert),
    and kv_bytes_per_token: 2 (K and V) * layers * KV heads * head_dim * 2 bytes, of the layers that attend, with a
    sliding window or without. It counts bf16/fp16 whatever the weights' dtype, so that stages compare; 0 for encoders.
    vocab_size is of the embedding's rows, num_experts of a mixture's (None where there is none). Quantised weights
    count as parameters as before, their scales don't.
    """
    checkpoint = checkpoint_or_path if isinstance(checkpoint_or_path, Outline) else open_checkpoint(checkpoint_or_path)
    family = checkpoint.family
    patterns = {
        "vision": family.vision_prefix,
        "text": family.text.prefix + r"\d+\.",
        "embedding": family.embedding,
    }
    parts = dict.fromkeys(("text", "vision", "embedding", "other"), 0)
    tied = re.compile(family.tied) if is_tied(checkpoint) else None
    tensors = weights_of(checkpoint)
    for name, tensor in tensors.items():
        if BUFFERS.match(name) or (tied and tied.fullmatch(name)):
            continue
        part = next((part for part, pattern in patterns.items() if pattern and re.match(pattern, name)), "other")
        parts[part] += math.prod(tensor.shape)
    layers = len(layer_numbers(checkpoint, "text"))
    of_text = heads(checkpoint)
    config = configs(checkpoint.config, family.text)[0]
    rows = (each.shape[0] for name, each in tensors.items() if each.shape and re.fullmatch(family.vocabulary, name))
    return {
        "parameters": sum(parts.values()),
        "parameters_by_component": parts,
        "bytes": checkpoint.nbytes,
        "num_hidden_layers": layers,
        "vision_depth": len(layer_numbers(checkpoint, "vision")) if family.vision else None,
        "num_attention_heads": of_text.query,
        "num_key_value_heads": of_text.kv,
        "head_dim": of_text.dim,
        "neurons": config.get(family.text.experts or family.text.width) or 4 * config[family.hidden],
        "num_experts": _experts(checkpoint),
        "vocab_size": next(rows, None),
        "kv_bytes_per_token": 2 * len(attending(checkpoint)) * of_text.kv * of_text.dim * 2 if family.causal else 0,
    }


def _experts(checkpoint: Outline) -> int | None:
    """Of the first mixture in the text stack: rows of its router."""
    row = checkpoint.family.text
    for name, tensor in checkpoint.tensors.items() if row.experts else ():
        if (within := row.within(name)) and spot_of(within[1]) == (row.router, "weight", False, None) and tensor.shape:
            return tensor.shape[0]
    return None
