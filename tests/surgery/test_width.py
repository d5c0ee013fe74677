"""Narrower layers: what is removed is as if zeroed, what is left loads anywhere, and bad numbers are refused."""

import json
import re

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.calibration import data, self_labelled, text_batches
from helpers.cuts import cut_width
from helpers.tiny_models import FAMILIES, MOE, TEXT, head_dim_of, load, logits, save, text_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import Heads, attending, heads, open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.model.parts import LayerParts, Linear
from prunekit.model.replay import find_stack
from prunekit.model.scores import score_batches
from prunekit.surgery.cut import write_cut
from prunekit.surgery.width import SCORES, best_across, choose, keep_heads, magnitudes, plan_width
from prunekit.surgery.width_fit import fit_once, focus, taylor

REMOVABLE = [family for family in FAMILIES if ROWS[family].removable_heads != "none"]
CAUSAL = [family for family in FAMILIES if ROWS[family].causal]


def zeroed(folder, plan):
    """The uncut model with what the plan removes zeroed where o_proj and down_proj read it, by hand."""
    model, row = load(folder), plan.source.family.text
    of_text = heads(plan.source)
    owner, attribute = find_stack(model, row)
    for number, module in enumerate(getattr(owner, attribute)):
        kept, layer = plan.kept[number], LayerParts(module, row, of_text)
        axis = 0 if row.inputs_first else 1
        with torch.no_grad():
            for head in range(of_text.query) if kept.heads is not None else ():
                if head not in kept.heads:
                    layer.o.module.weight.narrow(axis, head * of_text.dim, of_text.dim).zero_()
            for expert, neurons in enumerate(kept.neurons or ()):
                down = layer.down.module
                weight = down.weight if isinstance(layer.down, Linear) else down.down_proj[expert]
                gone = [i for i in range(weight.shape[axis]) if i not in neurons]
                weight.index_fill_(axis, torch.tensor(gone), 0)
    return model


@pytest.mark.parametrize("family", REMOVABLE)
def test_a_model_without_heads_gives_what_it_gives_with_them_zeroed(family, tiny, tmp_path):
    plan = cut_width(tiny(family), tmp_path / "out", head_share=0.5)
    model = load(tmp_path / "out")
    assert text_config(model).num_attention_heads * 2 == text_config(load(tiny(family))).num_attention_heads
    assert head_dim_of(model) == heads(plan.source).dim
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", REMOVABLE)
def test_a_model_without_kv_groups_gives_what_it_gives_with_their_heads_zeroed(family, tiny, tmp_path):
    kv_heads = heads(open_checkpoint(tiny(family))).kv
    plan = cut_width(tiny(family), tmp_path / "out", kv_groups=kv_heads // 2)
    assert statistics(tmp_path / "out")["num_key_value_heads"] == kv_heads // 2
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_neurons_gives_what_it_gives_with_them_zeroed(family, tiny, tmp_path):
    plan = cut_width(tiny(family), tmp_path / "out", neuron_share=0.5)
    after, before = statistics(tmp_path / "out"), statistics(tiny(family))
    assert after["neurons"] * 2 == before["neurons"] and after["parameters"] < before["parameters"]
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(zeroed(tiny(family), plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_model_keeps_its_shapes_and_gives_what_zeroed_heads_give(family, tiny, tmp_path):
    plan = cut_width(tiny(family), tmp_path / "out", head_share=0.5, neuron_share=0.5, mask=True)
    expected = logits(zeroed(tiny(family), plan))
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert statistics(tmp_path / "out") == statistics(tiny(family))


MEASURED = [(family, "activation") for family in CAUSAL]
MEASURED += [(family, score) for family in ("llama", "gpt2", "qwen3_moe") for score in SCORES if score != "activation"]


@pytest.mark.parametrize("family, score", MEASURED)
def test_what_is_written_has_the_held_out_loss_that_was_measured(family, score, tiny, tmp_path):
    checkpoint, calibration = open_checkpoint(tiny(family)), data(fit=4, held_out=1)
    plan = plan_width(checkpoint, head_share=0.5, neuron_share=0.5)
    found = fit_once(plan, load(tiny(family)), calibration, score)
    write_cut(found, tmp_path / "out")
    loss = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert loss == pytest.approx(found.metrics["held_out_loss"], rel=1e-5)
    changed = [name for name, tensor in found.result.tensors.items() if tensor.compute]
    assert changed


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CAUSAL])
@pytest.mark.parametrize("score", ["activation", "entropy"])
def test_encoders_are_scored_on_data_and_not_refitted(family, score, tiny, tmp_path):
    checkpoint = open_checkpoint(tiny(family))
    plan = plan_width(checkpoint, heads_kept=2, neuron_share=0.5)
    found = fit_once(plan, load(tiny(family)), data(fit=2, held_out=1), score)
    write_cut(found, tmp_path / "out")
    assert found.metrics == {}
    expected = logits(zeroed(tiny(family), found))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=1e-5, rtol=0)


