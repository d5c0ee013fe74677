"""Dropping layers: the result is what transformers computes with these layers skipped, bit for bit."""

import itertools
import json

import pytest
import torch
from helpers.paths import EMBEDDED
from helpers.tiny_models import FAMILIES, VISION, assert_same, build, load, logits
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cautions, cut_layers, parse_numbers, place_taps, plan_layers


def module_list(model, stack):
    """A model's layers, found without prunekit's table."""
    ends = (".blocks",) if stack == "vision" else (".layers", ".layer", ".h")
    (found,) = (m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and f".{n}".endswith(ends))
    return found


def skip(model, stack, numbers):
    """Make these layers identities, in place."""
    for number in numbers:
        layer = module_list(model, stack)[number]

        def forward(hidden_states, *args, original=layer.forward, **kwargs):
            result = original(hidden_states, *args, **kwargs)
            return (hidden_states, *result[1:]) if isinstance(result, tuple) else hidden_states

        layer.forward = forward
    return model


def delete(model, numbers):
    """Delete text layers, so that DeepStack's features enter the first layers that are left."""
    layers = module_list(model, "text")
    for number in sorted(numbers, reverse=True):
        del layers[number]
    return model


def cut(folder, out, **kwargs):
    return write_cut(cut_layers(plan_layers(open_checkpoint(folder), **kwargs)), out)


def edit_config(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


# --- output ----------------------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) == set(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [[3], [0, 2], [3, 4]], ids=str)
def test_logits_equal_those_with_text_layers_skipped(family, text, tiny, tmp_path):
    cut(tiny(family), tmp_path / "out", text=text)
    reference = build(family)
    reference = delete(reference, text) if ROWS[family].taps else skip(reference, "text", text)
    assert_same(family, logits(load(tmp_path / "out")), logits(reference))


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("vision", [[0], [1], [0, 3]], ids=str)
def test_logits_equal_those_with_vision_blocks_skipped(family, vision, tiny, tmp_path):
    cut(tiny(family), tmp_path / "out", vision=vision)
    assert_same(family, logits(load(tmp_path / "out")), logits(skip(build(family), "vision", vision)))


def test_layers_do_something_in_every_tiny_model():
    for family in FAMILIES:
        for stack in ROWS[family].stacks:
            model = build(family)
            assert not torch.allclose(logits(model), logits(skip(model, stack, [2])), atol=1e-4), (
                family,
                stack,
            )


def test_text_and_vision_are_cut_at_once(tiny, tmp_path):
    cut(tiny("qwen3_vl"), tmp_path / "out", text=[1, 4], vision=[2, 5])
    reference = delete(skip(build("qwen3_vl"), "vision", [2, 5]), [1, 4])
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))


@pytest.mark.parametrize("family, prefix", [("gpt2", "transformer."), ("bert", "bert."), ("distilbert", "distilbert.")])
def test_base_models_saved_without_their_prefix_are_cut(family, prefix, own, tmp_path):
    folder = own(family)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k.removeprefix(prefix): v for k, v in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    cut(folder, tmp_path / "out", text=[1])
    assert torch.equal(logits(load(tmp_path / "out")), logits(skip(build(family), "text", [1])))


def test_the_flat_config_of_older_releases_is_cut(own, tmp_path):
    folder = own("qwen2_vl")

    def flatten(config):
        text = config.pop("text_config")
        config |= {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}

    edit_config(folder, flatten)
    cut(folder, tmp_path / "out", text=[1])
    assert torch.equal(logits(load(tmp_path / "out")), logits(skip(build("qwen2_vl"), "text", [1])))


def test_text_keys_written_twice_change_together(own, tmp_path):
    folder = own("qwen2_5_vl")
    edit_config(folder, lambda config: config.update(num_hidden_layers=5, layer_types=list("abcde")))
    cut(folder, tmp_path / "out", text=[0])
    config = read_config(tmp_path / "out")
    assert (config["num_hidden_layers"], config["text_config"]["num_hidden_layers"]) == (4, 4)
    assert config["layer_types"] == list("bcde")


# --- per-layer config ------------------------------------------------------------------------------------------------


