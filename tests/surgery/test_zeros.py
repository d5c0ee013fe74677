"""Zeros in a checkpoint: counts exact to one weight, budgets that sum up, nothing else touched."""

import math

import pytest
import torch
from helpers.calibration import PADDED
from helpers.cuts import sparsify
from helpers.tiny_models import FAMILIES, load, logits, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery import zeros_scores as weight_scores
from prunekit.surgery.zeros import allocate, cut_zeros, plan_zeros, with_importance
from prunekit.surgery.zeros_weights import choose_weights, measure
from prunekit.surgery.zeros_wish import Wish

# --- budgets --------------------------------------------------------------------------------------------------


@given(st.data())
def test_budgets_sum_up_whatever_the_importances(data):
    sizes = data.draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
    count = len(sizes)
    importances = data.draw(st.lists(st.floats(0, 1e300), min_size=count, max_size=count))
    least = [data.draw(st.integers(0, size)) for size in sizes]
    maximum = data.draw(st.floats(0.01, 1))
    most = [max(low, int(maximum * size)) for low, size in zip(least, sizes)]
    total = data.draw(st.integers(sum(least), sum(most)))
    power = data.draw(st.floats(0.01, 10))
    found = allocate(sizes, importances, total, power, maximum, least)
    assert sum(found) == total
    assert all(low <= n <= max(low, math.ceil(maximum * s)) for low, n, s in zip(least, found, sizes))


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20), st.floats(0.05, 0.9))
def test_of_two_layers_the_more_important_one_never_gets_more_zeros(importances, share):
    sizes = [1000] * len(importances)
    found = allocate(sizes, importances, int(share * sum(sizes)), maximum=0.95)
    order = sorted(range(len(sizes)), key=lambda i: importances[i])
    # one weight may be the rounding
    assert all(found[a] >= found[b] - 1 for a, b in zip(order, order[1:]))


def test_budgets_are_proportional_to_what_importance_leaves():
    assert allocate([1000] * 3, [0.0, 0.5, 1.0], 600) == [400, 200, 0]
    assert allocate([1000] * 3, [0.0, 0.25, 1.0], 600, power=0.5) == [400, 200, 0]


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    assert allocate([100, 100, 100], [0.0, 1.0, 1.0], 150, maximum=0.8) == [80, 35, 35]


def test_what_rounding_leaves_over_goes_where_most_was_cut_off():
    assert allocate([10, 20, 15], [0.0] * 3, 22) == [5, 10, 7]  # of 4.89, 9.78 and 7.33
    assert allocate([4, 7], [0.0] * 2, 8, maximum=0.75) == [3, 5]
    assert allocate([4, 40], [0.0, 0.9], 7, maximum=0.75) == [3, 4]  # a group that is full takes none of it


def test_what_is_left_over_never_goes_to_a_group_that_is_full():
    """Beside an importance of 1e300 all others are as good as none, and shares are all rounding."""
    found = allocate([1, 4, 8, 6, 6], [1e300, 0.9, 0.9, 0.9, 0.25], 15, 1.0, 0.5, [0, 0, 8, 0, 0])
    assert found == [0, 2, 8, 3, 2]


