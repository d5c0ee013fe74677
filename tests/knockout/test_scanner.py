"""Removals scored in memory: the same figures as the cut model's own, whatever is kept and shared."""

import math

import pytest
import torch
from helpers.cuts import first_experts
from helpers.tiny_models import FAMILIES, VISION, load
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.checkpoint import open_checkpoint
from prunekit.families import FAMILIES as ROWS
from prunekit.knockout.removal import FewerExperts, Removal
from prunekit.knockout.scanner import LIKELIEST, Scanner, _strip_suffix
from prunekit.model.scores import score_batches
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers

CAUSAL = [family for family in FAMILIES if family not in ("bert", "roberta", "camembert", "distilbert")]


def text_batch(seed=0, rows=3, length=9):
    ids = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def image_batch(model):
    vision = model.config.vision_config
    grid, merge = (1, 8, 16), vision.spatial_merge_size
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    image = [122, *[120] * (grid[1] * grid[2] // merge**2), 123]
    ids = torch.tensor([[7, *image, *range(10, 20)], [9, *image, *range(30, 40)]])
    patches = torch.randn(2 * grid[1] * grid[2], width, generator=torch.Generator().manual_seed(3), dtype=model.dtype)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 120).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([grid, grid]),
        "labels": ids.masked_fill(ids >= 100, -100),
    }


def scanner(folder, batches=None):
    return Scanner(open_checkpoint(folder), load(folder), batches or [text_batch()])


def totals(scores):
    tokens = sum(scores["tokens"])
    return sum(scores["right"]) / tokens, sum(scores["loss"]) / tokens