def test_layer_types_shrink_with_their_layers(tiny, tmp_path):
    cut(tiny("gemma3_text"), tmp_path / "out", text=[0, 3])
    assert read_config(tmp_path / "out")["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]


def test_layer_types_implied_by_a_pattern_are_written_out(own, tmp_path):
    folder = own("gemma3_text")
    edit_config(folder, lambda config: config.pop("layer_types"))
    cut(folder, tmp_path / "out", text=[1])
    assert torch.equal(logits(load(tmp_path / "out")), logits(skip(build("gemma3_text"), "text", [1])))


@pytest.mark.parametrize(
    "family, stack, key, kwargs, expected",
    [
        ("gemma3_text", None, "sliding_window_pattern", {"text": [1]}, None),
        ("qwen2", None, "max_window_layers", {"text": [1]}, 4),
        ("qwen2_5_vl", "vision_config", "fullatt_block_indexes", {"vision": [1]}, []),
    ],
)
def test_a_key_left_to_its_default_means_the_same_after_the_cut(family, stack, key, kwargs, expected, own, tmp_path):
    folder = own(family)

    def leave_out(config):
        part = config[stack] if stack else config
        for name in (key, "_" + key, "layer_types"):
            part.pop(name, None)

    edit_config(folder, leave_out)
    reference = skip(load(folder), *next((name, numbers) for name, numbers in kwargs.items()))
    cut(folder, tmp_path / "out", **kwargs)
    config = read_config(tmp_path / "out")
    assert (config[stack] if stack else config).get(key) == expected
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))


def test_max_window_layers_counts_the_layers_left_below_it(own, tmp_path):
    folder = own("qwen2")
    edit_config(folder, lambda config: config.pop("layer_types"))
    cut(folder, tmp_path / "out", text=[0, 3])
    assert read_config(tmp_path / "out")["max_window_layers"] == 1
    assert torch.equal(logits(load(tmp_path / "out")), logits(skip(build("qwen2"), "text", [0, 3])))


def test_full_attention_blocks_keep_their_kind(tiny, tmp_path):
    cut(tiny("qwen2_5_vl"), tmp_path / "out", vision=[0, 4])
    assert read_config(tmp_path / "out")["vision_config"]["fullatt_block_indexes"] == [0]


def test_sparse_step_becomes_a_list_of_dense_layers(tiny, tmp_path):
    cut(tiny("qwen3_moe"), tmp_path / "out", text=[0])
    config = read_config(tmp_path / "out")
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 1, 3])


def test_other_config_keys_stay_as_they_are(tiny, tmp_path):
    cut(tiny("qwen3_vl"), tmp_path / "out", text=[3])
    before, after = read_config(tiny("qwen3_vl")), read_config(tmp_path / "out")
    before["text_config"]["num_hidden_layers"] = 4
    assert after == before


def test_layers_that_scale_by_their_number_are_refused_unless_last(own):
    folder = own("gpt2")
    edit_config(folder, lambda config: config.update(scale_attn_by_inverse_layer_idx=True))
    checkpoint = open_checkpoint(folder)
    assert plan_layers(checkpoint, text=[4]).removed == {"text": [4]}
    with pytest.raises(PruneKitError, match="only the last ones"):
        plan_layers(checkpoint, text=[1])


# --- DeepStack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "taps, kept, expected",
    [
        ([1, 3, 4], [0, 1, 2, 3, 4, 5], [1, 3, 4]),  # nothing removed
        ([1, 3, 4], [0, 1, 2, 4, 5], [1, 2, 4]),  # a removed tap goes to the block before it
        ([1, 3, 4], [2, 3, 4, 5], [2, 3, 4]),  # none before: the first one
        ([1, 3, 4], [0, 1, 3, 4, 5], [1, 3, 4]),  # an untapped block removed
        ([1, 3, 4], [0, 1, 2], [0, 1, 2]),  # taps at the end squeeze forward
        ([1, 3, 4], [3, 4, 5], [3, 4, 5]),  # as many blocks as taps
        ([1, 3, 4], [0, 1, 4, 5], [0, 1, 4]),  # the block before is taken: the least movement
        ([2, 3], [0, 1, 3, 4], [1, 3]),
        ([5, 11, 17], [i for i in range(24) if i not in (5, 10, 11)], [4, 9, 17]),
    ],
)
def test_taps_are_placed(taps, kept, expected):
    assert place_taps(taps, kept) == expected


def test_taps_are_placed_with_the_least_movement_there_is():
    for size in (4, 5, 6):
        for kept in itertools.combinations(range(7), size):
            for taps in itertools.combinations(range(7), 3):
                wished = [max(sum(block <= tap for block in kept) - 1, 0) for tap in taps]
                placed = [kept.index(block) for block in place_taps(taps, kept)]
                assert placed == sorted(set(placed))
                cost = min(sum(abs(a - b) for a, b in zip(p, wished)) for p in itertools.combinations(range(size), 3))
                assert sum(abs(a - b) for a, b in zip(placed, wished)) == cost


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("vision", [[3], [5], [3, 4], [1, 2], [0, 1, 2]], ids=str)
def test_mergers_get_the_blocks_their_taps_moved_to(family, vision, tiny, tmp_path):
    plan = plan_layers(open_checkpoint(tiny(family)), vision=vision)
    write_cut(cut_layers(plan), tmp_path / "out")
    reference = skip(build(family), "vision", vision)
    reference.model.visual.deepstack_visual_indexes = [after for _, after in plan.taps]
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))


