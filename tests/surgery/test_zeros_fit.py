"""--refit of sparsify.py: what stays makes up for what went, zeros stay where they are, nothing else is touched."""

import math
import re
import shutil

import pytest
import torch
from helpers.calibration import PADDED, padded_batch, picture_batches
from helpers.paths import EMBEDDED
from helpers.tiny_models import load, logits, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunekit.checkpoint import history, open_checkpoint
from prunekit.data.batches import Calibration, calibrate
from prunekit.errors import PruneKitError
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.surgery import zeros_fit as sparse_fit
from prunekit.surgery.cut import write_cut
from prunekit.surgery.zeros import cut_zeros, plan_zeros
from prunekit.surgery.zeros_fit import fit_rows, refit
from prunekit.surgery.zeros_wish import Wish

FAMILIES = ["llama", "qwen3_moe", "gemma3_text", "gpt2", "qwen2", "bert", "distilbert"]


def moments(values):
    return (values.T @ values,) * 2


def refitted(folder, out, data=PADDED, **wish):
    cut = cut_zeros(plan_zeros(open_checkpoint(folder), Wish(**wish)))
    model = load(folder)
    cut = refit(cut, model, data, quiet=True)
    write_cut(cut, out)
    return model, cut.metrics


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_become_the_least_squares_of_the_weights_that_stay():
    torch.manual_seed(0)
    values, weight = torch.randn(50, 8, dtype=torch.double), torch.randn(5, 8, dtype=torch.double)
    kept = torch.rand(5, 8) < 0.6
    found = fit_rows(weight, kept, moments(values), moments(values))
    for row in range(5):
        exact = torch.linalg.lstsq(values[:, kept[row]], values @ weight[row]).solution
        assert torch.allclose(found[row, kept[row]], exact, atol=1e-8)
    assert not found[~kept].any()


def test_what_goes_is_made_up_for_exactly_where_what_stays_can_write_it():
    torch.manual_seed(0)
    half = torch.randn(30, 4)
    values = torch.cat([half, half @ torch.randn(4, 4)], 1)
    weight = torch.randn(6, 8)
    kept = torch.tensor([True] * 4 + [False] * 4).expand(6, 8)
    found = fit_rows(weight, kept, moments(values), moments(values))
    assert torch.allclose(values @ found.T, values @ weight.T, atol=1e-4)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8), st.integers(0, 1000))
def test_no_row_is_farther_from_what_is_wanted_on_the_judging_rows_than_zeros_alone(fits, judges, gone, seed):
    torch.manual_seed(seed)
    fit, judge = torch.randn(fits, 8), torch.randn(judges, 8) * torch.randint(0, 2, (8,))
    weight, kept = torch.randn(5, 8), torch.rand(5, 8).argsort(1) >= gone
    found = fit_rows(weight, kept, moments(fit), moments(judge))

    def missing(rows):
        return ((rows - weight) @ judge.T).square().sum(1)

    assert torch.isfinite(found).all() and not found[~kept].any()
    assert (missing(found) <= missing(weight * kept) * 1.001 + 1e-4).all()


def test_rows_are_fitted_to_what_they_write_of_other_values_than_they_read():
    torch.manual_seed(0)
    values, wanted = torch.randn(2, 50, 8, dtype=torch.double)
    weight, kept = torch.randn(5, 8, dtype=torch.double), torch.rand(5, 8) < 0.6
    gathered = sparse_fit.Moments()
    for part in range(0, 50, 10):
        gathered.add(values[part : part + 10], wanted[part : part + 10], None)
    found = fit_rows(weight, kept, gathered.of(None), gathered.of(None))
    for row in range(5):
        exact = torch.linalg.lstsq(values[:, kept[row]], wanted @ weight[row]).solution
        assert torch.allclose(found[row, kept[row]], exact, atol=1e-6)


