"""Stacks of loaded models: cut in memory as on disk, and replayed layer by layer as in one go."""

import gc
import json
import weakref

import pytest
import torch
from helpers.tiny_models import FAMILIES, VISION, assert_same, load, logits

from prunekit.checkpoint import open_checkpoint
from prunekit.model.replay import Replay, find_stack, record_calls
from prunekit.surgery.cut import write_cut
from prunekit.surgery.in_memory import cut, removed
from prunekit.surgery.layers import cut_layers, plan_layers

IDS = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(2))
BATCHES = [{"input_ids": ids[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)} for ids in IDS]


def cuts(family):
    return [{"text": [1, 3]}, {"text": [0, 4]}] + ([{"vision": [1]}, {"vision": [0, 3]}] if family in VISION else [])


@pytest.mark.parametrize("family, numbers", [(family, cut) for family in FAMILIES for cut in cuts(family)])
def test_a_model_cut_in_memory_gives_the_logits_of_the_checkpoint_cut_on_disk(family, numbers, tiny, tmp_path):
    plan = plan_layers(open_checkpoint(tiny(family)), **numbers)
    write_cut(cut_layers(plan), tmp_path / "out")
    model = load(tiny(family))
    with removed(model, plan):
        assert_same(family, logits(model), logits(load(tmp_path / "out")))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_5_vl"])
def test_layers_that_attend_in_a_window_keep_it_in_memory_where_the_config_has_no_list_of_them(family, own, tmp_path):
    folder = own(family)
    config = json.loads((folder / "config.json").read_text())
    del config.get("text_config", config)["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_layers(open_checkpoint(folder), text=[0])
    write_cut(cut_layers(plan), tmp_path / "out")
    model = load(folder)
    with removed(model, plan):
        assert_same(family, logits(model), logits(load(tmp_path / "out")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cut_for_good_is_the_checkpoint_cut_on_disk_and_lets_go_of_the_layers(family, tiny, tmp_path):
    numbers = {"text": [1, 3]} | ({"vision": [0, 3]} if family in VISION else {})
    plan = plan_layers(open_checkpoint(tiny(family)), **numbers)
    write_cut(cut_layers(plan), tmp_path / "out")
    model, on_disk = load(tiny(family)), load(tmp_path / "out")
    owner, attribute = find_stack(model, plan.source.family.text)
    layer = weakref.ref(getattr(owner, attribute)[1])
    cut(model, plan)
    gc.collect()
    assert layer() is None
    assert_same(family, logits(model), logits(on_disk))
    assert model.state_dict().keys() == on_disk.state_dict().keys()


def test_a_decoder_cut_for_good_generates_with_its_cache(tiny, tmp_path):
    plan = plan_layers(open_checkpoint(tiny("qwen3")), text=[1, 3])
    write_cut(cut_layers(plan), tmp_path / "out")
    model = load(tiny("qwen3"))
    cut(model, plan)
    words = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (model, load(tmp_path / "out"))]
    assert torch.equal(*words)


def test_mergers_dropped_in_memory_are_those_dropped_on_disk(tiny, tmp_path):
    plan = plan_layers(open_checkpoint(tiny("qwen3_vl")), vision=[3], drop_taps=[1])
    write_cut(cut_layers(plan), tmp_path / "out")
    model = load(tiny("qwen3_vl"))
    with removed(model, plan):
        assert torch.equal(logits(model), logits(load(tmp_path / "out")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_as_before_after_a_cut_in_memory_that_failed(family, tiny):
    model = load(tiny(family))
    before = logits(model)
    config = model.config.to_json_string()
    with pytest.raises(KeyError), removed(model, plan_layers(open_checkpoint(tiny(family)), text=[1, 3])):
        raise KeyError
    assert torch.equal(logits(model), before)
    assert model.config.to_json_string() == config


def entering(model, row, batch):
    """What enters each layer in one plain run, and what leaves the last."""
    owner, attribute = find_stack(model, row)
    layers, states = getattr(owner, attribute), []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, inputs, output: states.append(output)))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_run_in_steps_gives_the_states_of_one_run(family, tiny):
    model, row = load(tiny(family)), open_checkpoint(tiny(family)).family.text
    replay = Replay(model, row, record_calls(model, row, BATCHES))
    seen = {}
    for end in (0, 1, 3, 5):
        replay.step(end, lambda index, state, end=end: seen.__setitem__((index, end), state))
    for index, batch in enumerate(BATCHES):
        plain = entering(model, row, batch)
        assert all(torch.equal(seen[index, end], plain[end]) for end in (0, 1, 3, 5))


@pytest.mark.parametrize("family", VISION)
def test_a_vision_stack_run_in_steps_gives_the_states_of_one_run(family, tiny):
    model, row = load(tiny(family)), open_checkpoint(tiny(family)).family.vision
    batch = image_batch(model)
    replay = Replay(model, row, record_calls(model, row, [batch]))
    seen = {}
    for end in (1, 2, 4):
        replay.step(end, lambda index, state, end=end: seen.__setitem__(end, state))
    plain = entering(model, row, batch)
    assert all(torch.equal(seen[end], plain[end]) for end in (1, 2, 4))


def image_batch(model):
    """The inputs of `tiny_models.logits`."""
    taken = {}
    with model.register_forward_pre_hook(lambda _, args, kwargs: taken.update(kwargs), with_kwargs=True):
        logits(model)
    return {key: value for key, value in taken.items() if key != "use_cache"}


def test_what_deepstack_adds_between_layers_is_kept_apart(tiny):
    model, row = load(tiny("qwen3_vl")), open_checkpoint(tiny("qwen3_vl")).family.text
    batch = image_batch(model)
    replay = Replay(model, row, record_calls(model, row, [batch]))
    plain = entering(model, row, batch)
    images = batch["input_ids"] == 120
    for end in (2, 5):
        states = []
        replay.step(end, lambda index, state, states=states: states.append(state))
        difference = (plain[end] - states[0]).abs().sum(-1)
        assert (difference[images] > 0).all() and (difference[~images] == 0).all()


def test_a_step_that_is_not_kept_is_run_again(tiny):
    model, row = load(tiny("llama")), open_checkpoint(tiny("llama")).family.text
    replay = Replay(model, row, record_calls(model, row, BATCHES))
    replay.step(2)
    first, again = {}, {}
    replay.step(4, first.__setitem__, keep=False)
    replay.step(4, again.__setitem__)
    assert all(torch.equal(first[index], again[index]) for index in range(2))
