"""Whatever config.json says, scripts take it or refuse it in one line."""

import json
import math

import pytest
from helpers.bad_input import BAD, CHEAP, DELETED, RAW, changed, mutations, put, words
from helpers.tiny_models import FAMILIES


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_5_moe"])  # Qwen3.5's keys
def test_any_key_of_any_config_is_checked(family, linked, tries):
    folder = linked(family)
    config = json.loads((folder / "config.json").read_text())
    for what, content in mutations(config):
        put(folder / "config.json", content)
        tries.survived(what, "prunekit.inspect", folder)
    tries.check()


NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "model_type",
    "n_layer",
    "n_embd",
    "n_head",
)
READ = {  # keys without which, or with nonsense for which, no text layer can be counted or cut
    "llama": ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
              "vocab_size", "intermediate_size", "max_position_embeddings", "architectures", "model_type"],
    "gpt2": ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size"],
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("family", READ)
def test_every_script_refuses_a_config_that_its_tensors_do_not_bear_out(name, family, linked, tries):
    if family == "gpt2" and name == "kv_cut.py":
        pytest.skip("has no KV heads to merge")
    folder = linked(family)
    config = json.loads((folder / "config.json").read_text())
    for key in READ[family]:
        for value in BAD:
            if value is None and key not in NEEDED or value == [] and key == "architectures":
                continue
            put(folder / "config.json", config | {key: value})
            tries.refused(f"{key} = {value!r:.40}", name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py", "sparsify.py", "width_cut.py", "kv_cut.py"])
def test_the_parts_of_a_config_of_a_vision_model_are_checked(name, linked, tries):
    folder = linked("qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        for value in (*BAD, DELETED):
            put(folder / "config.json", changed(config, (part,), value))
            tries.refused(f"{part} = {value!r:.40}", name, *words(name, folder))
    for taps in ([1, 1, 4], [4, 3, 1], [1, 3, 6], [1, 3], [1, "3", 4], [True, 3, 4], "134", 3, {"1": 1}, [-1, 3, 4],
                 [1, 3, 10**30], [1, 3, math.nan], [[1], 3, 4], None, []):  # fmt: skip
        put(folder / "config.json", changed(config, ("vision_config", "deepstack_visual_indexes"), taps))
        tries.refused(f"taps = {taps}", name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", CHEAP)
def test_a_config_that_is_no_json_object_is_refused(name, linked, tries):
    folder = linked("llama")
    for content in RAW:
        put(folder / "config.json", content)
        tries.refused(content[:20], name, *words(name, folder))
    tries.check()
