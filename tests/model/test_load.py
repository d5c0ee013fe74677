"""In which type a model is loaded, and which are refused."""

import json

import pytest
import torch
from helpers.tiny_models import tensors_of
from safetensors.torch import save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.data.batches import model_and_calibration
from prunekit.errors import PruneKitError
from prunekit.model import load


@pytest.mark.parametrize(
    ("has", "parameters", "dtype"),
    [(True, 60e6, torch.bfloat16), (False, 60e6, torch.float32), (True, 40e6, torch.float32)],
)
def test_bfloat16_is_for_large_models_on_processors_that_have_it(monkeypatch, tiny, has, parameters, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": has})
    monkeypatch.setattr(load, "statistics", lambda checkpoint: {"parameters": parameters})
    checkpoint = open_checkpoint(tiny("llama"))
    assert load.load_model(checkpoint, "cpu").dtype == dtype
    assert load.load_model(checkpoint, "cpu", "float16").dtype == torch.float16


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification", "Qwen3VLModel"])
def test_a_model_without_an_output_head_is_not_calibrated(name, own):
    folder = own("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(PruneKitError, match=f"{name} predicts no next token to score by; give a causal model"):
        model_and_calibration(open_checkpoint(folder), None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_vl", "gemma3_text"])
def test_a_model_with_an_output_head_is_causal(family, tiny):
    load.check_causal(open_checkpoint(tiny(family)))


def test_a_model_that_lacks_tensors_is_refused_where_transformers_would_make_them_up(own):
    folder = own("llama")
    tensors = tensors_of(folder)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneKitError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight \(1 of 1\) of LlamaFor"):
        load.load_model(open_checkpoint(folder), "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_a_config_that_names_no_class_is_loaded_as_its_familys(family, own, tmp_path):
    folder = own(family)
    config = json.loads((folder / "config.json").read_text())
    (name,) = config.pop("architectures")
    (folder / "config.json").write_text(json.dumps(config))
    for offload in (None, tmp_path / "offload"):
        assert type(load.load_model(open_checkpoint(folder), "cpu", offload=offload)).__name__ == name