def test_of_all_steps_the_one_that_leaves_least_where_it_is_judged_is_taken():
    torch.manual_seed(0)
    fit, (own, wanted) = moments(torch.randn(9, 8)), moments(torch.randn(9, 8))
    weight, kept = torch.randn(20, 8), torch.rand(20, 8) < 0.5

    def missing(rows):
        return ((rows @ own - 2 * weight @ wanted) * rows).sum(1)

    every = torch.stack([fit_rows(weight, kept, fit, fit, steps) for steps in range(9)])
    left = torch.stack([missing(rows) for rows in every])
    assert len(set(left.argmin(0).tolist())) > 2, "rows differ in their best step"
    assert torch.allclose(missing(fit_rows(weight, kept, fit, (own, wanted), 8)), left.min(0).values, atol=1e-3)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_are_zero_as_without_and_other_tensors_keep_their_bits(family, tiny, tmp_path):
    wish = {"sparsity": 0.6, "scope": "row"}
    write_cut(cut_zeros(plan_zeros(open_checkpoint(tiny(family)), Wish(**wish))), tmp_path / "zeros")
    refitted(tiny(family), tmp_path / "out", **wish)
    chosen = history(tmp_path / "out")[-1]["sparsity"]["tensors"]
    dense, zeros, after = (
        tensors_of(tiny(family)),
        tensors_of(tmp_path / "zeros"),
        tensors_of(tmp_path / "out"),
    )
    changed = [name for name in chosen if not torch.equal(after[name], zeros[name])]
    assert changed and all(torch.equal(after[name] == 0, zeros[name] == 0) for name in chosen)
    assert all(torch.equal(after[name], dense[name]) for name in dense if name not in chosen)


