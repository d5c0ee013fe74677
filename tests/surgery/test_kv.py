"""Merging KV heads: exact where heads are equal, and nothing else is touched."""

import json

import pytest
import torch
from helpers.kv_heads import SHARED
from helpers.tiny_models import build, head_dim_of, load, logits, text_config
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.surgery.cut import write_cut
from prunekit.surgery.kv import cut_kv, merge_heads, plan_kv

PROJECTIONS = (".self_attn.k_proj.", ".self_attn.v_proj.")


def cut(folder, out, kv_heads, method="mean"):
    return write_cut(cut_kv(plan_kv(open_checkpoint(folder), kv_heads, method)), out)


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("family", SHARED)
def test_merging_equal_heads_keeps_the_output(family, method, tmp_path):
    model = build(family)
    head_dim = head_dim_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(p in name for p in PROJECTIONS):
                heads = parameter.view(-1, head_dim, *parameter.shape[1:])
                heads.copy_(heads[: len(heads) // 2].repeat_interleave(2, dim=0))
    model.save_pretrained(tmp_path / "in")
    cut(tmp_path / "in", tmp_path / "out", text_config(model).num_key_value_heads // 2, method)
    assert torch.allclose(logits(load(tmp_path / "out")), logits(model), atol=1e-5)


@pytest.mark.parametrize("family", SHARED)
def test_one_head_is_left_and_loads(family, tiny, tmp_path):
    cut(tiny(family), tmp_path / "out", 1)
    model = load(tmp_path / "out")
    assert text_config(model).num_key_value_heads == 1
    assert torch.isfinite(logits(model)).all()
    assert statistics(tmp_path / "out")["parameters"] == model.num_parameters()


@pytest.mark.parametrize("family", SHARED)
def test_other_tensors_keep_their_bytes(family, tiny, tmp_path):
    cut(tiny(family), tmp_path / "out", 1)
    before, after = (
        load_file(tiny(family) / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(p in name for p in PROJECTIONS)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_each_group_is_taken_in_fp32_and_rounded_once(dtype, own, tmp_path):
    folder, name = own("qwen3"), "model.layers.0.self_attn.v_proj.weight"
    tensors = {key: value.to(dtype) for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cut(folder, tmp_path / "out", 2)
    heads = tensors[name].to(torch.promote_types(dtype, torch.float32)).view(2, 2, 16, 32)
    expected = ((heads[:, 0] + heads[:, 1]) / 2).to(dtype).view(32, 32)
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], expected)


def test_first_keeps_the_first_head_of_each_group():
    bias = torch.arange(8.0)
    assert merge_heads(bias, 2, 2, "first").tolist() == [0, 1, 4, 5]


def test_biases_are_merged_with_their_heads(tiny, tmp_path):
    cut(tiny("qwen2"), tmp_path / "out", 2)
    name = "model.layers.0.self_attn.k_proj.bias"
    before, after = (
        load_file(tiny("qwen2") / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert torch.allclose(after[name], before[name].view(2, 2, -1).mean(1).flatten())


def test_weights_in_bf16_stay_in_bf16(tmp_path):
    build("qwen3_vl").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    cut(tmp_path / "in", tmp_path / "out", 2)
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}


def test_a_sharded_checkpoint_stays_sharded(tiny, tmp_path):
    folder = tiny("qwen3", max_shard_size="50KB")
    cut(folder, tmp_path / "out", 1)
    count = len(list(folder.glob("*.safetensors")))
    assert count > 1 and len(list((tmp_path / "out").glob("*.safetensors"))) == count
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize(
    "family, kv_heads, message",
    [
        ("qwen3", 3, r"--kv-heads 3: the model has 4 KV heads; choose one of 1, 2$"),
        ("qwen3", 8, "choose one of 1, 2"),
        ("qwen3", 0, "choose one of 1, 2"),
        ("qwen3", -1, "choose one of 1, 2"),
        ("qwen3", 4, "has 4 already; nothing to merge"),
        ("gpt2", 1, "gpt2: has no form with fewer KV heads"),
        ("bert", 1, "bert: has no form with fewer KV heads"),
    ],
)
def test_impossible_merges_are_refused(family, kv_heads, message, tiny):
    with pytest.raises(PruneKitError, match=message):
        plan_kv(open_checkpoint(tiny(family)), kv_heads)


def test_a_config_that_contradicts_the_weights_is_refused(own):
    folder = own("qwen3")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 8}))
    with pytest.raises(
        PruneKitError,
        match=r"k_proj.weight is \[64, 32\], by config.json \(num_key_value_heads, head_dim\) it would be \[32",
    ):
        plan_kv(open_checkpoint(folder), 2)


def test_a_method_that_there_is_not_is_refused(tiny):
    with pytest.raises(PruneKitError, match="--method median: choose one of mean, first, calibrated"):
        plan_kv(open_checkpoint(tiny("qwen3")), 2, "median")


NAME = "model.layers.3.self_attn.k_proj"


@pytest.mark.parametrize(
    "name, value, message",
    [
        (f"{NAME}.bias", torch.zeros(7), rf"{NAME}.bias: F32 \[7\], where 4 KV heads of 8 have 32"),
        (f"{NAME}.weight", torch.zeros(32, 32, dtype=torch.int8), rf"{NAME}.weight: I8 .* floating-point rows"),
        (f"{NAME}.weight", None, r"not every text layer has self_attn.k_proj and self_attn.v_proj"),
    ],
)
def test_projections_that_cannot_be_merged_are_refused(name, value, message, own):
    folder = own("qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneKitError, match=message):
        plan_kv(open_checkpoint(folder), 2)


def test_kv_heads_written_twice_change_together(own, tmp_path):
    folder = own("qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    again = {key: config["text_config"][key] for key in ("num_hidden_layers", "num_key_value_heads")}
    (folder / "config.json").write_text(json.dumps(config | again))
    cut(folder, tmp_path / "out", 1)
    config = open_checkpoint(tmp_path / "out").config
    assert (config["num_key_value_heads"], config["text_config"]["num_key_value_heads"]) == (1, 1)


def test_the_account_says_how_many_heads_went_and_by_which_method(tiny):
    account = cut_kv(plan_kv(open_checkpoint(tiny("qwen3")), 1, "first")).account()
    assert (account.removed, account.settings) == ({"kv_heads": 3}, {"kv_heads": 1, "method": "first"})
