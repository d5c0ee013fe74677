"""One layer knocked out: every spelling means the same, and what a command names can be removed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout.removal import FewerExperts, Removal, list_experts, list_removals, parse_removals, plan_without

REMOVALS = st.builds(Removal, st.sampled_from(["text", "vision"]), st.integers(0, 99_999))


@pytest.fixture
def checkpoint(tiny):
    return open_checkpoint(tiny("qwen3_vl"))


@given(REMOVALS)
def test_a_name_names_one_layer(removal):
    assert Removal.parse(str(removal)) == removal
    assert removal.json == {"name": str(removal), "stack": removal.stack, "layer": removal.layer}


@given(REMOVALS)
def test_a_name_does_for_a_wish_as_stack_and_number_do(removal):
    assert parse_removals(str(removal)) == parse_removals(f"{removal.stack}:{removal.layer}") == [removal]


@pytest.mark.parametrize("name", ["text-3", "text:03", "audio-03", "text-03 ", "text--3", "text-٠٣", ""])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="is no name like text-03"):
        Removal.parse(name)


def test_a_wish_names_layers_of_both_stacks():
    assert [str(found) for found in parse_removals("text:3,7-8 vision:2")] == [
        "text-03", "text-07", "text-08", "vision-02"
    ]  # fmt: skip


@pytest.mark.parametrize("wish", ["text", "text:", "3", "audio:1", "text:1 text:2", "text-01 text:2", "text,1"])
def test_a_wish_that_names_no_layers_is_refused(wish):
    with pytest.raises(PruneKitError, match="^PRUNEKIT_REMOVE: .* names no layers"):
        parse_removals(wish)


def test_names_sort_in_the_order_of_layers():
    layers = [Removal("text", 2), Removal("text", 10), Removal("vision", 1)]
    assert layers == sorted(layers) == sorted(layers, key=str)


def test_all_means_every_layer(checkpoint):
    names = [str(removal) for removal in list_removals(checkpoint, "all", "all")]
    assert names == [*(f"text-{i:02d}" for i in range(5)), *(f"vision-{i:02d}" for i in range(6))]


def test_layers_that_cannot_go_are_left_out_of_all_and_refused_by_number(own):
    folder, notes = own("gpt2"), []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    checkpoint = open_checkpoint(folder)
    last = config["n_layer"] - 1
    assert [removal.layer for removal in list_removals(checkpoint, "all", "none", notes)] == [last]
    [note] = notes
    assert note.startswith("left out: text-00") and "only the last ones can be removed" in note
    with pytest.raises(PruneKitError, match="only the last ones can be removed"):
        list_removals(checkpoint, f"0,{last}", "none")


def test_numbers_of_experts_are_eighths_of_them_or_those_that_are_named(tiny):
    mixture = open_checkpoint(tiny("mixtral"))  # 6, of which a token goes to 2
    assert list_experts(mixture, "all") == [5, 4, 3, 2]
    assert list_experts(mixture, "3,5") == [5, 3] and list_experts(mixture, "none") == []
    assert str(FewerExperts(5)) == FewerExperts(5).json["name"] == "experts-05"


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [("mixtral", "6", "each layer has 6"), ("mixtral", "4,1", "a token goes to 2"), ("mixtral", "half", "'half' is no"),
     ("llama", "all", "without a mixture of experts"), ("llama", "3", "without a mixture of experts")],
)  # fmt: skip
def test_numbers_of_experts_that_cannot_be_are_refused(family, wanted, message, tiny):
    with pytest.raises(PruneKitError, match=message):
        list_experts(open_checkpoint(tiny(family)), wanted)


@pytest.mark.parametrize("nothing", ["none", "", " none "])
def test_ranges_and_none_choose_layers(nothing, checkpoint):
    assert [str(removal) for removal in list_removals(checkpoint, "1-2,4", nothing)] == [
        "text-01",
        "text-02",
        "text-04",
    ]


def test_a_layer_out_of_range_is_refused_before_any_run(checkpoint):
    with pytest.raises(PruneKitError, match="5"):
        list_removals(checkpoint, "5", "none")


def test_layers_of_both_stacks_are_planned_together(checkpoint):
    plan = plan_without(checkpoint, [Removal("vision", 2), Removal("text", 3), Removal("text", 1)])
    assert plan.removed == {"text": [1, 3], "vision": [2]}
