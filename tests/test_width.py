"""Narrower layers: what is removed is as if zeroed, what is left loads anywhere, and bad numbers are refused."""

import pytest
import torch
from test_heal import data
from test_kv_cut import head_dim_of, text_config
from tiny_models import FAMILIES, load, logits

from prunekit.checkpoint import heads, open_checkpoint, statistics
from prunekit.evaluate import score_batches
from prunekit.families import FAMILIES as ROWS
from prunekit.stacks import find_stack
from prunekit.width import apply_width, choose, magnitudes, plan_width
from prunekit.width_fit import Layer, calibrate_width

REMOVABLE = [family for family in FAMILIES if ROWS[family].removable_heads != "none"]
MASKED = [family for family in FAMILIES if ROWS[family].removable_heads == "none"]
CAUSAL = [family for family in FAMILIES if ROWS[family].causal]
REFITTED = [family for family in CAUSAL if ROWS[family].text.plain_residual]
EXAMPLE = "examples/tiny_ocr/model"


def cut(folder, out, score="magnitude", **wanted):
    checkpoint = open_checkpoint(folder)
    plan = choose(plan_width(checkpoint, **wanted), magnitudes(checkpoint))
    apply_width(plan, out, score)
    return plan


def zeroed(folder, plan):
    """The uncut model with what the plan removes zeroed where o_proj and down_proj read it, by hand."""
    model, row = load(folder), plan.source.family.text
    count, kv_count, width = heads(plan.source)
    owner, attribute = find_stack(model, row)
    for number, module in enumerate(getattr(owner, attribute)):
        kept, layer = plan.kept[number], Layer(module, row, count, width)
        axis = 0 if row.inputs_first else 1
        with torch.no_grad():
            for head in range(count) if kept.heads is not None else ():
                if head not in kept.heads:
                    layer.o.weight.narrow(axis, head * width, width).zero_()
            for expert, neurons in enumerate(kept.neurons or ()):
                weight = layer.out.weight if layer.experts is None else layer.experts.down_proj[expert]
                gone = [i for i in range(weight.shape[axis]) if i not in neurons]
                weight.index_fill_(axis, torch.tensor(gone), 0)
    return model


@pytest.mark.parametrize("family", REMOVABLE)
def test_a_model_without_heads_gives_what_it_gives_with_them_zeroed(family, tiny, tmp_path):
    plan = cut(tiny(family), tmp_path / "out", head_share=0.5)
    model = load(tmp_path / "out")
    assert text_config(model).num_attention_heads * 2 == text_config(load(tiny(family))).num_attention_heads
    assert head_dim_of(model) == heads(plan.source)[2]
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", REMOVABLE)
def test_a_model_without_kv_groups_gives_what_it_gives_with_their_heads_zeroed(family, tiny, tmp_path):
    kv_heads = heads(open_checkpoint(tiny(family)))[1]
    plan = cut(tiny(family), tmp_path / "out", kv_groups=kv_heads // 2)
    assert statistics(tmp_path / "out")["num_key_value_heads"] == kv_heads // 2
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_neurons_gives_what_it_gives_with_them_zeroed(family, tiny, tmp_path):
    plan = cut(tiny(family), tmp_path / "out", neuron_share=0.5)
    after, before = statistics(tmp_path / "out"), statistics(tiny(family))
    assert after["neurons"] * 2 == before["neurons"] and after["parameters"] < before["parameters"]
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_model_keeps_its_shapes_and_gives_what_zeroed_heads_give(family, tiny, tmp_path):
    plan = cut(tiny(family), tmp_path / "out", head_share=0.5, neuron_share=0.5, mask=True)
    expected = logits(zeroed(tiny(family), plan))
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert statistics(tmp_path / "out") == statistics(tiny(family))


@pytest.mark.parametrize("score", ["magnitude", "activation", "entropy", "variance", "taylor"])
@pytest.mark.parametrize("family", CAUSAL)
def test_what_is_written_has_the_held_out_loss_that_was_measured(family, score, tiny, tmp_path):
    checkpoint, calibration = open_checkpoint(tiny(family)), data(fit=4, held_out=1)
    plan = plan_width(checkpoint, head_share=0.5, neuron_share=0.5)
    plan, losses = calibrate_width(plan, load(tiny(family)), calibration, score)
    apply_width(plan, tmp_path / "out", score)
    loss = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert loss == pytest.approx(losses["held_out_loss"], rel=1e-5)
    changed = [name for name, tensor in plan.result.tensors.items() if tensor.compute]
    assert changed


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CAUSAL])
@pytest.mark.parametrize("score", ["activation", "entropy"])
def test_encoders_are_scored_on_data_and_not_refitted(family, score, tiny, tmp_path):
    checkpoint = open_checkpoint(tiny(family))
    plan = plan_width(checkpoint, heads_kept=2, neuron_share=0.5)
    plan, losses = calibrate_width(plan, load(tiny(family)), data(fit=2, held_out=1), score)
    apply_width(plan, tmp_path / "out", score)
    assert losses == {}
    expected = logits(zeroed(tiny(family), plan))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=1e-5, rtol=0)
