"""The table's rows against real models: names, counts and sizes."""

import json
import re

import pytest
from helpers.tiny_models import FAMILIES, VISION, build
from transformers import CONFIG_MAPPING

from prunekit.checkpoint import layer_numbers, open_checkpoint, read_config, statistics
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.families import family_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_and_norm_of_a_row_is_in_the_checkpoint(family, tiny):
    names = open_checkpoint(tiny(family)).tensors
    for row in ROWS[family].stacks.values():
        for inner in {row.q, row.k, row.v, row.o, *row.linear, *row.norms, *row.mlp}:
            assert any(row.tensors_of(names, layer, inner) for layer in range(4)), (family, inner)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stack_of_a_row_is_found_in_the_module_tree(family):
    modules = dict(build(family).named_modules())
    for stack, row in ROWS[family].stacks.items():
        layers = {int(m[1]) for name in modules if (m := re.fullmatch(rf"{row.prefix}(\d+)", name))}
        assert len(layers) == (6 if stack == "vision" and family != "qwen2_vl" else 4 + (stack == "text")), stack


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_transformers_counts(family, tiny):
    numbers = statistics(tiny(family))
    assert numbers["parameters"] == sum(numbers["parameters_by_component"].values())
    assert numbers["parameters"] == build(family).num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_components_hold_what_their_modules_hold(family, tiny):
    model, parts = build(family), statistics(tiny(family))["parameters_by_component"]
    visual = getattr(model.base_model, "visual", None)
    assert parts["vision"] == (visual.num_parameters() if visual is not None else 0)
    assert 0 < model.get_input_embeddings().weight.numel() <= parts["embedding"]
    assert parts["text"] > 0 and parts["other"] >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_a_real_cache(family, tiny):
    numbers, model = statistics(tiny(family)), build(family)
    if not ROWS[family].causal:
        assert numbers["kv_bytes_per_token"] == 0
        return
    ids = model.get_input_embeddings().weight.new_ones((1, 3)).long()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    grown = [layer for layer in cache.layers if hasattr(layer, "keys")]  # linear attention keeps a state of one size
    held = sum(layer.keys.numel() + layer.values.numel() for layer in grown)
    assert numbers["kv_bytes_per_token"] == 2 * held // 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_takes_where_a_key_is_missing_is_known(family):
    config = CONFIG_MAPPING[family]().get_text_config()
    row = ROWS[family].text
    keys = [*row.defaults] + [row.experts_chosen] * bool(row.experts)
    known = {key: getattr(config, key, row.defaults.get(key)) for key in dict.fromkeys(keys)}
    assert known == row.defaults


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_depth_that_older_releases_leave_out_is_the_default(family, tiny, tmp_path):
    config = json.loads((tiny(family) / "config.json").read_text())
    config["vision_config"] = {"in_chans": 3, "model_type": family, "spatial_patch_size": 14}  # as in Qwen2-VL-7B's
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)["vision_config"]["depth"] == CONFIG_MAPPING[family]().vision_config.depth


@pytest.mark.parametrize("family", VISION)
def test_vision_depth_is_counted(family, tiny):
    assert statistics(tiny(family))["vision_depth"] == len(layer_numbers(open_checkpoint(tiny(family)), "vision"))


@pytest.mark.parametrize("model_type", ["mamba", None, ["qwen3"]])
def test_an_unknown_model_type_names_the_supported_ones(model_type):
    with pytest.raises(PruneKitError, match="not supported; supported: qwen3_vl, .*distilbert"):
        family_of({"model_type": model_type})
