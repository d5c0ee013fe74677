"""Packed folders: smaller, exact to the bit, refused by what would misread them; and the sizes of other forms."""

import numpy as np
import pytest
import torch
from helpers.cuts import sparsify
from helpers.tiny_models import tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from prunekit.checkpoint import fingerprint, history, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.packed import main
from prunekit.surgery.zeros_files import FORMS, file_sizes, pack, unpack


def bytes_of(folder) -> dict[str, tuple]:
    checkpoint = open_checkpoint(folder)
    return {
        name: (tensor.dtype, tensor.shape, bytes(checkpoint.read_bytes(name)))
        for name, tensor in checkpoint.tensors.items()
    }


@pytest.mark.parametrize("family", ["qwen3_vl", "gpt2", "bert"])
def test_a_packed_checkpoint_comes_back_with_the_same_bits_and_its_history(family, tiny, tmp_path):
    sparsify(tiny(family), tmp_path / "sparse", sparsity=0.7)
    tensors = load_file(tmp_path / "sparse/model.safetensors")
    name = next(name for name, values in tensors.items() if values.dim() > 1 and (values == 0).sum() > 100)
    tensors[name][0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    save_file(tensors, tmp_path / "sparse/model.safetensors", {"format": "pt"})
    (tmp_path / "sparse/tokenizer.json").write_text("{}")
    pack(open_checkpoint(tmp_path / "sparse"), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "sparse")
    assert fingerprint(open_checkpoint(tmp_path / "back")) == fingerprint(open_checkpoint(tmp_path / "sparse"))
    stages = [entry["stage"] for entry in history(tmp_path / "back")]
    assert stages == ["sparsify", "pack", "unpack"]
    assert (tmp_path / "back/tokenizer.json").exists() and (tmp_path / "packed/tokenizer.json").exists()
    assert not list((tmp_path / "back").glob("*.packed"))
    sizes = [(tmp_path / each).stat().st_size for each in ("packed/model.packed", "sparse/model.safetensors")]
    assert sizes[0] < 0.8 * sizes[1]


def test_files_are_kept_shard_by_shard_to_the_byte(tiny, tmp_path):
    sparsify(tiny("llama", max_shard_size="40KB"), tmp_path / "sparse", sparsity=0.5)
    shards = sorted(file.name for file in (tmp_path / "sparse").glob("*.safetensors"))
    pack(open_checkpoint(tmp_path / "sparse"), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert len(shards) > 1 and shards == sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert all((tmp_path / "back" / name).read_bytes() == (tmp_path / "sparse" / name).read_bytes() for name in shards)


@pytest.fixture
def packed(tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "sparse", sparsity=0.5)
    pack(open_checkpoint(tmp_path / "sparse"), tmp_path / "packed")
    return tmp_path / "packed"


def test_what_would_misread_a_packed_folder_refuses_it(packed):
    for quantised in (False, True):
        with pytest.raises(PruneKitError, match=r"is packed; unpack it: python -m prunekit\.packed unpack"):
            open_checkpoint(packed, quantised)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(packed)


def test_damaged_and_other_folders_are_refused_and_nothing_is_written(packed, tiny, tmp_path):
    with pytest.raises(PruneKitError, match="isn't packed"):
        unpack(tiny("llama"), tmp_path / "out")
    with pytest.raises(PruneKitError, match="too few zeros"):
        pack(open_checkpoint(tiny("llama")), tmp_path / "out")
    tensors = load_file(packed / "model.packed")
    name = next(name for name in tensors if name.endswith(".bitmask"))
    for change, message in (
        (lambda: tensors[name].bitwise_xor_(1), "has other bits than values"),
        (lambda: tensors.pop(name), "a file is missing"),
    ):
        change()
        save_file(tensors, packed / "model.packed", {"format": "pt"})
        with pytest.raises(PruneKitError, match=message):
            unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_those_that_the_forms_have(packed, tiny, tmp_path, monkeypatch, capsys):
    sparse = tmp_path / "sparse"
    found = file_sizes(sparse)
    sizes, tensors = found["bytes"], tensors_of(sparse)
    assert tuple(sizes) == FORMS and sizes["dense"] == sum(each.nbytes for each in tensors.values())
    assert sizes["bitmask"] == sum(each.nbytes for each in load_file(packed / "model.packed").values())
    projections = [values for name, values in tensors.items() if "proj" in name]
    rest = sizes["dense"] - sum(each.nbytes for each in projections)
    assert sizes["INT8"] == rest + sum(each.numel() + 4 * len(each) for each in projections)
    stays = sum(int((each != 0).sum()) for each in projections)
    width = projections[0].element_size()
    assert sizes["CSR"] == rest + stays * (width + 4) + sum(4 * (len(each) + 1) for each in projections)
    assert found["zeros"] == pytest.approx(0.5) and found["zeros_in_int8"] >= 0.5
    dense = file_sizes(tiny("llama"))
    projections = [values.float() for name, values in tensors_of(tiny("llama")).items() if "proj" in name]
    rounded = [np.rint(each / (each.abs().amax(1, keepdim=True) / 127)) for each in projections]
    zeros = sum(int((each == 0).sum()) for each in rounded)
    assert zeros > 0 and dense["zeros_in_int8"] * dense["weights"] == pytest.approx(zeros)
    assert sizes["INT8, zstd"] < sizes["INT8"] and sizes["bitmask, zstd"] < sizes["bitmask"] < sizes["dense"]
    monkeypatch.setattr("sys.argv", ["packed", "sizes", str(sparse), "--json", str(tmp_path / "sizes.json")])
    main()
    assert "50.0% of" in capsys.readouterr().out and (tmp_path / "sizes.json").exists()
