"""Models whose layers attend fully or linearly: their pattern stays true, and layers that only draft stay or go."""

import json

import pytest
import torch
from helpers.calibration import data
from helpers.cuts import cut_width, first_experts
from helpers.tiny_models import load, logits
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.surgery.cut import write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.kv_fit import fit_kv
from prunekit.surgery.kv_math import pairing, shared_dimensions
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.zeros_weights import choose_weights
from prunekit.training.publish import publish

FULL, LINEAR = "full_attention", "linear_attention"


def text_config_of(folder):
    return json.loads((folder / "config.json").read_text())["text_config"]


@pytest.fixture
def drafting(own):
    """drafting(): the tiny Qwen3.5 with tensors of a layer that predicts the token after the next, as Qwen's have."""

    def folder(family="qwen3_5"):
        path = own(family)
        tensors = load_file(path / "model.safetensors")
        names = [name for name in tensors if ".language_model.layers.2." in name]
        drafts = {f"mtp.layers.0.{name.partition('.layers.2.')[2]}": tensors[name].clone() for name in names}
        save_file(
            tensors | drafts | {"mtp.fc.weight": torch.ones(32, 64)}, path / "model.safetensors", {"format": "pt"}
        )
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["mtp_num_hidden_layers"] = 1
        (path / "config.json").write_text(json.dumps(config))
        return path

    return folder


def drafts_of(folder):
    names = [name for name in open_checkpoint(folder).tensors if name.startswith("mtp.")]
    return len(names), text_config_of(folder)["mtp_num_hidden_layers"]


@pytest.mark.parametrize(
    "gone, types, every",
    [
        ([3, 4], [LINEAR, LINEAR, FULL], 3),
        ([1, 3], [LINEAR, FULL, LINEAR], 2),
        ([0], [LINEAR, FULL, LINEAR, LINEAR], None),
    ],
)
def test_the_interval_of_full_attention_is_that_of_the_layers_left_or_not_said(gone, types, every, own):
    folder = own("qwen3_5")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"full_attention_interval": 3, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_layers(open_checkpoint(folder), text=gone)
    text = plan.result.config["text_config"]
    assert (text["layer_types"], text.get("full_attention_interval")) == (types, every)
    assert any("llama.cpp" in note for note in plan.notes) == (every is None)


def test_one_layer_of_full_attention_has_to_stay(tiny):
    checkpoint = open_checkpoint(tiny("qwen3_5"))
    with pytest.raises(PruneKitError, match=r"--text: names all 2 layers of full attention \(2, 4\); leave at least"):
        plan_layers(checkpoint, text=[1, 2, 4])
    assert plan_layers(checkpoint, text=[0, 1, 3]).result.config["text_config"]["layer_types"] == [FULL, FULL]


def test_only_layers_of_full_attention_have_a_cache_that_grows(tiny):
    assert statistics(tiny("qwen3_5"))["kv_bytes_per_token"] == 2 * 2 * 4 * 16 * 2


def test_a_model_that_lost_layers_goes_on_with_its_caches_as_without(tiny, tmp_path):
    write_cut(cut_layers(plan_layers(open_checkpoint(tiny("qwen3_5")), text=[0, 2])), tmp_path / "out")
    model, prompt = load(tmp_path / "out"), torch.tensor([[7, 30, 11, 52, 9]])
    cached, whole = (model.generate(prompt, max_new_tokens=8, min_new_tokens=8, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


def test_zeros_are_chosen_of_linear_attention_and_shared_experts_too(tiny):
    chosen = {name.partition(".layers.0.")[2] for name in choose_weights(open_checkpoint(tiny("qwen3_5_moe")))}
    linear = {f"linear_attn.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
    shared = {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert linear | shared <= chosen
    assert not any("gate.weight" in name or "in_proj_a" in name for name in chosen)


# --- layers that draft ------------------------------------------------------------------------------------------------


def test_drafting_layers_stay_where_no_shape_changes(drafting, tmp_path):
    folder = drafting()
    plan = plan_layers(open_checkpoint(folder), text=[1])
    write_cut(cut_layers(plan), tmp_path / "out")
    assert drafts_of(tmp_path / "out") == drafts_of(folder) != (0, 0)
    assert any("MTP" in note for note in plan.notes)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize("kind", ["kv", "calibrated", "heads", "neurons", "experts"])
def test_drafting_layers_go_where_shapes_change(kind, drafting, tmp_path):
    folder = drafting("qwen3_5_moe" if kind == "experts" else "qwen3_5")
    if kind in ("kv", "calibrated"):
        plan = plan_kv(open_checkpoint(folder), 2, "mean" if kind == "kv" else kind)
        assert len(plan.notes) == 1 and "MTP" in plan.notes[0]
        cut = cut_kv(plan) if kind == "kv" else fit_kv(plan, load(folder), data(2, 1), quiet=True)
        write_cut(cut, tmp_path / "out")
    elif kind == "experts":
        cut = first_experts(folder, 3)
        assert "MTP" in cut.plan.notes[0]
        write_cut(cut, tmp_path / "out")
    else:
        cut_width(folder, tmp_path / "out", **({"heads_kept": 4} if kind == "heads" else {"neurons": 24}))
    assert drafts_of(tmp_path / "out") == (0, 0)
    load(tmp_path / "out")


def test_what_was_trained_without_its_drafting_layers_says_so(drafting, tiny, tmp_path):
    folder = drafting()
    publish(tiny("qwen3_5"), tmp_path / "out", folder, "sft")
    assert drafts_of(tmp_path / "out") == (0, 0)


# --- what heads can share ---------------------------------------------------------------------------------------------


def test_dimensions_that_rope_passes_on_are_pairs_behind_those_that_it_rotates():
    assert pairing(8, 8).tolist() == list(range(8))
    order = pairing(4, 12)
    pairs = list(zip(order[:6].tolist(), order[6:].tolist()))
    assert pairs == [(0, 2), (1, 3), (4, 8), (5, 9), (6, 10), (7, 11)]


def test_values_in_front_of_gates_are_shared_without_loss_where_they_are_alike_but_for_order_and_size():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 3, 8, generator=generator).double()
    orders = [torch.randperm(8, generator=generator) for _ in range(3)]
    for head in (1, 2):
        values[:, head] = (values[:, 0] * torch.linspace(-2, 3, 8))[:, orders[head]]
    covariance = torch.einsum("thi,tkj->hikj", values, values) / 500
    encode, decode, follow, lost = shared_dimensions(covariance, torch.rand(3, 8, generator=generator).double() + 0.1)
    assert float(lost) == pytest.approx(0, abs=1e-9)
    shared = values.flatten(1) @ encode.T
    for head in range(3):
        torch.testing.assert_close(shared @ decode[head].T, values[:, head])
        assert torch.equal(decode[head].T != 0, follow[head] != 0)
    assert (follow.sum(1) == 1).all() and (follow.sum(2) == 1).all()
