"""Calibrated merging of KV heads: exact where heads are one and the same but for what folds away."""

import errno
import json
import os
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from helpers.calibration import data, self_labelled, text_batches, write_texts
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import FAMILIES, KV4, TEXT, build, head_dim_of, load, logits, text_config

from prunekit.checkpoint import Heads, heads, history, open_checkpoint, scratch_folder
from prunekit.checkpoint.provenance import data_record
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.model.load import load_model
from prunekit.model.offload import on_disk
from prunekit.model.replay import find_stack, in_memory, record_calls
from prunekit.model.scores import score_batches
from prunekit.surgery import kv_fit
from prunekit.surgery.cut import write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.kv_fit import enter, fit_kv, original_attention, refine
from prunekit.surgery.kv_math import as_pairs, choose_groups, partitions, rotation, shared_basis, shared_keys, turned
from prunekit.surgery.kv_merge import Attention, fold_before_norm, gather, merge_layer, plan_layer
from prunekit.surgery.sides import Sides

SHARED = [family for family in FAMILIES if ROWS[family].kv_heads]
NORMED = [name for name in SHARED if name.startswith(("qwen3", "gemma3"))]
PLAIN = [name for name in SHARED if name not in NORMED]


def moments_of(attention, inputs, slow=0):
    """Moments of inputs (tokens, hidden) each, with so many slow pairs."""
    pairs = torch.arange(attention.head_dim // 2)
    masks = [torch.ones(1, len(x), dtype=torch.bool) for x in inputs]
    return gather(attention, [x[None] for x in inputs], masks, pairs >= len(pairs) - slow)


@torch.no_grad()
def alike(model, turns=True):
    """Make KV heads h and h + n/2 one and the same but for a turn and scale of each pair of k, and a map of v.

    Without `turns` pairs only change their sign, which is all that a norm behind k_proj allows.
    """
    generator = torch.Generator().manual_seed(5)
    width = head_dim_of(model)
    half = text_config(model).num_key_value_heads // 2
    for name, projection in model.named_modules():
        for head in range(half if name.endswith(("self_attn.k_proj", "self_attn.v_proj")) else 0):
            draw = torch.rand(width // 2, generator=generator)
            change = rotation(torch.polar(draw + 0.5, 6.3 * draw) if turns else (draw - 0.5).sign().to(torch.cfloat))
            if name.endswith("v_proj"):
                change = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
            for parameter in projection.parameters():
                every = parameter.view(-1, width, *parameter.shape[1:])
                every[half + head] = change @ every[head]
    return model


def merge(folder, kv_heads, calibration=None, model=None):
    """(cut, model) of a calibrated merge of a folder's model in fp32."""
    model = model or load(folder)
    plan = plan_kv(open_checkpoint(folder), kv_heads, "calibrated")
    return fit_kv(plan, model, calibration or data(), quiet=True), model


@pytest.mark.parametrize("family", PLAIN)
def test_heads_that_are_alike_but_for_turns_and_maps_merge_without_loss(family, tmp_path):
    model = alike(build(family))
    model.save_pretrained(tmp_path / "in")
    cut, _ = merge(tmp_path / "in", text_config(model).num_key_value_heads // 2)
    write_cut(cut, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", NORMED)
def test_heads_with_norms_that_are_alike_but_for_signs_and_maps_merge_without_loss(family, tmp_path):
    model = alike(build(family), turns=False)
    model.save_pretrained(tmp_path / "in")
    cut, _ = merge(tmp_path / "in", text_config(model).num_key_value_heads // 2)
    write_cut(cut, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_biases_in_front_of_norms_are_fitted_too(tmp_path):
    torch.manual_seed(0)
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT | KV4, attention_bias=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    alike(model, turns=False).save_pretrained(tmp_path / "in")
    cut, _ = merge(tmp_path / "in", 2)
    write_cut(cut, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SHARED)
def test_what_is_written_is_the_model_in_memory(family, tiny, tmp_path):
    cut, model = merge(tiny(family), 1)
    write_cut(cut, tmp_path / "out")
    assert text_config(load(tmp_path / "out")).num_key_value_heads == 1
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", SHARED)
def test_the_loss_reported_is_that_of_the_checkpoints(family, tiny, tmp_path):
    from prunekit.model.scores import score_batches

    calibration = data()
    cut, _ = merge(tiny(family), 1, calibration)
    write_cut(cut, tmp_path / "out")
    for folder, key in ((tiny(family), "held_out_loss_unmerged"), (tmp_path / "out", "held_out_loss")):
        assert score_batches(load(folder), calibration.held_out)["loss"] == pytest.approx(cut.metrics[key], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_the_merged_model_is_nearer_to_the_original_than_the_averaged_one(family, tiny, tmp_path):
    calibration = self_labelled(build(family), data())
    cut, _ = merge(tiny(family), 1, calibration)
    write_cut(cut, tmp_path / "calibrated")
    write_cut(cut_kv(plan_kv(open_checkpoint(tiny(family)), 1, "mean")), tmp_path / "mean")
    base = logits(load(tiny(family)))
    far = {name: float((logits(load(tmp_path / name)) - base).square().mean()) for name in ("calibrated", "mean")}
    assert far["calibrated"] < 0.7 * far["mean"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_cache_has_one_head_and_generation_is_the_same_with_it(family, tiny, tmp_path):
    cut, _ = merge(tiny(family), 1)
    write_cut(cut, tmp_path / "out")
    model = load(tmp_path / "out")
    prompt = torch.tensor([[7, 30, 11, 52, 9]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    cache = model(prompt, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {1}


@pytest.mark.parametrize("slow", [0, 3, 8])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_vl"])
def test_heads_that_are_alike_go_together(family, slow):
    model, row = alike(build(family), turns=family == "qwen2"), ROWS[family].text
    attention = Attention(getattr(*find_stack(model, row))[1], row, Heads(8, 4, head_dim_of(model)))
    moments = moments_of(attention, [torch.randn(300, 32, generator=torch.Generator().manual_seed(0))], slow)
    assert plan_layer(moments, 2, text_config(model).num_attention_heads).groups == [(0, 2), (1, 3)]


def test_tensors_that_merging_does_not_touch_keep_their_bytes(tiny):
    cut, _ = merge(tiny("qwen3_vl"), 2)
    changed = {name.rpartition(".layers.")[2].partition(".")[2] for name, t in cut.result.tensors.items() if t.compute}
    projections = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert (
        projections
        <= changed
        <= projections | {"self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.down_proj.weight"}
    )


def test_weights_in_bf16_stay_in_bf16(tmp_path):
    build("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    cut, _ = merge(tmp_path / "in", 2)
    write_cut(cut, tmp_path / "out")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


# --- the closed forms -------------------------------------------------------------------------------------------------


def test_keys_that_are_one_but_for_complex_factors_are_shared_exactly():
    generator = torch.Generator().manual_seed(0)
    one = as_pairs(torch.randn(200, 1, 8, generator=generator).double())
    factors = as_pairs(torch.randn(3, 8, generator=generator).double())
    keys = one * factors
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 200
    a, b, lost = shared_keys(moments, torch.rand(3, 4, generator=generator).double() + 0.1)
    shared = (keys * a).sum(1, keepdim=True)
    torch.testing.assert_close(shared * b, keys)
    assert lost.abs().max() < 1e-12


def test_the_shared_key_is_as_large_as_the_heads_are():
    generator = torch.Generator().manual_seed(0)
    keys = as_pairs(torch.randn(500, 3, 8, generator=generator).double())
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 500
    a, _, _ = shared_keys(moments, torch.ones(3, 4).double())
    size = (keys * a).sum(1).abs().square().mean(0)
    torch.testing.assert_close(size, keys.abs().square().mean((0, 1)))


def test_what_is_lost_of_keys_is_the_energy_of_what_is_missing_and_the_least_there_can_be():
    generator = torch.Generator().manual_seed(0)
    keys = as_pairs(torch.randn(400, 3, 8, generator=generator).double())
    keys = keys + 1.5 * keys[:, :1]  # the heads have something in common
    energy = torch.rand(3, 4, generator=generator).double() + 0.1
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 400

    def missing(a, b):
        shared = (keys * a).sum(1, keepdim=True)
        return ((keys - shared * b).abs().square().mean(0) * energy).sum(0)

    a, b, lost = shared_keys(moments, energy)
    torch.testing.assert_close(missing(a, b), lost)
    for _ in range(20):
        near = [z + 0.05 * torch.randn(3, 4, generator=generator, dtype=torch.cdouble) for z in (a, b)]
        assert (missing(*near) > lost).all()
    mean = b.sum(0)
    assert (mean.imag.abs() < 1e-9 * mean.abs()).all() and (mean.real > 0).all(), "the heads' mean phase"


def test_what_is_lost_of_values_is_what_readers_miss_and_the_shared_one_is_as_large_as_they_are():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 6, generator=generator).double() @ torch.randn(6, 12, generator=generator).double()
    roots = 3 * torch.randn(3, 5, 4, generator=generator).double()
    covariance = values.T @ values / 500
    p, r, lost = shared_basis(covariance, roots.mT @ roots)
    shared = values @ p.T
    missing = [(values[:, 4 * h : 4 * h + 4] - shared @ r[h].T) @ roots[h].T for h in range(3)]
    assert float(lost) == pytest.approx(sum(float(m.square().sum(1).mean()) for m in missing), rel=1e-3)
    assert float(shared.square().sum(1).mean()) == pytest.approx(float(covariance.diagonal().sum()) / 3)


def test_values_in_one_subspace_are_shared_exactly():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(100, 4, generator=generator).double()
    values = one @ torch.randn(4, 12, generator=generator).double()
    roots = torch.randn(3, 4, 4, generator=generator).double()
    p, r, lost = shared_basis(values.T @ values / 100, roots.mT @ roots)
    back = torch.cat([values @ p.T @ r[head].T for head in range(3)], 1)
    torch.testing.assert_close(back, values)
    assert abs(lost) < 1e-9


def test_values_that_nobody_reads_are_not_kept():
    covariance = torch.eye(4).double()
    readers = torch.stack([torch.zeros(2, 2), torch.eye(2)]).double()
    _, r, lost = shared_basis(covariance, readers)
    assert r[1].det().abs() > 0.1 and lost < 1e-5


def test_slow_pairs_of_many_heads_are_shared_exactly_where_they_span_few_dimensions():
    """Whatever head and pair their content comes from, with heads whose rows of k_proj are one subspace's."""
    model, row = build("llama"), ROWS["llama"].text
    count = model.config.num_key_value_heads
    attention = Attention(getattr(*find_stack(model, row))[1], row, Heads(8, count, head_dim_of(model)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator)
    with torch.no_grad():
        width = attention.head_dim
        mixes = torch.randn(count, width, width, generator=generator)
        attention.k.weight.copy_((mixes @ attention.k.weight[:width]).flatten(0, 1))
        q, k = attention.queries_and_keys(x)
        before = torch.einsum("thgd,shd->hgts", q.unflatten(1, (count, -1)), k)
        merge_layer(attention, 1, moments_of(attention, [x], slow=width // 2), [x])
        q, k = attention.queries_and_keys(x)
        after = torch.einsum("thgd,sd->hgts", q.unflatten(1, (count, -1)), k[:, 0])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_what_the_keys_of_a_row_have_in_common_counts_for_nothing():
    model, row = build("llama"), ROWS["llama"].text
    count = model.config.num_key_value_heads
    attention = Attention(getattr(*find_stack(model, row))[1], row, Heads(8, count, head_dim_of(model)))
    generator = torch.Generator().manual_seed(0)
    x, common = torch.randn(2, 60, 32, generator=generator), torch.randn(2, 1, 32, generator=generator)
    mask = torch.arange(60) < torch.tensor([[60], [40]])
    slow = torch.ones(attention.head_dim // 2, dtype=torch.bool)
    with torch.no_grad():
        found, moved = [gather(attention, [y], [mask], slow).slow_keys for y in (x, x + 5 * common)]
    torch.testing.assert_close(moved, found)


@pytest.mark.parametrize("positions", [range(100), [0] * 20 + list(range(80)), [*range(30), *[30] * 9, *range(35, 96)]])
def test_how_far_rope_turns_is_read_from_what_attention_gets(positions):
    rates = 0.9 ** torch.arange(0, 80, 4).float()
    angles = torch.tensor(list(positions))[None, :, None] * rates.repeat(2)
    slow = rates * max(positions) < 3
    found = turned(angles.cos(), angles.sin())
    assert found[~slow].min() > 3
    torch.testing.assert_close(found[slow], (rates * max(positions))[slow].double(), rtol=1e-3, atol=1e-3)


def test_turns_beyond_half_a_circle_are_counted_in_full():
    rates = 0.8 ** torch.arange(12).double()
    for positions in ([*range(100)], [*range(70), *range(50, 60)], [5] * 4 + [*range(60)]):
        angles = torch.tensor(positions)[None, :, None] * rates.repeat(2)
        steps = torch.tensor(positions).diff().abs().max() * rates < 3  # of what turns more in a step nobody knows
        expected = (max(positions) - min(positions)) * rates
        torch.testing.assert_close(turned(angles.cos(), angles.sin())[steps], expected[steps], rtol=1e-6, atol=1e-6)
        assert steps.any()


def attention_of(family):
    row = ROWS[family].text
    model = build(family)
    layer = getattr(*find_stack(model, row))[1]
    return Attention(layer, row, Heads(8, text_config(model).num_key_value_heads, head_dim_of(model)))


@torch.no_grad()
def test_moments_are_means_over_all_tokens_of_all_batches():
    attention, generator = attention_of("llama"), torch.Generator().manual_seed(0)
    one, other = (torch.randn(count, 32, generator=generator) for count in (30, 50))
    both, x = moments_of(attention, [one, other]), torch.cat([one, other])
    q, k = attention.queries_and_keys(x)
    v = attention.v(x).double()
    heads, width = attention.kv_heads, attention.head_dim
    torch.testing.assert_close(both.values, v.T @ v / 80)
    pairs = torch.complex(k[..., : width // 2], k[..., width // 2 :])
    torch.testing.assert_close(both.keys[3], pairs[..., 3].T @ pairs[..., 3].conj() / 80)
    energy = torch.complex(q[..., : width // 2], q[..., width // 2 :]).abs().square().mean(0)
    torch.testing.assert_close(both.queries, energy.view(heads, -1, width // 2).sum(1))
    o = attention.o.weight.double()
    groups = o.shape[1] // width // heads
    assert groups == 2
    for head in range(heads):
        mine = [o[:, (head * groups + i) * width : (head * groups + i + 1) * width] for i in range(groups)]
        torch.testing.assert_close(both.readers[head], sum(w.T @ w for w in mine))


@torch.no_grad()
def test_what_is_read_most_goes_to_the_pairs_that_turn_least():
    attention = attention_of("llama")
    generator, half = torch.Generator().manual_seed(0), attention.head_dim // 2
    x = torch.randn(400, 32, generator=generator)
    moments = moments_of(attention, [x], slow=half)
    maps = plan_layer(moments, 1, attention.q.out_features // attention.head_dim)
    covariance = moments.slow_keys.flatten(2).flatten(0, 1)
    energy = (maps.k @ covariance @ maps.k.T).diagonal()
    assert all(max(energy[i], energy[i + half]) <= min(energy[i + 1], energy[i + 1 + half]) for i in range(half - 1))
    assert energy.max() > 2 * energy.min()


@torch.no_grad()
def test_groups_do_not_depend_on_the_unit_of_values_or_keys():
    attention, generator = attention_of("qwen2"), torch.Generator().manual_seed(0)
    moments = moments_of(attention, [torch.randn(300, 32, generator=generator)])
    groups = [
        plan_layer(
            replace(moments, readers=moments.readers * unit),
            2,
            attention.q.out_features // attention.head_dim,
        ).groups
        for unit in (1e-9, 1.0, 1e9)
    ]
    assert groups[0] == groups[1] == groups[2]


@torch.no_grad()
def test_heads_of_different_lengths_in_front_of_a_norm_count_alike_behind_it():
    torch.manual_seed(0)
    attention, width = attention_of("qwen3"), 16
    turns = [torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2)]
    linear = torch.nn.Linear(width, 2 * width, bias=False)
    linear.weight.copy_(torch.cat([turns[0], 30 * turns[1]]))
    norm = attention.norms[1]
    norm.weight.fill_(2.0)
    x = torch.nn.functional.normalize(torch.randn(50, width), dim=1)
    before = attention.heads(linear, x).double().square().mean(2).mean(0).sqrt()
    change = torch.cat([torch.eye(width), torch.eye(width)], 1).double() / 2
    fold, gain = fold_before_norm(attention, linear, norm, change, before, [x], False)
    wanted = norm(attention.heads(linear, x)).double().flatten(1) @ change.T
    found = x.double() @ fold.T * gain
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.9999


@torch.no_grad()
def test_fitted_gains_make_heads_as_long_as_is_wanted_on_average():
    attention, generator = attention_of("qwen3"), torch.Generator().manual_seed(0)
    linear, norm = attention.k, attention.norms[1]
    norm.weight.copy_(torch.randn(16, generator=generator).exp())
    x = torch.randn(400, 32, generator=generator)
    before = attention.heads(linear, x).double().square().mean(2).mean(0).sqrt()
    change = 3 * torch.randn(16, 64, generator=generator).double()
    wanted = norm(attention.heads(linear, x)).double().flatten(1) @ change.T
    fold, gain = fold_before_norm(attention, linear, norm, change, before, [x], True)
    norm.weight.copy_(gain)
    found = norm((x.double() @ fold.T).float()).double()
    assert float((wanted.square().sum(1) / found.square().sum(1)).mean()) == pytest.approx(1, rel=1e-3)


def test_fitted_gains_give_turned_heads_their_length_back():
    """With gains that differ within pairs, turned heads have other lengths in front of their norm than before."""
    row, generator = ROWS["qwen3"].text, torch.Generator().manual_seed(0)
    inputs = [torch.randn(1500, 32, generator=generator), torch.randn(300, 32, generator=generator)]
    gains = torch.randn(2, 16, generator=generator).exp()

    @torch.no_grad()
    def wrong(fit_gains):
        attention = Attention(getattr(*find_stack(model := alike(build("qwen3")), row))[1], row, Heads(8, 4, 16))
        assert model.config.num_attention_heads == 8
        for norm, gain in zip(attention.norms, gains):
            norm.weight.copy_(gain)

        def scores(queries, keys):
            q, k = attention.queries_and_keys(inputs[1])
            return torch.einsum("thd,shd->hts", q[:, queries], k[:, keys])

        # Two query heads share a key; the merged keys stand for 0 and 2, then for 1 and 3
        before = scores([0, 1, 4, 5, 2, 3, 6, 7], [0, 0, 2, 2, 1, 1, 3, 3])
        merge_layer(attention, 2, moments_of(attention, inputs[:1]), inputs[:1], fit_gains)
        after = scores(list(range(8)), [0, 0, 0, 0, 1, 1, 1, 1])
        return float((after - before).square().sum() / before.square().sum())

    assert wrong(fit_gains=True) < 0.7 * wrong(fit_gains=False)


def test_all_partitions_are_listed_once():
    found = [frozenset(p) for p in partitions(range(6), 2)]
    assert len(found) == len(set(found)) == 15


@pytest.mark.parametrize("count", [8, 32])
def test_the_best_groups_are_found(count):
    planted = torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(-1, 2).tolist()
    cost = torch.rand(count, count, generator=torch.Generator().manual_seed(1)) + 1
    cost = (cost + cost.T) / 2
    for i, j in planted:
        cost[i, j] = cost[j, i] = 0.1
    assert {frozenset(group) for group in choose_groups(cost, count // 2)} == {frozenset(p) for p in planted}


# --- what can be wrong with the data ----------------------------------------------------------------------------------


def test_a_rank_deficient_covariance_is_no_trouble(tiny):
    batches = text_batches(3)
    for batch in batches:
        batch["input_ids"][:] = 7
    _, model = merge(tiny("qwen3"), 1, Calibration(batches[:2], batches[2:], tokens=200))
    assert torch.isfinite(logits(model)).all()


def test_too_few_tokens_are_refused(tiny):
    batches = text_batches(2, rows=2)
    with pytest.raises(PruneKitError, match="18 calibration tokens to fit 64 dimensions.*--calib-tokens"):
        merge(tiny("qwen3"), 1, Calibration(batches[:1], batches[1:], tokens=36))


def test_activations_that_are_not_finite_are_refused(tiny):
    model = load(tiny("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PruneKitError, match="layer 3 has activations that are not finite; try --dtype float32"):
        merge(tiny("llama"), 1, model=model)


# --- refining, and layers on disk ---


@torch.no_grad()
def refined(folder, family, kv_heads, steps, rate):
    """(share of what layer 0's attention writes that is missing, before and after; its parameters, before and after)"""
    model, calibration, row = load(folder), data(fit=12), ROWS[family].text
    layer = getattr(*find_stack(model, row))[0]
    present = text_config(model).num_key_value_heads
    attention = Attention(layer, row, Heads(8, present, head_dim_of(model)))
    batches = [*calibration.fit, *calibration.held_out]
    judged = range(len(calibration.fit), len(batches))
    sides = Sides(model, ROWS[family], "text", batches, judged, record_calls(model, row, batches))
    _, wanted = original_attention(layer, row, sides.teacher, 0)
    entered = enter(layer, attention, sides.student, 0)
    if kv_heads < present:
        inputs = [x.flatten(0, 1) for x in entered.projections]
        merge_layer(attention, kv_heads, moments_of(attention, inputs), inputs)
    before = [parameter.clone() for _, _, parameter in attention.parameters()]
    left = refine(attention, sides, entered, wanted, steps, rate)
    return left, before, [parameter for _, _, parameter in attention.parameters()]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "qwen3_vl"])
def test_refined_attention_writes_more_of_what_the_original_writes(family, tiny):
    left, _, _ = refined(tiny(family), family, 1, 60, 0.02)
    assert left[1] < 0.95 * left[0]


def test_a_step_too_far_is_taken_back(tiny):
    left, before, after = refined(tiny("llama"), "llama", 1, 3, 50.0)
    assert 0 < left[0] == left[1]
    assert all(map(torch.equal, before, after))


def test_where_nothing_is_missing_nothing_moves(tiny):
    left, before, after = refined(tiny("llama"), "llama", 4, 3, 1.0)  # it is the original
    assert left[0] == left[1] == pytest.approx(0, abs=1e-9)
    assert all(map(torch.equal, before, after))


@torch.no_grad()
def test_an_output_that_is_not_better_refitted_stays(tiny, monkeypatch):
    monkeypatch.setattr(Sides, "fit", lambda *_, **__: SimpleNamespace(left=2.0, before=1.0, apply=lambda: 1 / 0))
    assert kv_fit.fit_output(SimpleNamespace(fit=Sides.fit, row=ROWS["llama"].text), 0, []) == 1.0


def test_the_loss_behind_is_a_mean_over_tokens_not_over_batches(tiny):
    batches = [*text_batches(1, rows=8), *text_batches(1, seed=3, rows=2, length=6)]
    batches[0]["labels"] = batches[0]["labels"] * 0 + 7
    model, calibration = load(tiny("llama")), Calibration(text_batches(6), batches, 1)
    expected = score_batches(model, batches)["loss"]
    cut, _ = merge(tiny("llama"), 1, calibration, model)
    assert cut.metrics["held_out_loss_unmerged"] == pytest.approx(expected, rel=1e-5)
    alone = [score_batches(load(tiny("llama")), [one])["loss"] for one in batches]
    assert expected != pytest.approx(sum(alone) / 2, rel=1e-3), "batches differ, or nothing was tested"


def test_padding_is_not_merged_for(tiny):
    found = []
    for filler in (7, 90):
        calibration = data()
        for one in calibration.fit:
            one["input_ids"][one["attention_mask"] == 0] = filler
        found.append(logits(merge(tiny("llama"), 1, calibration)[1]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@torch.no_grad()
def test_attention_makes_up_for_half_of_what_comes_in_wrong(tiny, monkeypatch):
    came, entered, wanted = [], [], []
    original, came_in, fit = kv_fit.original_attention, kv_fit.enter, kv_fit.fit_output

    def behind(sides, number, states):
        wanted.append([state.clone() for state in states])
        return fit(sides, number, states)

    monkeypatch.setattr(kv_fit, "original_attention", lambda *a: came.append(original(*a)) or came[-1])
    monkeypatch.setattr(kv_fit, "enter", lambda *a: entered.append(came_in(*a)) or entered[-1])
    monkeypatch.setattr(kv_fit, "fit_output", behind)
    merge(tiny("llama"), 1)
    assert len(wanted) == 5
    for number in (1, 3):
        for x, y, e, states in zip(*came[number], entered[number].layer, wanted[number]):
            assert (x - e).abs().max() > 1e-3
            torch.testing.assert_close(states, e + y + 0.5 * (x - e))


@torch.no_grad()
def test_of_gains_fitted_and_not_those_are_kept_that_leave_less(tiny, monkeypatch):
    for better in (True, False):
        tried = []

        def missing(sides, number, states, tried=tried, better=better):
            tried.append(Attention(sides.layers[number], sides.row, Heads(8, 1, 16)).q.weight.clone())
            return 1.0 if (len(tried) % 2 == 1) == better else 2.0

        monkeypatch.setattr(kv_fit, "fit_output", missing)
        _, model = merge(tiny("qwen3"), 1)
        kept = [layer.self_attn.q_proj.weight for layer in model.model.layers]
        assert all(torch.equal(one, two) for one, two in zip(kept, tried[0 if better else 1 :: 2]))


@torch.no_grad()
def test_slow_are_the_pairs_that_turn_by_a_radian_at_the_most(tiny, monkeypatch):
    seen, collect = [], kv_fit.gather
    monkeypatch.setattr(kv_fit, "gather", lambda *a: seen.append(a[-1]) or collect(*a))
    _, model = merge(tiny("llama"), 1)
    rates = model.model.rotary_emb.inv_freq
    assert seen[0].tolist() == (rates * 11 <= 1).tolist() and 0 < seen[0].sum() < len(rates)


def test_just_as_many_tokens_as_dimensions_are_enough(tiny):
    """Two heads of 16 dimensions share one."""
    batches = text_batches(2, rows=8, length=8)
    for one in batches:
        one["attention_mask"][:] = 0
        one["attention_mask"][0] = 1
        one["attention_mask"][1:4] = 1
    merge(tiny("llama"), 1, Calibration(batches[:1], text_batches(1), 1))
    batches[0]["attention_mask"][3, 4:] = 0
    with pytest.raises(PruneKitError, match="28 calibration tokens to fit 32 dimensions"):
        merge(tiny("llama"), 1, Calibration(batches[:1], text_batches(1), 1))


def test_what_is_refined_knows_nothing_of_the_rows_that_judge(tiny, monkeypatch):
    after = []
    for most in (1.0, 9.0):  # how tokens of the rows that judge count
        monkeypatch.setattr(
            Sides, "weight", lambda self, index, target, most=most: torch.linspace(
                1.0, most if index in self.judged else 1.0, target.shape[:-1].numel()
            )
        )  # fmt: skip
        left, before, found = refined(tiny("llama"), "llama", 1, 60, 0.02)
        assert left[1] < left[0] and not all(map(torch.equal, before, found))
        after.append(found)
    assert all(map(torch.equal, *after))


def test_what_can_not_be_refined_is_refused(tiny):
    with pytest.raises(PruneKitError, match="--refine: gemma3_text has norms behind attention"):
        plan = plan_kv(open_checkpoint(tiny("gemma3_text")), 1, "calibrated")
        fit_kv(plan, load(tiny("gemma3_text")), data(), 3, quiet=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_vl", "gemma3_text"])
def test_layers_on_disk_give_the_same_checkpoint(family, tiny, tmp_path):
    calibration, steps = data(), 0 if family == "gemma3_text" else 3
    for way in ("memory", "disk"):
        checkpoint = open_checkpoint(tiny(family))
        plan = plan_kv(checkpoint, 1, "calibrated")
        with scratch_folder(tmp_path / way) as scratch:
            offload, store = (scratch, on_disk(scratch)) if way == "disk" else (None, in_memory)
            model = load_model(checkpoint, "cpu", "float32", offload)
            cut = fit_kv(plan, model, calibration, steps, store, quiet=True)
        if way == "disk":  # nothing of a layer stays when it is done
            layers = getattr(*find_stack(model, ROWS[family].text))
            assert {parameter.device.type for parameter in layers.parameters()} == {"meta"}
        write_cut(cut, tmp_path / way)
    torch.testing.assert_close(logits(load(tmp_path / "disk")), logits(load(tmp_path / "memory")), atol=1e-6, rtol=0)
    one, other = (history(tmp_path / way)[-1]["metrics"] for way in ("memory", "disk"))
    assert one == pytest.approx(other, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_on_disk_is_the_same_and_its_file_has_no_name(dtype, tmp_path):
    tensor = torch.arange(60).view(3, 4, 5).to(dtype)
    stored = on_disk(tmp_path)(tensor)
    assert torch.equal(stored, tensor) and stored.dtype == dtype
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(PruneKitError, match="out: the disk is full"),
        scratch_folder(tmp_path / "out") as folder,
    ):
        on_disk(folder)(torch.ones(3))
    assert not list(tmp_path.iterdir())


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_merges_and_says_so(tmp_path, script):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script("kv_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--kv-heads", 1, "--calib", file)
    assert done.returncode == 0, done.stderr
    entry = history(tmp_path / "out")[-1]
    assert entry["settings"]["method"] == "calibrated" and entry["settings"]["calib"] == str(file)
    assert entry["settings"]["calibration_tokens"] > 0
    said = f"{entry['metrics']['held_out_loss_unmerged']:.4f} -> {entry['metrics']['held_out_loss']:.4f}"
    assert f"held-out loss {said}" in done.stdout
    assert heads(open_checkpoint(tmp_path / "out")).kv == 1


def test_the_script_reads_the_rows_once_and_records_them(tmp_path, opens, monkeypatch):
    file, out = write_texts(tmp_path / "texts.jsonl"), tmp_path / "out"
    line = ["kv_cut.py", "--model", EMBEDDED, "--out", out, "--kv-heads", 1, "--calib", file, "--calib-tokens", 500]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    count = opens(file)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "kv_cut.py"), run_name="__main__")
    assert (ended.value.code, count()) == (0, 1)
    assert history(out)[-1]["settings"]["calibration_data"] == [data_record(file)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "calibrated"], "--method calibrated and --calib need each other"),
        (["--method", "mean", "--calib", "x.jsonl"], "--method calibrated and --calib need each other"),
        (["--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--refine", "3"], "--refine needs --calib"),
        (["--refine", "-1", "--calib", "x.jsonl"], "argument --refine: '-1' is no whole number"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(arguments, message, tmp_path, script):
    done = script("kv_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--kv-heads", 1, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_families_without_shared_heads_are_refused(family, tiny, tmp_path, script):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script("kv_cut.py", "--model", tiny(family), "--out", tmp_path / "out", "--kv-heads", 1, "--calib", file)
    assert done.returncode == 2
    assert f"{family}: has no form with fewer KV heads" in done.stderr


def test_heads_that_are_rotated_in_part_are_refused(own):
    folder = own("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PruneKitError, match="partial_rotary_factor"):
        plan_kv(open_checkpoint(folder), 1, "calibrated")
    plan_kv(open_checkpoint(folder), 1, "mean")


def test_the_history_says_method_and_tokens_and_the_card_the_loss(tmp_path, tiny):
    calibration = data()
    cut, _ = merge(tiny("qwen3"), 2, calibration)
    write_cut(cut, tmp_path / "out")
    settings = history(tmp_path / "out")[-1]["settings"]
    assert settings["method"] == "calibrated" and settings["calibration_tokens"] == calibration.tokens
    assert f"| held_out_loss {cut.metrics['held_out_loss']:.4g} |" in (tmp_path / "out" / "README.md").read_text()