def test_a_group_keeps_the_zeros_that_it_has_even_beyond_its_maximum():
    assert allocate([10, 10], [0.0, 0.0], 12, maximum=0.5, least=[9, 0]) == [9, 3]
    assert allocate([10, 10], [0.0, 1.0], 8, least=[0, 5]) == [3, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10], [math.nan], 5), "finite"),
        (([10], [-1.0], 5), "finite"),
        (([10, 10], [1.0, 0.0], 15, 1.0, 0.5), "at most can be"),
        (([10], [0.0], 5, 1.0, 1.0, [6]), "are zero already"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(PruneKitError, match=message):
        allocate(*arguments)


# --- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_of_zeros_is_exact_and_the_model_loads(family, scope, tiny, tmp_path):
    entry = sparsify(tiny(family), tmp_path / "out", sparsity=0.373, scope=scope)
    total = sum(math.prod(open_checkpoint(tiny(family)).tensors[name].shape) for name in entry["sparsity"]["tensors"])
    after = tensors_of(tmp_path / "out")
    zeros = sum(int((after[name] == 0).sum()) for name in entry["sparsity"]["tensors"])
    assert zeros == entry["sparsity"]["zeros"] == math.floor(0.373 * total + 0.5)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_keeps_its_bits_and_other_tensors_keep_all(family, tiny, tmp_path):
    chosen = sparsify(tiny(family), tmp_path / "out", sparsity=0.4)["sparsity"]["tensors"]
    before, after = tensors_of(tiny(family)), tensors_of(tmp_path / "out")
    for name, values in before.items():
        kept = after[name] != 0 if name in chosen else torch.ones_like(values, dtype=torch.bool)
        assert torch.equal(values[kept], after[name][kept]), name
    assert not [n for n in chosen if "embed" in n or "norm" in n or "lm_head" in n or n.endswith("mlp.gate.weight")]


def test_one_threshold_goes_through_all_and_leaves_what_equals_it(own, tmp_path):
    folder = own("llama")
    tensors = tensors_of(folder)
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][0, :3] = torch.tensor([0.25, -0.25, 0.2499])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    chosen = sparsify(folder, tmp_path / "out", threshold=0.25)["sparsity"]["tensors"]
    after = tensors_of(tmp_path / "out")
    assert after[name][0, :3].tolist() == [0.25, -0.25, 0.0]
    for name in chosen:
        assert torch.equal(after[name] == 0, tensors[name].abs() < 0.25)


