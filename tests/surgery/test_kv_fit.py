"""Calibrated merging of KV heads: exact where heads are one and the same but for what folds away."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from helpers.calibration import data, self_labelled, text_batches
from helpers.kv_heads import SHARED, alike, moments_of
from helpers.tiny_models import KV4, TEXT, build, head_dim_of, load, logits, text_config

from prunekit.checkpoint import Heads, history, open_checkpoint, scratch_folder
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
from prunekit.surgery.kv_merge import Attention, merge_layer
from prunekit.surgery.sides import Sides

NORMED = [name for name in SHARED if name.startswith(("qwen3", "gemma3"))]
PLAIN = [name for name in SHARED if name not in NORMED]


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5"])
def test_the_merged_model_is_nearer_to_the_original_than_the_averaged_one(family, tiny, tmp_path):
    calibration = self_labelled(build(family), data())
    cut, _ = merge(tiny(family), 1, calibration)
    write_cut(cut, tmp_path / "calibrated")
    write_cut(cut_kv(plan_kv(open_checkpoint(tiny(family)), 1, "mean")), tmp_path / "mean")
    base = logits(load(tiny(family)))
    far = {name: float((logits(load(tmp_path / name)) - base).square().mean()) for name in ("calibrated", "mean")}
    assert far["calibrated"] < 0.7 * far["mean"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_5"])
def test_the_cache_has_one_head_and_generation_is_the_same_with_it(family, tiny, tmp_path):
    cut, _ = merge(tiny(family), 1)
    write_cut(cut, tmp_path / "out")
    model = load(tmp_path / "out")
    prompt = torch.tensor([[7, 30, 11, 52, 9]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    cache = model(prompt, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers if hasattr(layer, "keys")} == {1}


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
        assert all(torch.equal(one, two) for one, two in zip(kept, tried[0 if better else 1 :: 2], strict=True))


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


def test_the_history_says_method_and_tokens_and_the_card_the_loss(tmp_path, tiny):
    calibration = data()
    cut, _ = merge(tiny("qwen3"), 2, calibration)
    write_cut(cut, tmp_path / "out")
    settings = history(tmp_path / "out")[-1]["settings"]
    assert settings["method"] == "calibrated" and settings["calibration_tokens"] == calibration.tokens
    assert f"| held_out_loss {cut.metrics['held_out_loss']:.4g} |" in (tmp_path / "out" / "README.md").read_text()