def test_taps_can_be_named(tiny, tmp_path):
    cut(tiny("qwen3_vl"), tmp_path / "out", vision=[1], taps=[0, 2, 5])
    assert read_config(tmp_path / "out")["vision_config"]["deepstack_visual_indexes"] == [0, 1, 4]


def test_a_tap_is_dropped_with_its_merger(tiny, tmp_path):
    cut(tiny("qwen3_vl"), tmp_path / "out", vision=[1, 2, 3, 4], drop_taps=[1])
    reference = skip(build("qwen3_vl"), "vision", [1, 2, 3, 4])
    visual = reference.model.visual
    visual.deepstack_visual_indexes = [0, 5]
    del visual.deepstack_merger_list[1]
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"vision": [0, 1, 2, 3]}, r"--drop-taps 2$"),
        ({"text": [0, 1, 2]}, r"first 3 text layers, 2 would be left.*--drop-taps 2$"),
        ({"vision": [1], "taps": [0, 1, 2]}, r"--taps 0 1 2: name 3 different vision blocks that are kept"),
        ({"vision": [1], "taps": [0, 2]}, r"--taps 0 2: name 3"),
        ({"vision": [1], "drop_taps": [3]}, r"--drop-taps 3: the mergers are 0 to 2"),
    ],
)
def test_taps_without_a_place_are_refused(kwargs, message, tiny):
    with pytest.raises(PruneKitError, match=message):
        plan_layers(open_checkpoint(tiny("qwen3_vl")), **kwargs)


@pytest.mark.parametrize("taps", [[1, 3, 6], [1, 1, 4], [3, 1, 4], ["1"], None], ids=str)
def test_taps_that_transformers_would_silently_skip_are_refused(taps, own):
    folder = own("qwen3_vl")
    edit_config(folder, lambda config: config["vision_config"].update(deepstack_visual_indexes=taps))
    with pytest.raises(PruneKitError, match="deepstack_visual_indexes"):
        open_checkpoint(folder)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, kwargs, message",
    [
        ("llama", {"text": [5]}, "--text 5: the model has text layers 0 to 4"),
        ("llama", {"text": [-1]}, "--text -1"),
        ("llama", {"text": [2, 2]}, "--text 2: given twice"),
        ("llama", {"text": range(5)}, "--text: names all 5 text layers; leave at least one"),
        ("llama", {"vision": [1]}, "--vision: llama has no vision blocks"),
        ("llama", {"drop_taps": [1]}, "llama has no DeepStack taps"),
        ("llama", {}, "nothing to remove; name text layers with --text"),
        ("qwen2_vl", {"vision": [4]}, "--vision 4: the model has vision blocks 0 to 3"),
    ],
)
def test_impossible_removals_are_refused(family, kwargs, message, tiny):
    with pytest.raises(PruneKitError, match=message):
        plan_layers(open_checkpoint(tiny(family)), **{k: list(v) for k, v in kwargs.items()})


def test_numbers_and_ranges_are_parsed():
    assert parse_numbers(["4-7,10", "12"]) == [4, 5, 6, 7, 10, 12]


@pytest.mark.parametrize("word", ["x", "7-4", "-1", "1.5", "1--2", "9" * 30])
def test_words_that_are_no_numbers_are_refused(word):
    with pytest.raises(PruneKitError, match="no layer number"):
        parse_numbers([word])


@pytest.mark.parametrize(
    "text, vision, named",
    [
        ([1, 2, 3, 4, 5], [], "5 of 8 text layers"),
        ([0], [2, 3], "2 of 6 vision layers"),
        ([1, 2, 3], [2, 3], "3 of 8 text layers and 2 of 6 vision layers"),
    ],
)
def test_more_than_a_quarter_at_once_is_warned_of(text, vision, named):
    (said,) = cautions(plan_layers(open_checkpoint(EMBEDDED), text, vision))
    assert said.startswith(f"{named} at once")


def test_more_than_ten_layers_are_warned_of_whatever_their_share(monkeypatch):
    plan = plan_layers(open_checkpoint(EMBEDDED), [2, 7], [4])
    assert cautions(plan) == []
    monkeypatch.setattr("prunekit.surgery.layers.MOST_LAYERS", 2)
    assert cautions(plan)[0].startswith("2 of 8 text layers and 1 of 6 vision layers at once")
