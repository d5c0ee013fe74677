"""Models whose KV heads are alike, and moments of what their attention computes."""

import torch
from helpers.tiny_models import FAMILIES, head_dim_of, text_config

from prunekit.families import FAMILIES as ROWS
from prunekit.surgery.kv_math import pairing, rotation
from prunekit.surgery.kv_merge import gather

SHARED = [family for family in FAMILIES if ROWS[family].kv_heads]


def moments_of(attention, inputs, slow=0):
    """Moments of inputs (tokens, hidden) each, with so many slow pairs."""
    pairs = torch.arange(attention.head_dim // 2)
    masks = [torch.ones(1, len(x), dtype=torch.bool) for x in inputs]
    return gather(attention, [x[None] for x in inputs], masks, pairs >= len(pairs) - slow)


@torch.no_grad()
def alike(model, turns=True):
    """Make KV heads h and h + n/2 one and the same but for a turn and scale of each pair of k, and a map of v.

    Without `turns` pairs only change their sign, which is all that a norm behind k_proj allows; in front of gates v's
    dimensions only change their order and size.
    """
    generator = torch.Generator().manual_seed(5)
    width = head_dim_of(model)
    config = text_config(model)
    half, gated = config.num_key_value_heads // 2, hasattr(config, "linear_num_key_heads")
    rotated = int(width * config.rope_parameters.get("partial_rotary_factor", 1))
    back = pairing(rotated, width).argsort()
    for name, projection in model.named_modules():
        for head in range(half if name.endswith(("self_attn.k_proj", "self_attn.v_proj")) else 0):
            draw = torch.rand(width // 2, generator=generator)
            change = rotation(torch.polar(draw + 0.5, 6.3 * draw) if turns else (draw - 0.5).sign().to(torch.cfloat))
            change = change[back][:, back]
            if name.endswith("v_proj") and gated:
                change = (draw.repeat(2) + 0.5).diag()[torch.randperm(width, generator=generator)]
            elif name.endswith("v_proj"):
                change = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
            for parameter in projection.parameters():
                every = parameter.view(-1, width, *parameter.shape[1:])
                every[half + head] = change @ every[head]
    return model