def test_refits_bring_the_model_nearer_to_the_uncut_one(tiny, tmp_path):
    checkpoint, calibration = open_checkpoint(tiny("llama")), self_labelled(load(tiny("llama")), data())
    wanted = {"head_share": 0.5, "neuron_share": 0.5}
    found = fit_once(plan_width(checkpoint, **wanted), load(tiny("llama")), calibration, "magnitude")
    cut_width(tiny("llama"), tmp_path / "out", **wanted)
    unrefitted = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert found.metrics["held_out_loss_uncut"] < found.metrics["held_out_loss"] < unrefitted
    changed = {name.split(".", 3)[3] for name, tensor in found.result.tensors.items() if tensor.compute}
    assert {"self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight"} <= changed


def test_refitted_masks_stay_exact_zeros(tiny, tmp_path):
    checkpoint, model = open_checkpoint(tiny("gpt2")), load(tiny("gpt2"))
    plan = plan_width(checkpoint, heads_kept=2, neuron_share=0.5, mask=True)
    found = fit_once(plan, model, self_labelled(load(tiny("gpt2")), data()), "activation")
    write_cut(found, tmp_path / "out")
    tensors, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tiny("gpt2")))
    for layer, kept in found.kept.items():
        heads_read = tensors[f"transformer.h.{layer}.attn.c_proj.weight"].view(4, -1)
        assert [head for head in range(4) if heads_read[head].any()] == kept.heads
        neurons = tensors[f"transformer.h.{layer}.mlp.c_proj.weight"].any(1).nonzero()[:, 0].tolist()
        assert neurons == kept.neurons[0]
    name = "transformer.h.2.attn.c_proj.weight"
    assert not torch.equal(
        tensors[name].view(4, -1)[found.kept[2].heads], before[name].view(4, -1)[found.kept[2].heads]
    )


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_what_is_never_used_goes_first(score, tiny):
    """Head 2's values and neuron 5's gate are 0: nothing that they write matters."""
    model = load(tiny("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[16:] = 0  # KV head 1: of query heads 2 and 3
            layer.self_attn.o_proj.weight[:, 16:32] = 0  # head 1
            layer.mlp.down_proj.weight[:, 5] = 0
    plan = plan_width(open_checkpoint(tiny("llama")), kv_groups=1, neurons=47)
    found = fit_once(plan, model, data(fit=2, held_out=1), score)
    assert all(kept.kv_heads == [0] and kept.heads == [0, 1] for kept in found.kept.values())
    assert all(5 not in kept.neurons[0] for kept in found.kept.values())


def test_taylor_is_the_gradient_of_a_gate_on_each_head_and_neuron(tiny):
    model, row = load(tiny("llama")), ROWS["llama"].text
    layers = [LayerParts(layer, row, Heads(4, 2, 16)) for layer in model.model.layers]
    batch = text_batches(1, rows=1)[0]
    scores = taylor(model, row, layers, [batch])
    assert all(parameter.requires_grad for parameter in model.parameters())
    gates = [torch.ones(64), torch.ones(48)]
    gates = [gate.requires_grad_() for gate in gates]
    for module, gate in zip((layers[3].o.module, layers[3].down.module), gates):
        module.register_forward_pre_hook(lambda _, inputs, gate=gate: (inputs[0] * gate,))
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="sum"
    )
    loss.backward()
    heads_of = gates[0].grad.view(4, 16).sum(1).square().numpy()
    assert np.allclose(scores[3].heads, heads_of, rtol=1e-3)
    assert np.allclose(scores[3].neurons[0], gates[1].grad.square().numpy(), rtol=1e-3, atol=1e-9)


def test_distributions_are_scored_from_uniform_to_one_hot():
    uniform, one_hot = torch.full((1, 1, 1, 8), 1 / 8), torch.eye(8)[None, None, :1]
    for score in ("entropy", "variance"):
        assert focus(uniform, score).item() == pytest.approx(0, abs=1e-5)
        assert focus(one_hot, score).item() == pytest.approx(1, abs=1e-5)
        masked = torch.tensor([0.25] * 4 + [0.0] * 4)[None, None, None]
        assert focus(masked, score).item() == pytest.approx(0, abs=1e-5)


@settings(deadline=None)
@given(st.data())
def test_every_kv_group_keeps_as_many_heads_and_the_best_of_them(drawn):
    size, kv_count = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(1, 4))
    kv_kept, each = drawn.draw(st.integers(1, kv_count)), drawn.draw(st.integers(1, size))
    scores = drawn.draw(st.lists(st.floats(0, 1), min_size=size * kv_count, max_size=size * kv_count))
    heads_kept, groups = keep_heads(scores, kv_count, Heads(kv_kept * each, kv_kept, 16))
    assert heads_kept == sorted(heads_kept) and len(heads_kept) == kv_kept * each and len(groups) == kv_kept
    assert [head // size for head in heads_kept] == [group for group in groups for _ in range(each)]
    for group in groups:
        mine = [scores[head] for head in heads_kept if head // size == group]
        others = [scores[h] for h in range(group * size, (group + 1) * size) if h not in heads_kept]
        assert min(mine) >= max(others, default=0)


def test_the_kv_groups_stay_whose_heads_score_most_together():
    assert keep_heads([3, 0, 2, 2, 0, 1], 3, Heads(2, 1, 16)) == ([2, 3], [1])
    assert keep_heads([3, 0, 2, 2, 0, 1], 3, Heads(2, 2, 16)) == ([0, 2], [0, 1])


def test_heads_with_a_kv_head_each_take_it_along(tmp_path):
    config = hf.LlamaConfig(**TEXT | {"num_key_value_heads": 4}, head_dim=16)
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    plan = cut_width(tmp_path / "in", tmp_path / "out", heads_kept=2)
    numbers = statistics(tmp_path / "out")
    assert (numbers["num_attention_heads"], numbers["num_key_value_heads"]) == (2, 2)
    model = load(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(zeroed(tmp_path / "in", plan)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [family for family in REMOVABLE if not ROWS[family].vision])
def test_generation_with_a_cache_goes_on_as_without(family, tiny, tmp_path):
    cut_width(tiny(family), tmp_path / "out", kv_groups=1, neuron_share=0.5)
    model = load(tmp_path / "out")
    ids = torch.randint(5, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids, use_cache=True, **arguments), model.generate(ids, use_cache=False, **arguments)
    )


def test_bits_of_what_stays_are_the_inputs(tiny, tmp_path):
    plan = cut_width(tiny("qwen3"), tmp_path / "out", head_share=0.5, neuron_share=0.5)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny("qwen3"), tmp_path / "out"))
    for layer, kept in plan.kept.items():
        q = before[f"model.layers.{layer}.self_attn.q_proj.weight"].view(8, 16, -1)[kept.heads]
        assert torch.equal(after[f"model.layers.{layer}.self_attn.q_proj.weight"], q.reshape(-1, 32))
        up = before[f"model.layers.{layer}.mlp.up_proj.weight"][kept.neurons[0]]
        assert torch.equal(after[f"model.layers.{layer}.mlp.up_proj.weight"], up)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(re.search(r"\.(?:[qo]_proj|gate_proj|up_proj|down_proj)\.", name) for name in changed)


