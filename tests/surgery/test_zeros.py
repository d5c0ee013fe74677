"""sparsify.py and its library: counts exact to one weight, budgets that sum up, nothing else touched."""

import json
import math
import runpy

import pytest
import torch
from helpers.calibration import PADDED, padded_batch
from helpers.cuts import sparsify
from helpers.paths import ROOT
from helpers.tiny_models import FAMILIES, load, logits, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunekit.checkpoint import history, open_checkpoint
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.surgery import zeros_scores as weight_scores
from prunekit.surgery.zeros import allocate, cut_zeros, plan_zeros, with_importance
from prunekit.surgery.zeros_pick import find_cuts, sort_keys
from prunekit.surgery.zeros_weights import choose_weights, measure
from prunekit.surgery.zeros_wish import Wish, parse_pattern

DECODERS = ["llama", "qwen3_moe", "gemma3_text", "gpt2"]
ENCODERS = ["bert", "roberta", "camembert", "distilbert"]


# --- selection ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e-30, 3e38]), min_size=1, max_size=9), min_size=1),
    st.floats(0, 1),
)
def test_a_cut_takes_exactly_so_many_and_never_a_higher_score_than_it_leaves(values, share):
    parts = [torch.tensor(part) for part in values]
    keys = [(str(number), sort_keys(part, part)) for number, part in enumerate(parts)]
    count = math.floor(share * sum(map(len, parts)))
    cuts = find_cuts(lambda: keys, count)
    masks = [cuts[name].mask(key) for name, key in keys]
    taken, left = (
        torch.cat([p[m] for p, m in zip(parts, masks)]),
        torch.cat([p[~m] for p, m in zip(parts, masks)]),
    )
    assert len(taken) == count == sum(cut.count for cut in cuts.values())
    assert not len(taken) or not len(left) or taken.max() <= left.min()


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


@pytest.mark.parametrize(("text", "read"), [("2:4", (2, 4)), ("1:4", (3, 4)), ("6:8", (2, 8))])
def test_a_pattern_says_how_many_of_a_group_stay(text, read):
    assert parse_pattern(text) == read


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:4:8", "2-4", "a:b", ""])
def test_a_pattern_that_leaves_all_or_nothing_is_refused(text):
    with pytest.raises(PruneKitError, match=f"--pattern {text}: write it N:M"):
        parse_pattern(text)


@pytest.mark.parametrize(
    "wish",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"threshold": 0.0}, {"threshold": math.inf},
     {"sparsity": 0.5, "maximum": 0.0},
     {"sparsity": 0.5, "power": math.inf}],
)  # fmt: skip
def test_wishes_at_the_ends_of_their_ranges_are_refused(wish, tiny):
    with pytest.raises(PruneKitError, match="^--"):
        plan_zeros(open_checkpoint(tiny("llama")), Wish(**wish))


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


@pytest.mark.parametrize("turned", [False, True])
def test_inputs_of_stacked_experts_are_found_in_either_layout(turned, tiny, tmp_path):
    """Releases of transformers write (experts, outputs, inputs) or the two last the other way round."""
    single = tensors_of(tiny("qwen3_moe"))
    prefix = "model.layers.3.mlp.experts."
    experts = {name: single.pop(name) for name in list(single) if name.startswith(prefix)}
    # Three linears side by side: two of this model would be a square, which tells nothing
    parts = {"gate_up_proj": ("gate_proj", "up_proj", "up_proj"), "down_proj": ("down_proj",)}
    for stacked, linears in parts.items():
        rows = [torch.cat([experts[f"{prefix}{n}.{linear}.weight"] for linear in linears]) for n in range(4)]
        both = torch.stack(rows)
        single[prefix + stacked] = (both.mT if turned else both).contiguous()
    folder = tmp_path / "stacked"
    folder.mkdir()
    (folder / "config.json").write_text((tiny("qwen3_moe") / "config.json").read_text())
    save_file(single, folder / "model.safetensors", {"format": "pt"})
    chosen = choose_weights(open_checkpoint(folder), r"layers\.3\.mlp\.experts")
    assert {name.rpartition(".")[2]: weight.inputs for name, weight in chosen.items()} == dict.fromkeys(
        ("gate_up_proj", "down_proj"), -2 if turned else -1
    )


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


