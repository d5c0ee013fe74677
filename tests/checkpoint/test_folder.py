"""Opening folders: which are refused, and what is said; shards and their index."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.anything import JSON, QUICK
from helpers.checkpoints import copy_whole, refused, weights
from helpers.tiny_models import load
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunekit.checkpoint import INDEX, open_checkpoint, statistics
from prunekit.errors import PruneKitError


def test_shards_without_an_index_are_read(own):
    folder = own("llama", max_shard_size="20KB")
    (folder / INDEX).unlink()
    assert open_checkpoint(folder).tensors.keys() == weights(folder).keys()


def test_a_hub_name_that_is_not_cached_says_how_to_fetch_it():
    refused("some-org/some-model", "hf download some-org/some-model$")


def test_a_hub_name_in_the_cache_is_opened(tiny, tmp_path, monkeypatch):
    repo = tmp_path / "models--org--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots/abc").symlink_to(tiny("llama"))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert statistics("org/name") == statistics(tiny("llama"))


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "absent", "absent: no such folder")


def test_a_folder_without_config_is_refused(tmp_path):
    refused(tmp_path, "no config.json here; give a Hugging Face checkpoint folder")


def test_a_folder_without_weights_is_refused(own):
    folder = own("llama")
    (folder / "model.safetensors").unlink()
    refused(folder, r"no \*\.safetensors here")


def test_pickles_are_refused_with_the_command_that_converts_them(own):
    folder = own("llama")
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PruneKitError, match="pickles only") as caught:
        open_checkpoint(folder)
    command = str(caught.value).partition("convert them: ")[2].replace("python", sys.executable, 1)
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0  # noqa: S602
    load(folder)
    copied = copy_whole(folder, folder.parent / "copied")
    assert not (copied / "pytorch_model.bin").exists()


def test_an_adapter_folder_is_refused(own):
    folder = own("llama")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"a LoRA adapter.*merge it first with export_lora\.sh")


def test_quantised_weights_are_refused(own):
    folder = own("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    refused(folder, "quantised weights can't be cut; start from the unquantised checkpoint")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=range(5))
def test_a_damaged_config_is_refused(content, own):
    folder = own("llama")
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(keep, own):
    file = own("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(file.parent, "model.safetensors: .*(copy|download)")


def test_a_file_that_is_too_long_is_refused(own):
    file = own("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(file.parent, "too long")


def edit_index(folder, edit):
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(with_index, own):
    folder = own("llama", max_shard_size="20KB")
    if not with_index:
        (folder / INDEX).unlink()
    shard = first_shard(folder)
    shard.unlink()
    refused(folder, rf"{shard.name} is missing \(1 of 1\)")


def test_an_index_naming_an_absent_tensor_is_refused(own):
    folder = own("llama", max_shard_size="20KB")
    edit_index(folder, lambda names: names.update(ghost=first_shard(folder).name))
    refused(folder, "names ghost, which model-00001.* doesn't hold")


def test_a_tensor_that_the_index_does_not_name_is_refused(own):
    folder = own("llama", max_shard_size="20KB")
    edit_index(folder, lambda names: names.pop("model.norm.weight"))
    refused(folder, r"doesn't name model\.norm\.weight")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(shard, own):
    folder = own("llama", max_shard_size="20KB")
    edit_index(folder, lambda names: names.update(ghost=shard))
    refused(folder, "isn't the name of a safetensors file in the folder")


@QUICK
@given(index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), JSON, max_size=3)}))
def test_any_index_is_refused_or_fits(index, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(PruneKitError):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_files_is_refused(own):
    folder = own("llama")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "two.safetensors")
    refused(folder, r"model\.norm\.weight is in one\.safetensors and in two\.safetensors")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3_vl"])
def test_a_tied_head_that_is_saved_as_another_is_refused_as_long_as_the_config_ties_it(own, family):
    """transformers would use it, vLLM wouldn't: nobody could say what is counted and cut."""
    folder = own(family)
    tensors = weights(folder)
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    sizes = statistics(folder)
    assert sizes["parameters"] == load(folder).num_parameters()
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, 'ties lm_head.weight to .*the weights hold another.* set "tie_word_embeddings": false')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert statistics(folder)["parameters"] == load(folder).num_parameters() == sizes["parameters"] + embedding.numel()


def test_a_head_that_differs_at_the_end_of_a_large_table_is_noticed(own):
    folder = own("llama")
    large = torch.zeros(2**10, 32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(large)}))
    tensors = weights(folder) | {"model.embed_tokens.weight": large}
    save_file(tensors | {"lm_head.weight": large.clone()}, folder / "model.safetensors", {"format": "pt"})
    open_checkpoint(folder)
    other = large.clone()
    other[-1] = 1
    save_file(tensors | {"lm_head.weight": other}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "the weights hold another")