@pytest.fixture
def older(monkeypatch, tmp_path):
    """older(width): a model with experts of this width as transformers saves it, and turned, as some releases are."""

    def made(width):
        monkeypatch.setitem(MOE, "moe_intermediate_size", width)
        ours, theirs = (save("qwen3_vl_moe", tmp_path / name) for name in ("ours", "theirs"))
        tensors = load_file(ours / "model.safetensors")
        turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
        save_file(turned, theirs / "model.safetensors", {"format": "pt"})
        return ours, theirs

    return made


@pytest.mark.parametrize("width", [16, 24, 32])
def test_stacked_experts_of_older_releases_are_cut_along_their_own_axes(older, width, tmp_path):
    """(experts, width, hidden) and (experts, hidden, width): the same cut, turned; also where one of them is square."""
    for folder in older(width):
        cut_width(folder, tmp_path / f"{folder.name}-cut", neuron_share=0.25)
    one, two = (load_file(tmp_path / f"{name}-cut" / "model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.equal(two[n], t.mT if ".experts." in n else t) for n, t in one.items())


def test_a_cut_after_which_turned_experts_would_be_square_is_refused(older):
    """transformers sees by the shape alone what it has to turn back."""
    ours, theirs = map(open_checkpoint, older(32))
    plan_width(ours, neuron_share=0.5)
    with pytest.raises(PruneKitError, match="16 neurons of each expert: .*gate_up_proj would be square"):
        plan_width(theirs, neuron_share=0.5)


def test_cutting_what_was_masked_changes_nothing(tiny, tmp_path):
    """By the weights, heads that are zeroed go first: mask, train what is left, then remove."""
    cut_width(tiny("llama"), tmp_path / "masked", head_share=0.5, neuron_share=0.5, mask=True)
    cut_width(tmp_path / "masked", tmp_path / "out", head_share=0.5, neuron_share=0.5)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "masked")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_magnitudes_are_norms_of_what_a_head_makes_of_its_input_and_products_of_a_neurons(family, tiny):
    model, of_text = load(tiny(family)), heads(open_checkpoint(tiny(family)))
    scores = magnitudes(open_checkpoint(tiny(family)))
    for layer, module in enumerate(model.model.layers):
        v = module.self_attn.v_proj.weight.unflatten(0, (of_text.kv, -1))
        o = module.self_attn.o_proj.weight.unflatten(1, (of_text.query, -1))
        of_heads = [(o[:, h] @ v[h // (of_text.query // of_text.kv)]).norm().item() for h in range(of_text.query)]
        up, gate = module.mlp.up_proj.weight.norm(dim=1), module.mlp.gate_proj.weight.norm(dim=1)
        of_neurons = (up * gate * module.mlp.down_proj.weight.norm(dim=0)).tolist()
        assert scores[layer].heads.tolist() == pytest.approx(of_heads, rel=1e-4)
        assert scores[layer].neurons[0].tolist() == pytest.approx(of_neurons, rel=1e-4)


def test_magnitudes_of_experts_are_of_each_of_both_halves_of_what_is_stored_as_one(tiny):
    scores = magnitudes(open_checkpoint(tiny("qwen3_vl_moe")))
    experts = load(tiny("qwen3_vl_moe")).model.language_model.layers[3].mlp.experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    expected = gate.norm(dim=2) * up.norm(dim=2) * experts.down_proj.norm(dim=1)
    torch.testing.assert_close(torch.tensor(scores[3].neurons), expected.detach(), rtol=1e-4, atol=0)


def test_the_account_says_what_went_from_each_layer_and_what_all_scored(tiny):
    plan = plan_width(open_checkpoint(tiny("qwen3")), kv_groups=2, neurons=40)
    found = choose(plan, "magnitude", magnitudes(plan.source))
    account = found.account()
    assert account.removed == {"heads": 4, "kv_heads": 2, "intermediate_size": 8}
    assert account.settings == {"score": "magnitude", "masked": []}
    for layer, gone in enumerate(account.more["heads_removed"]):
        assert sorted([*gone, *found.kept[layer].heads]) == list(range(8)) and len(gone) == 4
        assert account.more["head_scores"][layer] == pytest.approx(found.scores[layer].heads, rel=1e-3)


def test_an_account_of_masks_says_so_and_that_no_kv_head_went(tiny):
    plan = plan_width(open_checkpoint(tiny("qwen3")), kv_groups=2, neurons=40, mask=True)
    account = choose(plan, "magnitude", magnitudes(plan.source)).account()
    assert account.removed == {"heads": 4, "intermediate_size": 8}
    assert account.settings["masked"] == ["heads", "neurons"]


@pytest.mark.parametrize("share, kept", [(0.6, 32), (0.55, 24), (0.01, 8)])
def test_a_share_of_neurons_is_rounded_to_what_matrix_units_like(share, kept, tiny):
    assert plan_width(open_checkpoint(tiny("llama")), neuron_share=share).neurons == {"intermediate_size": kept}


@pytest.mark.parametrize(
    "family, wanted, message",
    [
        ("llama", {}, "nothing to cut"),
        ("llama", {"heads_kept": 3}, r"--heads 3: .*2 KV heads, each shared by 2.*keep one of 2$"),
        ("qwen3", {"heads_kept": 6}, r"--heads 6: .*keep one of 4$"),
        ("llama", {"heads_kept": 0}, "--heads 0: "),
        ("llama", {"heads_kept": 4}, "--heads 4: "),
        ("llama", {"heads_kept": -2}, "--heads -2: "),
        ("llama", {"head_share": 0.75}, r"--head-share 0.75: "),
        ("llama", {"head_share": 1.5}, r"--head-share 1.5: "),
        ("llama", {"head_share": float("nan")}, "--head-share nan: "),
        ("llama", {"kv_groups": 3}, "--kv-groups 3: the model has 2; choose 1 to 2"),
        ("llama", {"kv_groups": 2}, "--kv-groups 2: "),
        ("llama", {"kv_groups": 1, "heads_kept": 3}, "--heads 3: .*keep one of 1, 2$"),
        ("gpt2", {"kv_groups": 2}, "--kv-groups: gpt2 has no form with shared KV heads"),
        ("gpt2", {"heads_kept": 4}, "keep one of 1, 2, 3$"),
        ("llama", {"neurons": 48}, r"--neurons 48: the model has 48 \(intermediate_size\); keep 1 to 47"),
        ("llama", {"neurons": 0}, "--neurons 0: "),
        ("llama", {"neuron_share": 0.0}, "--neuron-share 0.0: give a share to keep"),
        ("llama", {"neuron_share": 1.0}, "--neuron-share 1.0: "),
        ("qwen3_moe", {"neurons": 8}, r"48 \(intermediate_size\) and 16 \(moe_intermediate_size\)|16 .* and 48"),
    ],
)  # fmt: skip
def test_impossible_cuts_are_refused(family, wanted, message, tiny):
    with pytest.raises(PruneKitError, match=message):
        plan_width(open_checkpoint(tiny(family)), **wanted)


def test_kv_groups_with_which_no_head_can_go_are_refused_with_those_with_which_some_can(tmp_path):
    config = hf.LlamaConfig(**TEXT | {"num_attention_heads": 8, "num_key_value_heads": 4}, head_dim=16)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    with pytest.raises(PruneKitError, match="--kv-groups 3: .*give --kv-groups 1 or 2$"):
        plan_width(checkpoint, kv_groups=3)
    assert [plan_width(checkpoint, kv_groups=number).heads.query for number in (1, 2)] == [2, 4]


def test_transformers_refuses_llamas_whose_heads_dont_divide_hidden_and_so_do_we(tmp_path):
    config = hf.LlamaConfig(**TEXT | {"num_attention_heads": 8, "num_key_value_heads": 1}, head_dim=16)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    with pytest.raises(PruneKitError, match=r"a divisor of hidden_size 32\); keep one of 1, 2, 4$"):
        plan_width(checkpoint, heads_kept=6)
    assert plan_width(checkpoint, heads_kept=6, mask=True).heads.query == 6


def test_where_no_neuron_and_no_head_can_go_nothing_else_is_advised(tmp_path):
    sizes = {"intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | sizes)).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    for wanted in ({"neurons": 1}, {"neuron_share": 0.5}, {"heads_kept": 1}, {"head_share": 0.5}):
        with pytest.raises(PruneKitError, match="none can go$"):
            plan_width(checkpoint, **wanted)


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.up_proj"])
def test_what_diverged_is_not_scored_by_its_weights(linear, own):
    folder = own("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.2.{linear}.weight"][1, 1] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PruneKitError, match="layer 2 has weights that are NaN"):
        magnitudes(open_checkpoint(folder))


def test_a_config_that_contradicts_the_weights_is_refused(own):
    path = own("qwen3") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 8}))
    with pytest.raises(
        PruneKitError, match=r"by config.json \(num_key_value_heads, head_dim\) it would be \[32, 32\]; mend"
    ):
        plan_width(open_checkpoint(path.parent), heads_kept=4)


# --- layers that keep different numbers --------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 4))
def test_across_layers_the_highest_scores_stay_exactly_as_many_as_asked_and_one_in_each(rows, number):
    kept = best_across([np.array(row) for row in rows], number)
    assert sum(map(len, kept)) == number * len(rows) and all(each == sorted(set(each)) and each for each in kept)
    for row, each in zip(rows, kept):
        lowest = min(row[i] for i in each)
        assert max(row[i] for i in each) == max(row)
        for other, theirs in zip(
            rows, kept
        ):  # nothing that went scores higher than what stayed, but as a row's only one
            gone = [other[i] for i in range(4) if i not in theirs]
            assert len(each) == 1 or not gone or lowest >= max(gone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "qwen3_5"])
