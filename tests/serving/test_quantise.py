"""What is quantised, what stays, and what becomes of it in a folder."""

import json
import re
import sys

import pytest
import torch
from helpers.quantised import write_fp8
from safetensors.torch import load_file, save_file

from prunekit import quantise as command
from prunekit.checkpoint import INDEX, Tensor, history, new_folder, open_checkpoint, read_header
from prunekit.errors import PruneKitError
from prunekit.serving.lines import serving_lines
from prunekit.serving.memory import fits
from prunekit.serving.quantise import plan_quantise, publish_quantised


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantise", *map(str, arguments)])
        command.main()


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "qwen2_vl", "qwen3_moe", "qwen3_5", "gemma3_text"])
def test_every_weight_is_a_projection_of_a_text_layer_or_named_as_one_that_stays(family, tiny):
    checkpoint = open_checkpoint(tiny(family))
    if family == "qwen3_5":  # as Qwen's own folders have
        draft, norm = Tensor("F32", (32, 64), tiny(family), 0), Tensor("F32", (32,), tiny(family), 0)
        checkpoint.tensors.update({"mtp.fc.weight": draft, "mtp.pre_fc_norm_hidden.weight": norm})
    plan = plan_quantise(checkpoint, "fp8")
    of_layers = re.compile(r".*layers\.\d+\.(?:self_attn|linear_attn|mlp)\..*_proj(?:_qkv|_z)?")
    assert all(of_layers.fullmatch(name) and "visual" not in name for name in plan.modules)
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if module != name and not module.endswith("norm"):  # which llm-compressor passes over
            stays = any(re.match(pattern.removeprefix("re:"), module) for pattern in plan.ignore)
            assert stays != (module in plan.modules), name


def test_a_router_of_experts_stays_as_it_is(tiny):
    plan = plan_quantise(open_checkpoint(tiny("qwen3_moe")), "int8")
    assert "re:.*\\.mlp\\.gate$" in plan.ignore
    assert any(".experts.0.up_proj" in name for name in plan.modules)


@pytest.mark.parametrize(("family", "method", "bits"), [("llama", "fp8", 8), ("qwen3_vl", "int8", 8)])
def test_the_bytes_that_are_foretold_are_those_that_are_written(family, method, bits, tiny, tmp_path):
    plan = plan_quantise(open_checkpoint(tiny(family)), method)
    written = open_checkpoint(write_fp8(tiny(family), tmp_path / "out"), quantised=True).nbytes
    scales = sum(plan.source.tensors[f"{name}.weight"].shape[0] for name in plan.modules)
    assert (plan.bits, plan.nbytes) == (bits, written - 2 * scales)  # the helper's have 4 bytes