def test_experts_are_among_the_weights(tiny):
    assert sum(".experts." in name for name in choose_weights(open_checkpoint(tiny("qwen3_moe")))) > 3


@pytest.mark.parametrize(
    ("family", "modules", "expected"),
    [
        ("llama", "mlp|o_proj", {"gate_proj", "up_proj", "down_proj", "o_proj"}),
        ("qwen3_moe", r"\.gate\.", None),
        ("bert", "query", {"query"}),
        ("qwen3_vl", "visual", {"qkv", "proj", "linear_fc1", "linear_fc2"}),
        ("qwen3", r"lm_head\.weight", {"lm_head"}),
    ],
)
def test_modules_are_searched_in_projections_and_must_match_all_of_other_names(family, modules, expected, tiny):
    if expected is None:
        with pytest.raises(PruneKitError, match="matches no weight; they are named like model.layers"):
            choose_weights(open_checkpoint(tiny(family)), modules)
        return
    chosen = choose_weights(open_checkpoint(tiny(family)), modules)
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in chosen} == expected


# --- scores and importance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert"])
def test_wanda_is_weight_times_norm_of_its_input_without_padding(family, tiny):
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    weights = choose_weights(checkpoint)
    seen = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in weights:
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    norms = weight_scores.input_norms(checkpoint, model, PADDED, weights)
    masks = [PADDED.fit[0]["attention_mask"].bool(), PADDED.held_out[0]["attention_mask"].bool()]
    for name in weights:
        rows = torch.cat([x[m] for x, m in zip(seen[name.removesuffix(".weight")], masks)])
        assert torch.allclose(norms[name], rows.norm(dim=0), rtol=1e-4), name


