"""Which tensors are weights to be zeroed, and along which axis their inputs lie."""

import pytest
import torch
from helpers.tiny_models import tensors_of
from safetensors.torch import save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery.zeros_weights import choose_weights


@pytest.mark.parametrize("turned", [False, True])
def test_inputs_of_stacked_experts_are_found_in_either_layout(turned, tiny, tmp_path):
    """Releases of transformers write (experts, outputs, inputs) or the two last the other way round."""
    single = tensors_of(tiny("qwen3_moe"))
    prefix = "model.layers.3.mlp.experts."
    experts = {name: single.pop(name) for name in list(single) if name.startswith(prefix)}
    # Three linears side by side: two of this model would be a square, which tells nothing
    parts = {"gate_up_proj": ("gate_proj", "up_proj", "up_proj"), "down_proj": ("down_proj",)}
    for stacked, linears in parts.items():
        rows = [torch.cat([experts[f"{prefix}{n}.{linear}.weight"] for linear in linears]) for n in range(4)]
        both = torch.stack(rows)
        single[prefix + stacked] = (both.mT if turned else both).contiguous()
    folder = tmp_path / "stacked"
    folder.mkdir()
    (folder / "config.json").write_text((tiny("qwen3_moe") / "config.json").read_text())
    save_file(single, folder / "model.safetensors", {"format": "pt"})
    chosen = choose_weights(open_checkpoint(folder), r"layers\.3\.mlp\.experts")
    assert {name.rpartition(".")[2]: weight.inputs for name, weight in chosen.items()} == dict.fromkeys(
        ("gate_up_proj", "down_proj"), -2 if turned else -1
    )


def test_experts_are_among_the_weights(tiny):
    assert sum(".experts." in name for name in choose_weights(open_checkpoint(tiny("qwen3_moe")))) > 3


@pytest.mark.parametrize(
    ("family", "modules", "expected"),
    [
        ("llama", "mlp|o_proj", {"gate_proj", "up_proj", "down_proj", "o_proj"}),
        ("qwen3_moe", r"\.gate\.", None),
        ("bert", "query", {"query"}),
        ("qwen3_vl", "visual", {"qkv", "proj", "linear_fc1", "linear_fc2"}),
        ("qwen3", r"lm_head\.weight", {"lm_head"}),
    ],
)
def test_modules_are_searched_in_projections_and_must_match_all_of_other_names(family, modules, expected, tiny):
    if expected is None:
        with pytest.raises(PruneKitError, match="matches no weight; they are named like model.layers"):
            choose_weights(open_checkpoint(tiny(family)), modules)
        return
    chosen = choose_weights(open_checkpoint(tiny(family)), modules)
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in chosen} == expected