def test_groups_of_four_bits_divide_every_width(tiny):
    checkpoint = open_checkpoint(tiny("llama"))
    plan = plan_quantise(checkpoint, "int4", group=16)  # widths of 32, 48 and 64
    eight = plan_quantise(checkpoint, "int8")
    weights = sum(checkpoint.tensors[f"{name}.weight"].nbytes // 4 for name in plan.modules)  # they are float32
    rows = sum(checkpoint.tensors[f"{name}.weight"].shape[0] for name in plan.modules)
    assert eight.nbytes - plan.nbytes == weights // 2 + 2 * rows - weights // 16 * 2
    for group in (None, 32):
        with pytest.raises(PruneKitError, match="doesn't divide the widths of its projections .32, 48, 64.: choose"):
            plan_quantise(checkpoint, "int4", group)
    with pytest.raises(PruneKitError, match="is for 4 bits"):
        plan_quantise(checkpoint, "fp8", group=32)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_models_without_plain_matrices_or_a_next_token_are_refused(family, tiny):
    with pytest.raises(PruneKitError, match="deploy.py"):
        plan_quantise(open_checkpoint(tiny(family)), "fp8")


def test_a_published_folder_tells_what_it_is(tiny, tmp_path, pruned):
    written = write_fp8(pruned, tmp_path / "written")
    source = open_checkpoint(pruned)
    with new_folder(tmp_path / "out") as folder:
        publish_quantised(source, written, folder, {"method": "fp8"})
    *before, last = history(tmp_path / "out")
    assert before == history(pruned)
    assert (last["stage"], last["settings"]["method"], last["settings"]["quant_method"]) == (
        "quantise", "fp8", "compressed-tensors",
    )  # fmt: skip
    assert last["parameters"] == last["parameters_before"] and last["bytes"] < last["bytes_before"]
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve" in card and "pip install compressed-tensors" in card
    assert not (tmp_path / "out/.written").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == source.config


def test_a_single_file_of_another_name_keeps_its_index(pruned, tmp_path):
    written = write_fp8(pruned, tmp_path / "written")
    names = read_header(written / "model.safetensors")
    (written / "model.safetensors").rename(written / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (written / INDEX).write_text(json.dumps(index))
    with new_folder(tmp_path / "out") as folder:
        publish_quantised(open_checkpoint(pruned), written, folder, {})
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == index


def test_what_transformers_left_out_while_it_quantised_is_left_out(own, tmp_path):
    folder = own("qwen3_5")
    bare = write_fp8(folder, tmp_path / "bare")
    tensors = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(32, 64)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with new_folder(tmp_path / "out") as out:
        entry = publish_quantised(open_checkpoint(folder), bare, out, {})
    assert entry["parameters_before"] - entry["parameters"] == 32 * 64
    published = json.loads((tmp_path / "out/config.json").read_text())
    assert published["text_config"]["mtp_num_hidden_layers"] == 0


def test_what_is_none_of_its_quantised_forms_is_not_published(tiny, tmp_path, pruned):
    whole = write_fp8(tiny("qwen3_vl"), tmp_path / "whole")
    for written, message in ((pruned, "holds no quantised weights"), (whole, "config.json says|none of its quantised")):
        with pytest.raises(PruneKitError, match=message), new_folder(tmp_path / "out") as folder:
            publish_quantised(open_checkpoint(pruned), written, folder, {})
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tiny, tmp_path, capsys):
    run("--model", tiny("qwen3_vl"), "--out", tmp_path / "out", "--method", "int4", "--group", 16, "--dry-run")
    assert re.match(
        r"int4 \(W4A16\): \d+ projections .* 4 bits, a scale for each 16 inputs; about [\d.]+ MB of",
        capsys.readouterr().out,
    )
    assert not any(tmp_path.iterdir())


def test_a_dry_run_names_rows_that_are_not_there(tiny, tmp_path):
    with pytest.raises(PruneKitError, match="gone.jsonl is not there"):
        run("--model", tiny("llama"), "--out", tmp_path / "out", "--method", "gptq", "--group", 16, "--dry-run",
            "--calib", tmp_path / "gone.jsonl")  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "gptq"], "--calib names the rows"),
        (["--method", "fp8", "--calib", "x"], "--calib names the rows"),
        (["--method", "fp8", "--calib-tokens", "9"], "--calib-tokens: is for --calib; give that, too"),
        (["--method", "int4", "--dtype", "float32"], "--dtype: is for --calib"),
        (["--method", "bnb", "--written", "x", "--max-length", "9"], "--max-length: is for --calib"),
        (["--method", "bnb"], "--written"),
        (["--method", "fp8", "--written", "x"], "--written"),
        (["--method", "fp4"], "invalid choice"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, tiny, tmp_path):
    with pytest.raises(PruneKitError, match=message):
        run("--model", tiny("llama"), "--out", tmp_path / "out", *flags)


def test_llama_cpp_is_not_told_to_convert_what_is_quantised(tiny, tmp_path):
    found = serving_lines(open_checkpoint(write_fp8(tiny("llama"), tmp_path / "out"), quantised=True))
    assert [each["engine"] for each in found] == ["vLLM"]


def test_what_fits_counts_quantised_weights_as_they_are():
    smaller = fits(10**10, 1000, 10**9, weights=10**10)["24"]["context"]
    assert smaller - fits(10**10, 1000, 10**9)["24"]["context"] == 10**7