def test_weights_that_sixteen_bits_would_round_to_zero_stay(tiny, tmp_path):
    model = load(tiny("llama"))
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e-5)
    model.half().save_pretrained(tmp_path / "half")
    refitted(tmp_path / "half", tmp_path / "out", sparsity=0.5, scope="row")
    [entry] = history(tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    found = {name: float((after[name] == 0).float().mean()) for name in entry["sparsity"]["tensors"]}
    assert found == pytest.approx(entry["sparsity"]["tensors"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_in_memory_becomes_the_checkpoint_written(family, tiny, tmp_path):
    model, losses = refitted(tiny(family), tmp_path / "out", sparsity=0.5)
    written = load(tmp_path / "out")
    assert torch.allclose(logits(written), logits(model), atol=1e-5)
    if losses:
        assert math.isclose(score_batches(written, PADDED.held_out)["loss"], losses["held_out_loss"], rel_tol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_each_matrix_is_fitted_on_what_it_reads_in_the_model_that_comes_out(family, tiny, tmp_path, monkeypatch):
    """All before it is refitted; it is fitted to what that and the dense model read, a quarter of the way to this."""
    seen, moments_of = {}, sparse_fit.Layer.moments

    def keep(layer, turn):
        found = moments_of(layer, turn)
        name = next(n for n, module in layer.sides.model.named_modules() if module is layer.readers.get(turn))
        seen[name] = found
        return found

    monkeypatch.setattr(sparse_fit.Layer, "moments", keep)
    data = Calibration([padded_batch(20), padded_batch(12, 3)], [padded_batch(17, 2)], 100)
    sparse, _ = refitted(tiny(family), tmp_path / "out", data, sparsity=0.5)
    assert len(seen) == 5 * 4
    for part, batches in enumerate((data.fit, data.held_out)):
        read = {}
        for which, model in (("sparse", sparse), ("dense", load(tiny(family)))):
            for name in seen:
                kept = read[which, name] = []
                model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
            for each in batches:
                model(**{key: each[key] for key in ("input_ids", "attention_mask")})
        masks = [each["attention_mask"].bool() for each in batches]
        for name, found in seen.items():
            ours, dense = (
                torch.cat([x[mask] for x, mask in zip(read[which, name], masks)]) for which in ("sparse", "dense")
            )
            own, wanted = found[part].of(None)
            assert torch.allclose(own, ours.T @ ours, rtol=1e-3, atol=1e-3 * float(own.abs().max())), name
            expected = (0.75 * ours + 0.25 * dense).T @ ours
            assert torch.allclose(wanted, expected, rtol=1e-3, atol=1e-3 * float(own.abs().max())), name
        sparse = load(tmp_path / "out")


def test_towers_are_refitted_before_the_layers_that_read_what_they_give(tiny, tmp_path, monkeypatch):
    order, begin = [], sparse_fit.Layer.__init__
    monkeypatch.setattr(
        sparse_fit.Layer,
        "__init__",
        lambda self, sides, *rest: order.append(sides.stack) or begin(self, sides, *rest),
    )
    data = Calibration(picture_batches(2, 0), picture_batches(1, 1), 100)
    refitted(tiny("qwen3_vl"), tmp_path / "out", data, sparsity=0.5)
    assert order == ["vision"] * 6 + ["text"] * 5


def test_what_is_of_no_layer_has_its_zeros_while_layers_are_judged(tiny, tmp_path):
    model, losses = refitted(tiny("qwen3"), tmp_path / "out", sparsity=0.5, modules=r"lm_head\.weight|up_proj")
    assert float((model.lm_head.weight == 0).float().mean()) > 0.2
    assert score_batches(load(tmp_path / "out"), PADDED.held_out)["loss"] == pytest.approx(
        losses["held_out_loss"], rel=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refitted_model_is_nearer_to_the_dense_one(family, tiny, tmp_path):
    many = [padded_batch(20), padded_batch(23, 3), padded_batch(17, 2)]
    data = Calibration(many, many[:1], 100)
    write_cut(cut_zeros(plan_zeros(open_checkpoint(tiny(family)), Wish(sparsity=0.5))), tmp_path / "zeros")
    refitted(tiny(family), tmp_path / "out", data, sparsity=0.5)
    ids = {key: many[1][key] for key in ("input_ids", "attention_mask")}
    dense, zeros, after = (
        load(folder)(**ids)[0][ids["attention_mask"].bool()]
        for folder in (tiny(family), tmp_path / "zeros", tmp_path / "out")
    )
    assert (after - dense).norm() < 0.8 * (zeros - dense).norm()


def test_stacked_experts_are_fitted_as_single_ones(tiny, tmp_path):
    """The same experts, in a checkpoint that keeps each and in one that keeps all in one tensor."""
    single, stacked = tensors_of(tiny("qwen3_moe")), {}
    prefix = "model.layers.3.mlp.experts."
    layer = {name: single.pop(name) for name in list(single) if name.startswith(prefix)}

    def all_of(linear):
        return torch.stack([layer[f"{prefix}{n}.{linear}.weight"] for n in range(4)])

    stacked[f"{prefix}gate_up_proj"] = torch.cat([all_of("gate_proj"), all_of("up_proj")], 1)
    stacked[f"{prefix}down_proj"] = all_of("down_proj")
    folder = tmp_path / "stacked"
    shutil.copytree(tiny("qwen3_moe"), folder)
    save_file(single | stacked, folder / "model.safetensors", {"format": "pt"})
    wish = {"sparsity": 0.5, "scope": "row", "modules": r"\.3\.mlp\.experts"}
    refitted(tiny("qwen3_moe"), tmp_path / "one", **wish)
    refitted(folder, tmp_path / "two", **wish)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert torch.allclose(logits(one), logits(two), atol=1e-5)


def test_activations_that_are_not_finite_are_refused(tiny):
    model = load(tiny("llama"))
    model.model.layers[2].mlp.up_proj.weight.data.fill_(float("inf"))
    cut = cut_zeros(plan_zeros(open_checkpoint(tiny("llama")), Wish(sparsity=0.5)))
    with pytest.raises(PruneKitError, match="layer 2 reads what isn't finite; try --dtype float32"):
        refit(cut, model, PADDED, quiet=True)


def test_a_tower_that_no_row_reaches_is_refused(tiny):
    cut = cut_zeros(plan_zeros(open_checkpoint(tiny("qwen3_vl")), Wish(sparsity=0.5)))
    with pytest.raises(PruneKitError, match="too few calibration rows reach the vision layers"):
        refit(cut, load(tiny("qwen3_vl")), PADDED, quiet=True)


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
def test_the_script_refits_text_and_vision_and_records_what_was_gained(tmp_path, script):
    done = script("examples/tiny_ocr/tiny_ocr.py", "data", "--out", tmp_path / "data", "--share", 0.1)
    assert done.returncode == 0, done.stderr
    rows = tmp_path / "data" / "train.jsonl"
    wish = ["--model", EMBEDDED, "--sparsity", 0.5, "--scope", "layer"]
    done = script("sparsify.py", *wish, "--out", tmp_path / "out", "--refit", "--calib", rows, "--calib-tokens", 4000)
    assert done.returncode == 0, done.stderr
    assert re.search(r"refitted: held-out loss \d+\.\d+ -> \d+\.\d+\n", done.stdout)
    (entry,) = history(tmp_path / "out")
    assert entry["settings"]["refit"] is True
    assert script("sparsify.py", *wish, "--out", tmp_path / "zeros").returncode == 0
    checkpoint = open_checkpoint(tmp_path / "zeros")
    model = load_model(checkpoint)
    zeros = score_batches(model, calibrate(model, checkpoint, rows, 4000).held_out)["loss"]
    found = entry["metrics"]
    assert found["held_out_loss"] - found["held_out_loss_dense"] < 0.5 * (zeros - found["held_out_loss_dense"])


def test_refitting_without_data_is_one_line_and_exit_2(tiny, tmp_path, script_here):
    done = script_here("sparsify.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--sparsity", 0.5, "--refit")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs data: --calib" in done.stderr
    assert not (tmp_path / "out").exists()