def test_experts_norms_are_over_the_tokens_routed_to_them(tiny):
    checkpoint, model = open_checkpoint(tiny("qwen3_moe")), load(tiny("qwen3_moe"))
    weights = choose_weights(checkpoint, "experts")
    mlp, read = model.model.layers[3].mlp, {}
    mlp.experts.register_forward_pre_hook(lambda _, inputs: read.setdefault("all", []).append(inputs))
    data = Calibration([padded_batch()], [], 24)
    norms = weight_scores.input_norms(checkpoint, model, data, weights)
    states, chosen = read["all"][0][0], read["all"][0][1]
    for number in range(4):
        mine = states[(chosen == number).any(-1)]
        gate, up = (mine @ mlp.experts.gate_up_proj[number].T).chunk(2, -1)
        hidden = mlp.experts.act_fn(gate) * up
        prefix = f"model.layers.3.mlp.experts.{number}"
        assert torch.allclose(norms[f"{prefix}.gate_proj.weight"], mine.norm(dim=0), rtol=1e-4)
        assert torch.allclose(norms[f"{prefix}.down_proj.weight"], hidden.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_norms_are_those_of_the_next_tokens_loss(family, tiny):
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    weights = choose_weights(checkpoint, r"\.3\.")
    data = Calibration([padded_batch()], [], 24)
    norms = weight_scores.gradient_norms(checkpoint, model, data, weights)
    model.requires_grad_(True)
    model(**{key: data.fit[0][key] for key in ("input_ids", "attention_mask", "labels")}).loss.backward()
    found = dict(model.named_parameters())
    for name in weights:
        if ".experts." not in name:
            assert torch.allclose(norms[name], found[name].grad.abs(), rtol=1e-3, atol=1e-6), name
        elif "gate_proj" in name:
            number = int(name.split(".experts.")[1][0])
            expected = found["model.layers.3.mlp.experts.gate_up_proj"].grad[number, :16].abs()
            assert torch.allclose(norms[name], expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("score", ["wanda", "gradient"])
def test_weights_that_the_data_do_not_reach_are_refused(score, tiny):
    checkpoint, model = open_checkpoint(tiny("qwen3_vl")), load(tiny("qwen3_vl"))
    with pytest.raises(PruneKitError, match="model.visual.blocks.*leave it out with --modules"):
        weight_scores.SCORES_OF[score](checkpoint, model, PADDED, choose_weights(checkpoint))


def test_gradients_of_an_encoder_are_refused(tiny):
    checkpoint = open_checkpoint(tiny("bert"))
    with pytest.raises(PruneKitError, match="causal language model's loss, which bert has not"):
        weight_scores.gradient(checkpoint, None, PADDED, choose_weights(checkpoint))


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("kind", ["activation", "gradient"])
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
    with pytest.raises(PruneKitError, match="no importance is known of text layer 3"):
        with_importance(plan, {("text", n): 0.5 for n in (0, 1, 2, 4)})


# --- the script -----------------------------------------------------------------------------------------------


def test_the_script_writes_a_checkpoint_and_its_story(script, tiny, tmp_path):
    done = script("sparsify.py", "--model", tiny("camembert"), "--out", tmp_path / "out", "--sparsity", 0.15)
    assert done.returncode == 0, done.stderr
    assert "15.00%" in done.stdout and "save neither space nor time" in done.stdout
    [entry] = history(tmp_path / "out")
    assert entry["settings"]["sparsity"] == 0.15 and entry["removed"]["weights"] == entry["sparsity"]["zeros"]
    assert load(tmp_path / "out").num_parameters() == entry["parameters"]


def test_a_dry_run_writes_nothing(script, tiny, tmp_path):
    done = script("sparsify.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--pattern", "2:4", "--dry-run")
    assert done.returncode == 0 and "50.00%" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --sparsity, --threshold and --pattern"),
        (["--sparsity", "0.5", "--threshold", "1"], "one of --sparsity, --threshold and --pattern"),
        (["--sparsity", "1.5"], "--sparsity 1.5: a share"),
        (["--sparsity", "nan"], "--sparsity: 'nan' is no number"),
        (["--threshold", "-1"], "--threshold -1.0: a positive number"),
        (["--pattern", "4:2"], "--pattern 4:2: write it N:M"),
        (["--pattern", "3:5"], "don't divide into groups of 5"),
        (["--sparsity", "0.5", "--modules", "nothing"], "--modules 'nothing': matches no weight"),
        (["--sparsity", "0.5", "--modules", "("], "not a regular expression"),
        (["--sparsity", "0.5", "--score", "wanda"], "needs data: --calib"),
        (["--sparsity", "0.5", "--calib", "x.jsonl"], "need no data; leave it out"),
        (["--sparsity", "0.5", "--layer-importance", "knockout"], "need each other"),
        (
            ["--sparsity", "0.5", "--layer-importance", "knockout", "--ranking", "absent"],
            "can't be read as JSON",
        ),
        (["--threshold", "1", "--scope", "row"], "--scope says how a --sparsity is shared out"),
        (
            ["--sparsity", "0.5", "--scope", "global", "--layer-importance", "gradient", "--calib", "x"],
            "--scope layer",
        ),
        (["--sparsity", "0.5", "--score", "wanda", "--calib", "absent.jsonl"], "absent.jsonl is not there"),
        (["--sparsity", "0.5", "--power", "0"], "--power 0.0: a positive number"),
        (["--sparsity", "0.5", "--max-sparsity", "2"], "--max-sparsity 2.0: a share"),
    ],
)
def test_bad_wishes_are_one_line_and_exit_2(arguments, message, tiny, tmp_path, monkeypatch, capsys):
    command = ["sparsify.py", "--model", str(tiny("llama")), "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "sparsify.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_less_than_what_is_zero_already_is_refused(script, tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "one", sparsity=0.5)
    done = script("sparsify.py", "--model", tmp_path / "one", "--out", tmp_path / "two", "--sparsity", 0.4)
    assert done.returncode == 2 and "50.00% are zero already" in done.stderr and not (tmp_path / "two").exists()


def test_pictures_of_zeros_are_drawn_from_the_history(script, tiny, tmp_path):
    sparsify(tiny("qwen3_vl"), tmp_path / "out", sparsity=0.5)
    events = [{"sparsity": s, "before": 2.0, "after": 3.0, "retrained": 2.2} for s in (0.3, 0.6)]
    (tmp_path / "out/sparsity.json").write_text(json.dumps({"metric": "loss", "events": events}))
    done = script("prunekit.report", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name in ("sparsity.png", "quality.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
