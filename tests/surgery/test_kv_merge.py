"""Merging one attention's heads by moments of what they compute, in closed form."""

from dataclasses import replace

import pytest
import torch
from helpers.kv_heads import alike, moments_of
from helpers.tiny_models import build, head_dim_of, text_config

from prunekit.checkpoint import Heads
from prunekit.families import FAMILIES as ROWS
from prunekit.model.replay import find_stack
from prunekit.surgery.kv_merge import Attention, fold_before_norm, gather, merge_layer, plan_layer


@pytest.mark.parametrize("slow", [0, 3, 8])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_vl"])
def test_heads_that_are_alike_go_together(family, slow):
    model, row = alike(build(family), turns=family == "qwen2"), ROWS[family].text
    attention = Attention(getattr(*find_stack(model, row))[1], row, Heads(8, 4, head_dim_of(model)))
    moments = moments_of(attention, [torch.randn(300, 32, generator=torch.Generator().manual_seed(0))], slow)
    assert plan_layer(moments, 2, text_config(model).num_attention_heads).groups == [(0, 2), (1, 3)]


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
