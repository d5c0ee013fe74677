"""The forward pass of a Qwen3-VL for batches of one picture size: transformers' numbers in two thirds of the time.

Every row has its picture at the same place, so positions and masks are shared, pictures are a batch of their own, and
only positions with an answer get logits.
"""

import torch
import torch.nn.functional as F

IMAGE_AT = 4  # <|im_start|> user \n <|vision_start|>


class Network(torch.nn.Module):
    """model: a Qwen3VLForConditionalGeneration, whose parameters are used in their own type and place.

    compiled: layers go through torch.compile, which takes a C++ compiler (on CPUs) and a minute or two of its time.
    """

    def __init__(self, model: torch.nn.Module, compiled: bool = False):
        super().__init__()
        self.model = model
        self._text_layer, self._vision_block = _text_layer, _vision_block
        if compiled:
            self._text_layer = torch.compile(_text_layer, dynamic=True)
            self._vision_block = torch.compile(_vision_block, dynamic=True)
        self._shapes: dict[tuple[int, int] | None, dict[str, torch.Tensor]] = {}

    def _shape(self, size: tuple[int, int] | None, length: int, ids: torch.Tensor, dtype) -> dict[str, torch.Tensor]:
        """What depends on the size of pictures alone; `size` in merged cells (rows, columns)."""
        from transformers.vision_utils import (
            get_vision_interpolation_indices_and_weights,
            get_vision_position_ids,
        )

        known = self._shapes.get(size)
        if known is None or known["cos"].shape[0] < length:
            text, vision, device = self.model.model.language_model, self.model.model.visual, ids.device
            known, total = {}, max(128, length)
            positions = torch.arange(total, device=device).expand(3, 1, -1)
            if size is not None:
                grid = torch.tensor([[1, size[0] * 2, size[1] * 2]], device=device)
                types = torch.zeros(1, total, dtype=torch.int32, device=device)
                types[:, IMAGE_AT : IMAGE_AT + size[0] * size[1]] = 1
                positions, _ = self.model.model.get_rope_index(types.long(), types, image_grid_thw=grid)
                index, weights = get_vision_interpolation_indices_and_weights(
                    grid,
                    num_grid_per_side=vision.num_grid_per_side,
                    mode=vision.interpolation_mode,
                    align_corners=vision.interpolation_align_corners,
                    spatial_merge_size=2,
                )
                cos, sin = vision.rotary_pos_emb(weights, get_vision_position_ids(grid, 2))
                known |= {"index": index, "weights": weights[:, :, None].to(dtype)}
                known |= {"vision_cos": cos.to(dtype), "vision_sin": _signed(sin).to(dtype)}
            cos, sin = text.rotary_emb(torch.empty(0, dtype=torch.float32, device=device), positions)
            known |= {"cos": cos[0].to(dtype), "sin": _signed(sin[0]).to(dtype)}
            known["mask"] = torch.full((total, total), float("-inf"), device=device).triu(1)
            self._shapes[size] = known
        return known

    def forward(
        self, ids: torch.Tensor, answers: torch.Tensor, patches: torch.Tensor | None, size: tuple[int, int] | None
    ) -> torch.Tensor:
        """Logits of answers, fp32 (number of answer tokens, vocabulary).

        ids: (rows, length); answers: indices into rows * length of the tokens that predict an answer's;
        patches: (rows, patches, 3 * 2 * 16 * 16) in the order of the image processor, or None; size: see `_shape`.
        """
        text = self.model.model.language_model
        shape = self._shape(size, ids.shape[1], ids, text.norm.weight.dtype)
        hidden = text.embed_tokens(ids)
        taps: list[torch.Tensor] = []
        if patches is not None:
            image, taps = self._look(patches.to(hidden.dtype), shape)
            after = IMAGE_AT + image.shape[1]
            hidden = torch.cat([hidden[:, :IMAGE_AT], image, hidden[:, after:]], 1)
        length = ids.shape[1]
        rope, mask = (shape["cos"][:length], shape["sin"][:length]), shape["mask"][:length, :length]
        for number, layer in enumerate(text.layers):
            hidden = self._text_layer(layer, hidden, rope, mask)
            if number < len(taps):
                width = hidden.shape[1] - IMAGE_AT - taps[number].shape[1]
                hidden = hidden + F.pad(taps[number], (0, 0, IMAGE_AT, width))
        hidden = hidden.flatten(0, 1)[answers]
        return self.model.lm_head(_rms(text.norm, hidden)).float()

    def _look(self, patches: torch.Tensor, shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pictures to image tokens (rows, tokens, hidden) and what DeepStack adds to the first layers."""
        vision = self.model.model.visual
        rows, number, _ = patches.shape
        projection = vision.patch_embed.proj
        hidden = F.linear(patches, projection.weight.flatten(1), projection.bias)
        hidden = hidden + (vision.pos_embed(shape["index"]) * shape["weights"]).sum(1)
        taps = []
        for depth, block in enumerate(vision.blocks):
            hidden = self._vision_block(block, hidden, (shape["vision_cos"], shape["vision_sin"]))
            if depth in vision.deepstack_visual_indexes:
                merger = vision.deepstack_merger_list[vision.deepstack_visual_indexes.index(depth)]
                taps.append(merger(hidden.flatten(0, 1)).view(rows, number // 4, -1))
        return vision.merger(hidden.flatten(0, 1)).view(rows, number // 4, -1), taps


def _signed(sin: torch.Tensor) -> torch.Tensor:
    """The sines by which a vector with its halves swapped is multiplied: `rotate_half` without its minus."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def _rotate(states: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return states * rope[0] + states.roll(states.shape[-1] // 2, -1) * rope[1]


def _rms(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()).to(hidden.dtype) * norm.weight


def _text_layer(layer: torch.nn.Module, hidden: torch.Tensor, rope, mask: torch.Tensor) -> torch.Tensor:
    """A decoder layer; hidden: (rows, length, hidden_size). SDPA's backward pass is slow in bf16 on CPUs."""
    attention, mlp = layer.self_attn, layer.mlp
    rows, length, _ = hidden.shape
    heads = (rows, length, -1, attention.head_dim)
    normed = _rms(layer.input_layernorm, hidden)
    query = _rotate(_rms(attention.q_norm, attention.q_proj(normed).view(heads)).transpose(1, 2), rope)
    key = _rotate(_rms(attention.k_norm, attention.k_proj(normed).view(heads)).transpose(1, 2), rope)
    value = attention.v_proj(normed).view(heads).transpose(1, 2)
    # Queries of one key-value head lie one behind the other: no head is copied.
    query = query.reshape(rows, key.shape[1], -1, length, attention.head_dim)
    scores = (query.flatten(2, 3) @ key.transpose(-1, -2)).float() * attention.scaling
    scores = scores.unflatten(2, (-1, length)) + mask
    mixed = scores.softmax(-1).to(value.dtype).flatten(2, 3) @ value
    mixed = mixed.unflatten(2, (-1, length)).flatten(1, 2)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    normed = _rms(layer.post_attention_layernorm, hidden)
    return hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _vision_block(block: torch.nn.Module, hidden: torch.Tensor, rope) -> torch.Tensor:
    """A block of the vision tower; hidden: (rows, patches, hidden_size)."""
    rows, number, _ = hidden.shape
    states = block.attn.qkv(block.norm1(hidden)).view(rows, number, 3, block.attn.num_heads, -1)
    query, key, value = states.permute(2, 0, 3, 1, 4)
    query, key = _rotate(query, rope), _rotate(key, rope)
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    mixed = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + block.attn.proj(mixed)
    return hidden + block.mlp(block.norm2(hidden))