def test_important_layers_keep_more_heads_and_neurons_and_all_others_are_zero(family, tiny, tmp_path):
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    plan = plan_width(checkpoint, head_share=0.5, neuron_share=0.5, mask=True, across=True)
    cut = fit_once(plan, model, data(), "taylor", quiet=True)
    write_cut(cut, tmp_path / "out")
    attend = attending(checkpoint)  # linear attention's heads all stay
    assert [layer for layer, kept in cut.kept.items() if kept.heads is not None] == attend
    per_layer = [len(cut.kept[layer].heads) for layer in attend]
    assert sum(per_layer) == plan.heads.query * len(attend) and len(set(per_layer)) > 1
    neurons = [len(each) for kept in cut.kept.values() for each in kept.neurons]
    assert len(set(neurons)) > 1
    loaded, row, of_text = load(tmp_path / "out"), checkpoint.family.text, heads(checkpoint)
    owner, attribute = find_stack(loaded, row)
    for number in attend:
        layer = LayerParts(getattr(owner, attribute)[number], row, of_text)
        columns = layer.o.matrix.detach().unflatten(1, (of_text.query, of_text.dim))
        assert columns.abs().sum((0, 2)).nonzero()[:, 0].tolist() == cut.kept[number].heads
    before, after = (score_batches(each, data().held_out)["loss"] for each in (load(tiny(family)), loaded))
    assert cut.metrics == pytest.approx({"held_out_loss_uncut": before, "held_out_loss": after}, rel=1e-4)


@pytest.mark.parametrize(
    "wanted", [{"head_share": 0.5}, {"head_share": 0.5, "neurons": 8}, {"kv_groups": 1, "mask": True}]
)
def test_what_configs_cant_say_of_layers_is_refused(wanted, tiny):
    with pytest.raises(PruneKitError, match="--across-layers: "):
        plan_width(open_checkpoint(tiny("llama")), **wanted, across=True)