@pytest.mark.parametrize("family", CAUSAL)
def test_the_baseline_is_what_a_plain_evaluation_measures(family, tiny):
    model = scanner(tiny(family))
    expected = score_batches(model.model, model.batches)
    measured = totals(model.measure([], [], 0)["scores"]["baseline"])
    assert measured == pytest.approx((expected["token_acc"], expected["loss"]), rel=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_removal_scores_as_the_checkpoint_cut_on_disk_does(family, tiny, tmp_path):
    model = scanner(tiny(family))
    layers = model.kept("text", [])
    scores = model.measure([], [Removal("text", layer) for layer in layers], 0)["scores"]
    for layer in (0, 2, layers[-1]):
        write_cut(cut_layers(plan_layers(model.checkpoint, text=[layer])), tmp_path / str(layer))
        expected = score_batches(load(tmp_path / str(layer)), model.batches)
        assert totals(scores[f"text-{layer:02d}"]) == pytest.approx((expected["token_acc"], expected["loss"]), rel=1e-5)


@pytest.mark.parametrize("family", VISION)
def test_a_block_s_removal_scores_as_the_checkpoint_cut_on_disk_does(family, tiny, tmp_path):
    folder = tiny(family)
    model = scanner(folder, [image_batch(load(folder))])
    blocks = model.kept("vision", [])
    scores = model.measure([], [Removal("vision", block) for block in blocks], 0)["scores"]
    for block in blocks:
        write_cut(cut_layers(plan_layers(model.checkpoint, vision=[block])), tmp_path / str(block))
        expected = score_batches(load(tmp_path / str(block)), model.batches)
        measured = totals(scores[f"vision-{block:02d}"])
        assert measured == pytest.approx((expected["token_acc"], expected["loss"]), rel=1e-5)


@pytest.mark.parametrize("family", [family for family in CAUSAL if ROWS[family].text.experts])
def test_fewer_experts_score_as_the_checkpoint_without_them_does(family, tiny, tmp_path):
    folder = tiny(family)
    cut = first_experts(folder, 3)
    model = scanner(folder, [image_batch(load(folder)) if family in VISION else text_batch()])
    gone = tuple((layer, tuple(range(3, cut.plan.present))) for layer in cut.plan.layers)
    scores = model.measure([], [FewerExperts(3, gone), Removal("text", 1)], 0)["scores"]
    write_cut(cut, tmp_path / "fewer")
    expected = score_batches(load(tmp_path / "fewer"), model.batches)
    assert totals(scores["experts-03"]) == pytest.approx((expected["token_acc"], expected["loss"]), rel=1e-5)
    assert model.measure([], [], 0)["scores"]["baseline"] == scores["baseline"], "the model is as it was"


def test_a_second_removal_scores_as_the_checkpoint_without_both_does(tiny, tmp_path):
    folder = tiny("qwen3_vl")
    model = scanner(folder, [image_batch(load(folder))])
    gone = [Removal("text", 1), Removal("vision", 2)]
    more = [Removal("text", 3), Removal("vision", 4)]
    scores = model.measure(gone, more, 0)["scores"]
    for name, cut in (
        ("baseline", {"text": [1], "vision": [2]}),
        ("text-03", {"text": [1, 3], "vision": [2]}),
        ("vision-04", {"text": [1], "vision": [2, 4]}),
    ):
        write_cut(cut_layers(plan_layers(model.checkpoint, **cut)), tmp_path / name)
        expected = score_batches(load(tmp_path / name), model.batches)["loss"]
        assert totals(scores[name])[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3_text"])
def test_scores_are_the_same_with_no_room_for_states(family, tiny):
    folder = tiny(family)
    batch = image_batch(load(folder)) if family in VISION else text_batch()
    found = []
    for room in (1 << 30, 1):
        model = scanner(folder, [batch])
        model.state_bytes = room
        runs = [Removal(stack, i) for stack in model.checkpoint.family.stacks for i in model.kept(stack, [])]
        found.append({name: totals(scores) for name, scores in model.measure([], runs, 0)["scores"].items()})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(expected, rel=1e-5)


def test_without_an_image_in_the_batch_a_vision_block_is_not_missed(tiny):
    scores = scanner(tiny("qwen3_vl")).measure([], [Removal("vision", 0)], 0)["scores"]
    assert scores["vision-00"] == scores["baseline"]


def test_a_scan_leaves_the_model_as_it_was(tiny):
    model = scanner(tiny("qwen3_vl"))
    config, weights = model.model.config.to_json_string(), [p.clone() for p in model.model.parameters()]
    model.measure([Removal("text", 1)], [Removal("text", 2), Removal("vision", 1)], 0)
    assert model.model.config.to_json_string() == config
    assert all(torch.equal(a, b) for a, b in zip(weights, model.model.parameters(), strict=True))


def test_the_unpruned_model_has_no_divergence_from_itself(tiny):
    scores = scanner(tiny("llama")).measure([], [], 0)["scores"]["baseline"]
    assert scores["kl"] == pytest.approx([0] * 3, abs=1e-5)


def test_the_divergence_is_a_lower_bound_of_the_exact_one_and_near_it(tiny):
    model = scanner(tiny("llama"))
    batch = model.batches[0]
    assert model.model.config.vocab_size > LIKELIEST
    measured = sum(model.measure([], [Removal("text", 2)], 0)["scores"]["text-02"]["kl"])

    def log_probabilities():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model.model(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)

    before = log_probabilities()
    with model.without([Removal("text", 2)]):
        after = log_probabilities()
    exact = float((before.exp() * (before - after)).sum())
    assert 0.5 * exact < measured <= exact * (1 + 1e-4)


def test_block_influence_is_one_minus_the_cosine_of_what_enters_and_leaves(tiny):
    model = scanner(tiny("llama"))
    batch, states = model.batches[0], []
    layer = model.model.model.layers[2]
    layer.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output)))
    total, tokens = model.measure([], [], 0)["influence"]["text-02"]
    lost = 1 - torch.nn.functional.cosine_similarity(*states[0], dim=-1)[batch["attention_mask"].bool()]
    assert (total, tokens) == (pytest.approx(float(lost.sum()), rel=1e-4), len(lost))


def test_a_model_that_computes_nan_is_recorded_as_none(tiny):
    model = scanner(tiny("llama"))
    with torch.no_grad():
        model.model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    scores = model.measure([], [Removal("text", 3), Removal("text", 1)], 0)["scores"]
    assert set(scores["text-01"]["loss"]) == {None}
    assert None not in scores["text-03"]["loss"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([-100, 1, 2, 8, 9]), max_size=30))
def test_stripping_the_suffix_takes_only_whole_suffixes_at_the_ends_of_answers(labels):
    stripped = _strip_suffix(labels, [8, 9])
    for index, (before, after) in enumerate(zip(labels, stripped, strict=True)):
        ends = index + 1 == len(labels) or labels[index + 1] == -100
        last = ends and labels[index - 1 : index + 1] == [8, 9] and index > 0
        first = index + 1 < len(labels) and labels[index : index + 2] == [8, 9]
        first = first and (index + 2 == len(labels) or labels[index + 2] == -100)
        assert after == (-100 if last or first else before)