def test_ties_of_equal_magnitudes_are_broken_to_the_exact_count(own, tmp_path):
    folder = own("llama")
    tensors = {name: torch.sign(v) if "proj" in name else v for name, v in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    entry = sparsify(folder, tmp_path / "out", sparsity=0.5)
    assert entry["sparsity"]["zeros"] * 2 == entry["sparsity"]["weights"]
    assert measure(open_checkpoint(tmp_path / "out"))["zeros"] == entry["sparsity"]["zeros"]


def test_a_second_pruning_keeps_the_zeros_of_the_first(tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "one", sparsity=0.3, modules="mlp")
    sparsify(tmp_path / "one", tmp_path / "two", sparsity=0.5)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all((two[name][one[name] == 0] == 0).all() for name in one)
    found = measure(open_checkpoint(tmp_path / "two"))
    assert found["zeros"] == round(0.5 * found["weights"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_two_of_four_neighbouring_inputs_are_kept(family, tiny, tmp_path):
    sparsify(tiny(family), tmp_path / "out", pattern=(2, 4))
    for name in choose_weights(open_checkpoint(tmp_path / "out")):
        values = tensors_of(tmp_path / "out")[name]
        groups = (values.T if family == "gpt2" else values).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all(), name


def test_groups_of_a_pattern_need_not_divide_by_what_goes(tiny, tmp_path):
    entry = sparsify(tiny("llama"), tmp_path / "out", pattern=(3, 4), modules="q_proj")
    assert entry["settings"]["pattern"] == "1:4" and entry["sparsity"]["sparsity"] == 0.75


def test_zeros_beyond_a_pattern_are_counted_and_those_of_before_are_not_removed(own, tmp_path):
    folder = own("llama")
    tensors, name = tensors_of(folder), "model.layers.2.mlp.up_proj.weight"
    tensors[name][0, :3] = 0  # of four
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    entry = sparsify(folder, tmp_path / "out", pattern=(2, 4), modules="mlp")
    after = tensors_of(tmp_path / "out")
    zeros = sum(int((after[name] == 0).sum()) for name in entry["sparsity"]["tensors"])
    assert entry["sparsity"]["zeros"] == zeros == entry["sparsity"]["weights"] // 2 + 1
    assert entry["removed"]["weights"] == zeros - 3
    assert entry["sparsity"]["of_all_parameters"] == zeros / entry["parameters"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_rows_every_output_loses_as_many_inputs(family, tiny, tmp_path):
    entry = sparsify(tiny(family), tmp_path / "out", sparsity=0.5, scope="row")
    for name in entry["sparsity"]["tensors"]:
        values = tensors_of(tmp_path / "out")[name]
        lost = ((values.T if family == "gpt2" else values) == 0).sum(1)
        assert int(lost.max() - lost.min()) <= 1, name


def test_scores_that_are_not_finite_are_refused_but_for_magnitudes(own, tiny):
    plan = plan_zeros(open_checkpoint(tiny("llama")), Wish(sparsity=0.5, score="wanda"))
    with pytest.raises(PruneKitError, match="its wanda scores aren't finite; try --dtype float32"):
        cut_zeros(plan, lambda name, values: values.abs() * math.nan)
    folder = own("llama")
    tensors = tensors_of(folder)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert cut_zeros(plan_zeros(open_checkpoint(folder), Wish(sparsity=0.5))).zeros


def test_bf16_shards_are_read_and_written_tensor_by_tensor(tiny, tmp_path):
    model = load(tiny("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    entry = sparsify(tmp_path / "in", tmp_path / "out", sparsity=0.5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = measure(open_checkpoint(tmp_path / "out"))
    assert found == entry["sparsity"] and found["zeros"] * 2 == found["weights"]
    assert load(tmp_path / "out").dtype == torch.bfloat16


# --- importance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("kind", sorted(weight_scores.IMPORTANCE))
def test_budgets_by_importance_meet_the_sparsity_exactly(kind, scope, tiny, tmp_path):
    checkpoint, model = open_checkpoint(tiny("llama")), load(tiny("llama"))
    importance = weight_scores.IMPORTANCE[kind](checkpoint, model, PADDED, choose_weights(checkpoint))
    assert set(importance) == {("text", layer) for layer in range(5)}
    entry = sparsify(tiny("llama"), tmp_path / "out", importance, sparsity=0.5, scope=scope)
    assert entry["sparsity"]["zeros"] * 2 == entry["sparsity"]["weights"]
    shares = {}
    for name, share in entry["sparsity"]["tensors"].items():
        shares.setdefault(int(name.split(".")[2]), []).append(share)
    order = sorted(shares, key=lambda layer: importance["text", layer])
    assert [max(shares[layer]) for layer in order] == sorted(map(max, shares.values()), reverse=True)


def test_layers_of_two_stacks_with_one_number_have_budgets_of_their_own(tiny, tmp_path):
    importance = {
        (stack, n): float(stack == "text") for stack, count in (("text", 5), ("vision", 6)) for n in range(count)
    }
    entry = sparsify(tiny("qwen3_vl"), tmp_path / "out", importance, sparsity=0.2, scope="layer")
    shares = entry["sparsity"]["tensors"]
    assert not any(share for name, share in shares.items() if "language_model" in name)
    assert all(share for name, share in shares.items() if "visual" in name)


def test_what_is_of_no_layer_is_as_important_as_layers_are_on_average(tiny, tmp_path):
    importance = {("text", n): 1.0 if n else 0.0 for n in range(5)}
    modules = r"lm_head\.weight|up_proj"
    entry = sparsify(tiny("qwen3"), tmp_path / "out", importance, sparsity=0.1, scope="layer", modules=modules)
    shares = entry["sparsity"]["tensors"]
    assert shares["lm_head.weight"] == pytest.approx(0.2 * shares["model.layers.0.mlp.up_proj.weight"], rel=0.01)


def test_zeros_of_a_tensor_stay_among_those_of_its_layers_budget(tiny, tmp_path):
    """Whose share for this tensor alone would be less than it has already."""
    sparsify(tiny("llama"), tmp_path / "one", sparsity=0.9, modules=r"layers\.2\.mlp\.up_proj")
    importance = dict.fromkeys([("text", n) for n in range(5)], 0.5)
    entry = sparsify(tmp_path / "one", tmp_path / "two", importance, sparsity=0.4, scope="layer")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all((two[name][one[name] == 0] == 0).all() for name in one)
    zeros = sum(int((two[name] == 0).sum()) for name in entry["sparsity"]["tensors"])
    assert zeros == entry["sparsity"]["zeros"] == round(0.4 * entry["sparsity"]["weights"])


def test_budgets_need_an_importance_of_each_layer(tiny):
    plan = plan_zeros(open_checkpoint(tiny("llama")), Wish(sparsity=0.5, scope="layer"))
    with pytest.raises(PruneKitError, match="no importance is known of text layer 3: scan it, too, give rows"):
        with_importance(plan, {("text", n): 0.5 for n in (0, 1, 2, 4)})
