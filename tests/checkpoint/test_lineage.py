"""What became of a base's layers and taps, by the history of a model made from it."""

import json

import pytest
from helpers.checkpoints import copy_whole

from prunekit.checkpoint import HISTORY, open_checkpoint
from prunekit.checkpoint.lineage import folders_of, lineage
from prunekit.errors import PruneKitError
from prunekit.surgery.cut import write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.layers import cut_layers, plan_layers


def drop(source, out, **layers):
    write_cut(cut_layers(plan_layers(open_checkpoint(source), **layers)), out)
    return out


def change(folder, number, **keys):
    file = folder / HISTORY
    content = json.loads(file.read_text())
    content["history"][number] |= keys
    file.write_text(json.dumps(content))
    return folder


def way(base, folder):
    return lineage(open_checkpoint(base), open_checkpoint(folder))


@pytest.fixture
def twice(tiny, tmp_path):
    """A vision model of 5 layers, 6 blocks and taps 1, 3, 4 that lost some, its KV heads, and then more."""
    first = drop(tiny("qwen3_vl"), tmp_path / "first", text=[1], vision=[2, 3], drop_taps=[0])
    plan = plan_kv(open_checkpoint(first), 2)
    write_cut(cut_kv(plan), tmp_path / "kv")
    return drop(tmp_path / "kv", tmp_path / "second", text=[0, 1], vision=[1])


def test_layers_are_followed_through_all_stages_in_the_bases_numbers(tiny, twice):
    stacks = way(tiny("qwen3_vl"), twice).stacks
    assert (stacks["text"].kept, stacks["text"].gone) == ([3, 4], {1: 1, 0: 3, 2: 3})
    assert (stacks["vision"].kept, stacks["vision"].gone) == ([0, 4, 5], {2: 1, 3: 1, 1: 3})


def test_taps_are_followed_to_where_the_config_has_them(tiny, twice):
    found = way(tiny("qwen3_vl"), twice)
    assert [was for was, _ in found.taps] == [1, 3, 4]
    assert found.taps[0][1] is None
    blocks = [found.stacks["vision"].kept.index(now) for _, now in found.taps if now is not None]
    assert blocks == open_checkpoint(twice).config["vision_config"]["deepstack_visual_indexes"]


def test_a_refitted_layer_counts_as_healed_until_it_goes(tiny, twice):
    change(twice, 0, seams=[{"stack": "text", "layer": 0, "refitted": [0, 3]}])
    change(twice, 2, seams=[{"stack": "text", "layer": 2, "refitted": [3]}])  # of 0, 2, 3, 4
    assert way(tiny("qwen3_vl"), twice).stacks["text"].healed == {3: 1, 4: 3}


def test_what_was_on_the_way_is_a_base_too(tiny, twice):
    found = way(twice.parent / "first", twice)
    assert [stage["stage"] for stage in found.stages] == ["kv_cut", "manual_select"]
    assert found.stacks["text"].kept == [2, 3]


def test_the_base_itself_has_no_stage_behind_it(tiny):
    found = way(tiny("llama"), tiny("llama"))
    assert (found.stages, found.taps, found.stacks["text"].kept) == ([], [], [0, 1, 2, 3, 4])


def test_a_copy_of_the_base_elsewhere_is_the_base(own, tiny, tmp_path):
    out = drop(own("llama"), tmp_path / "out", text=[2])
    assert way(tiny("llama"), out).stacks["text"].gone == {2: 1}


def refusal(base, folder):
    with pytest.raises(PruneKitError) as refused:
        way(base, folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_another_base_is_refused(tiny, twice):
    assert "not from" in refusal(tiny("llama"), twice)


def test_a_model_without_a_history_is_refused(tiny):
    assert HISTORY in refusal(tiny("llama"), tiny("qwen3"))


def test_a_history_that_does_not_tell_of_the_layers_is_refused(tiny, twice):
    change(twice, 2, removed={})
    assert "has 2 text layers" in refusal(tiny("qwen3_vl"), twice)


@pytest.mark.parametrize(
    "keys",
    [
        {"removed": {"text": [17]}}, {"removed": {"taps": [5]}}, {"removed": {"taps": [[1, "x"]]}},
        {"seams": [{"stack": "text", "layer": 0, "refitted": [9]}]}, {"seams": [5]}, {"input_fingerprint": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_history_is_refused(tiny, twice, keys):
    assert HISTORY in refusal(tiny("qwen3_vl"), change(twice, 0, **keys))


def test_folders_of_stages_are_found_as_long_as_they_are_what_they_were(tiny, twice):
    stages = way(tiny("qwen3_vl"), twice).stages
    assert [folder and folder.name for folder in folders_of(stages, twice)] == ["first", "kv", "second"]
    copy_whole(tiny("llama"), twice.parent / "kv", overwrite=True)
    assert [folder and folder.name for folder in folders_of(stages, twice)] == ["first", None, "second"]
