"""Reading damaged folders, writing whole ones."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny_models import FAMILIES, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import (
    HISTORY,
    INDEX,
    MAX_HEADER,
    TORCH_DTYPES,
    Checkpoint,
    append_history,
    check_out,
    float_bytes,
    history,
    history_entry,
    new_folder,
    open_checkpoint,
    read_header,
    statistics,
    write_checkpoint,
    write_weights,
)
from prunekit.checkpoint.records import RECORDS
from prunekit.errors import PruneKitError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def copy_whole(source, out, **kwargs):
    write_checkpoint(open_checkpoint(source), out, {"stage": "copy"}, **kwargs)
    return out


def weights(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def refused(folder, message):
    with pytest.raises(PruneKitError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_read_as_safetensors_reads_them(family, tiny):
    checkpoint, expected = open_checkpoint(tiny(family)), weights(tiny(family))
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
)
def test_every_dtype_is_read(dtype, tmp_path):
    tensors = {"a": torch.arange(6).to(getattr(torch, dtype)).view(2, 3), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, {}, read_header(tmp_path / "model.safetensors"))
    read = checkpoint.read("a")
    assert read.dtype == tensors["a"].dtype and torch.equal(read.double(), tensors["a"].double())
    assert checkpoint.read("none").shape == (0, 3)


@QUICK
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
)
def test_floats_are_rounded_as_torch_rounds_them(bits, dtype):
    values = np.array(bits, "u4").view("f4")
    expected = torch.from_numpy(values).to(getattr(torch, TORCH_DTYPES[dtype]))
    try:
        got = torch.frombuffer(bytearray(float_bytes(values, dtype)), dtype=expected.dtype)
    except PruneKitError:
        assert (expected.isinf() & torch.from_numpy(np.isfinite(values))).any()
        return
    assert torch.equal(got.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)) and torch.equal(
        got.isnan(), expected.isnan()
    )


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


# --- damage ----------------------------------------------------------------------------------------------------------


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


def write_raw(file, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return file


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": entry(0, 6), "b": entry(4, 8)}, "overlap before b"),
        ({"a": entry(0, 2), "b": entry(4, 8)}, "leave a gap before b"),
        ({"a": entry(2, 8)}, "leave a gap before a"),
        ({"a": entry(0, 9)}, "cut short"),
        ({"a": entry(0, 7)}, "too long"),
        ({"a": entry(0, 8, [3])}, "a has 8 bytes where its shape"),
        ({"a": entry(0, 8, [2**62, 2**62])}, "a has 8 bytes"),
        ({"a": entry(0, 8, [-8])}, "bad shape"),
        ({"a": entry(0, 8, [True, 8])}, "bad shape"),
        ({"a": entry(8, 0, [0])}, "a has -8 bytes"),
        ({"a": entry(0, 8, dtype="F4")}, "dtype 'F4'"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "no 'data_offsets'"),
        ({"a": 3}, "not a readable"),
        ([], "not a readable"),
        (b"{" + b'"a":' * 9, "not a readable"),
        (b'{"a":1,"a":2}', "a name occurs twice"),
        (b"[" * 100_000, "not a readable"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(header, message, tmp_path):
    with pytest.raises(PruneKitError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(100))
    with pytest.raises(PruneKitError, match="no safetensors header"):
        read_header(tmp_path / "x.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@QUICK
@given(header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4) | JSON, data=st.binary(max_size=40))
def test_any_header_is_read_as_safetensors_would_or_refused(header, data, tmp_path):
    file = write_raw(tmp_path / "x.safetensors", header, data)
    try:
        tensors = read_header(file)
    except PruneKitError:
        return
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: list(value.shape) for name, value in load_file(file).items()
    }


@QUICK
@given(place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_flipped_byte_in_a_header_never_crashes(place, byte, tiny, tmp_path):
    content = bytearray((tiny("llama") / "model.safetensors").read_bytes())
    content[place] = byte
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        tensors = read_header(tmp_path / "x.safetensors")
    except PruneKitError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


# --- index -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("layers", [4, 6, 10**8])
def test_a_config_that_miscounts_layers_is_refused(layers, own):
    folder = own("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    refused(folder, f"says num_hidden_layers = {layers}, the weights hold text layers 0-4")


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_bytes_are_the_same_whether_or_not_the_kernel_copies_them(code, tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(code, "refused")

    if code:
        monkeypatch.setattr(os, "copy_file_range", fail)
    assert_same_weights(copy_whole(tiny("qwen3_vl"), tmp_path / "out"), tiny("qwen3_vl"))


def test_neighbouring_tensors_are_copied_at_once(tiny, tmp_path, monkeypatch):
    calls, copy = [], os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *a, **k: calls.append(a) or copy(*a, **k))
    copy_whole(tiny("llama"), tmp_path / "out")
    assert len(calls) == 1


def test_files_are_aligned_and_carry_the_format(tmp_path):
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(2),
        "c": torch.zeros(1, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    write_weights(tmp_path, dict(reversed(read_header(tmp_path / "in.safetensors").items())))
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0 and json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    for tensor in read_header(tmp_path / "model.safetensors").values():
        assert tensor.start % {"U8": 1, "F32": 4, "F64": 8}[tensor.dtype] == 0


def test_shards_stay_as_they_are_with_a_right_index(tiny, tmp_path):
    source = tiny("llama", max_shard_size="20KB")
    out = copy_whole(source, tmp_path / "out")
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == statistics(source)["bytes"]
    assert [f.name for f in sorted(out.glob("*.safetensors"))] == [f.name for f in sorted(source.glob("*.safetensors"))]
    load(out)
    assert_same_weights(out, source)


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
def test_shards_are_no_larger_than_told(limit, tiny, tmp_path):
    out = copy_whole(tiny("llama"), tmp_path / "out", max_shard_bytes=limit)
    for file in out.glob("*.safetensors"):
        tensors = read_header(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    load(out)
    assert_same_weights(out, tiny("llama"))


def test_side_files_travel_and_a_trainers_traces_do_not(own, tmp_path):
    folder = own("llama")
    kept = [
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "merges.txt",
        "generation_config.json",
    ]
    left = ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "README.md", ".hidden",
            "latest", "zero_to_fp32.py", "zero_to_torch.py", "args.json", "logging.jsonl", "command.sh", "curves.png",
             "heads.png", "pytorch_model.bin.index.json"]  # fmt: skip
    for name in kept + left:
        (folder / name).write_text("{}")
    (folder / "global_step3").mkdir()
    out = copy_whole(folder, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {
        *kept,
        "config.json",
        "model.safetensors",
        HISTORY,
        "README.md",
    }


def test_history_grows_by_one_entry_a_stage(tiny, tmp_path):
    copy_whole(copy_whole(tiny("llama"), tmp_path / "one"), tmp_path / "two")
    append_history(tmp_path / "two", {"stage": "more"})
    assert [e["stage"] for e in history(tmp_path / "two")] == ["copy", "copy", "more"]


def test_a_history_entry_says_what_changed_and_with_what(tiny):
    numbers = statistics(tiny("llama"))
    entry = history_entry("x", tiny("llama"), numbers, numbers | {"parameters": 1}, metrics={"a": 1})
    assert (entry["parameters_before"], entry["parameters"]) == (numbers["parameters"], 1)
    assert {"prunekit", "torch", "transformers", "ms-swift"} <= entry["versions"].keys()
    json.dumps(entry)


@pytest.mark.parametrize("content", ["[]", '{"history": 1}', '{"history": [1]}'])
def test_a_damaged_history_is_refused_before_anything_is_written(content, own, tmp_path):
    folder = own("llama")
    (folder / HISTORY).write_text(content)
    with pytest.raises(PruneKitError, match="pruning_info.json: .* not an? (?:list|object); mend it"):
        copy_whole(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# --- whole or absent -------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_used_out_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").write_text("x")
    with (
        pytest.raises(PruneKitError, match="exists; choose another OUT or pass --overwrite"),
        new_folder(tmp_path / "out"),
    ):
        pass


def test_an_empty_out_is_used(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    copy_whole(tiny("llama"), tmp_path / "out")
    load(tmp_path / "out")


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/x").write_text("x")
    with pytest.raises(PruneKitError, match="holds no checkpoint, so it isn't overwritten"):
        copy_whole(tiny("llama"), tmp_path / "photos", overwrite=True)


@pytest.mark.parametrize("where", [".", ".."])
def test_the_input_is_never_overwritten(where, own):
    folder = own("llama")
    with pytest.raises(PruneKitError, match="is or holds the input"):
        check_out(folder / where, folder, overwrite=True)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_replaces_the_whole_folder(can_exchange, tiny, own, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr("prunekit.checkpoint.atomic._exchange", lambda one, other: False)
    out = own("llama")
    (out / "old.txt").write_text("old")
    copy_whole(tiny("qwen3"), out, overwrite=True)
    assert not (out / "old.txt").exists() and list(tmp_path.iterdir()) == [out]
    assert_same_weights(out, tiny("qwen3"))


def test_an_out_that_comes_into_being_meanwhile_is_kept(tmp_path):
    with pytest.raises(PruneKitError, match="came into being meanwhile"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/x").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/x").exists()


def test_a_live_writers_folder_is_not_taken_for_a_leftover(tmp_path):
    with new_folder(tmp_path / "out") as first:
        with pytest.raises(ValueError), new_folder(tmp_path / "out"):
            raise ValueError
        assert first.exists()


def test_a_file_system_without_locks_is_written_to_and_not_cleaned(tiny, tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "out.partial-1").mkdir()
    copy_whole(tiny("llama"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial-1"]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(PruneKitError, match=r"needs 1,000,000,000,000\.0 MB, [\d,.]+ MB are free"):
        new_folder(tmp_path / "out", need_bytes=10**18).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(PruneKitError, match="the disk is full; nothing was left there"):
        copy_whole(tiny("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_disk(tmp_path):
    """on_disk(options, source): drop a layer of source onto a tmpfs of its own; stdout names what is left there."""
    script = 'mount -t tmpfs -o "$0" tmpfs disk || exit 77; "$@" >/dev/null; code=$?; ls -A disk; exit $code'

    (tmp_path / "disk").mkdir()

    def run(options, source):
        command = [
            sys.executable,
            ROOT / "manual_select.py",
            "--model",
            source,
            "--out",
            "disk/out",
            "--text",
            "1",
        ]
        for unshare in (["unshare", "--mount", "--map-root-user"], ["unshare", "--mount"]):
            command_line = [*unshare, "bash", "-c", script, options, *command]
            done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
            if "unshare: " not in done.stderr and done.returncode != 77:
                return done
        return pytest.skip(f"no tmpfs can be mounted, in a user namespace or as root: {done.stderr.strip()}")

    return run


def test_a_disk_with_too_little_room_is_refused(tiny, on_disk):
    done = on_disk("size=1m", tiny("llama"))
    assert re.fullmatch(r"error: disk/out: needs 1\.\d MB, 1\.0 MB are free; make room or .*\n", done.stderr)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("inodes", range(1, 15), ids="{} inodes".format)
def test_a_disk_on_which_a_file_cannot_be_made_is_left_empty(inodes, tiny, on_disk):
    source = tiny("llama", max_shard_size="30KB")
    done = on_disk(f"size=9m,nr_inodes={inodes}", source)
    assert re.fullmatch(r"error: disk/out: the disk is full; nothing was left there; .*\n", done.stderr)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_disk_that_proves_too_small_while_it_is_written_to_is_left_empty(tmp_path, on_disk):
    for shard in range(1, 513):  # each takes a page of 4 KB, for the one byte of which the room was counted
        header = {f"model.layers.{shard - 1}.input_layernorm.weight": entry(0, 1)}
        write_raw(tmp_path / f"model-{shard:05}-of-00512.safetensors", header, b"x")
    config = {"model_type": "llama", "num_hidden_layers": 512, "num_attention_heads": 1, "hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = on_disk("size=1536k", tmp_path)
    assert re.fullmatch(r"error: disk/out: the disk is full; nothing was left there; .*\n", done.stderr)
    assert (done.returncode, done.stdout) == (2, "")


def test_an_out_below_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PruneKitError, match="can't be written"):
        copy_whole(tiny("llama"), tmp_path / "file/out")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sharded llama of 24 MB, no two layers alike: quickly made, and with many moments to be killed in."""
    folder, data = tmp_path_factory.mktemp("large"), random.Random(0)
    config = {"model_type": "llama", "num_hidden_layers": 24, "num_attention_heads": 1, "hidden_size": 1024,
              "intermediate_size": 1024}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for shard in range(6):
        names = [f"model.layers.{4 * shard + i}.mlp.up_proj.weight" for i in range(4)]
        header = {name: entry(2**20 * i, 2**20 * (i + 1), [1024, 1024]) for i, name in enumerate(names)}
        write_raw(folder / f"model-{shard + 1:05}-of-00006.safetensors", header, data.randbytes(4 * 2**20))
    return folder


def cut(source, out, layer, kill_after=None):
    """Run manual_select.py in a fork of this process, which saves its start-up; the seconds that it lived."""
    arguments = ["--model", source, "--out", out, "--text", layer, "--overwrite"]

    def child():
        sys.argv = ["manual_select.py", *map(str, arguments)]
        runpy.run_path(ROOT / "manual_select.py", run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    start = time.monotonic()
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode == 0 or (kill_after is not None and process.exitcode == -signal.SIGKILL)
    return time.monotonic() - start


def contents(folder):
    """A digest of every file by name, but for the time of day in the history: what was removed."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (entry,) = history(folder)
    return files | {HISTORY: entry["removed"]}


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True], ids=["new", "overwrite"])
@pytest.mark.ci
def test_a_run_killed_at_any_moment_leaves_out_absent_or_whole_and_the_next_one_cleans_up(
    used, large, tmp_path, tmp_path_factory
):
    complete, moments = tmp_path_factory.mktemp("complete"), random.Random(0)
    duration = max(cut(large, complete / str(layer), layer) for layer in (7, 8))
    old, new = contents(complete / "7"), contents(complete / "8")
    out, left_a_partial = tmp_path / "out", 0
    for part in range(50):
        if used:
            cut(large, out, 7)
        cut(large, out, 8, kill_after=(part + moments.random()) / 50 * duration)
        left_a_partial += any(path != out for path in tmp_path.iterdir())
        if out.exists() or used:
            open_checkpoint(out)
            assert contents(out) in ([old, new] if used else [new])
        cut(large, out, 8)
        assert list(tmp_path.iterdir()) == [out] and contents(out) == new
        shutil.rmtree(out)
    assert left_a_partial, "no run was killed while it wrote"


@pytest.mark.parametrize("name", RECORDS)
def test_no_record_of_a_stage_is_carried_into_the_next_ones_folder(tiny, tmp_path, name):
    source = copy_whole(tiny("llama"), tmp_path / "source")
    for file in (name, "notes.txt"):
        (source / file).write_text("of this stage")
    found = copy_whole(source, tmp_path / "out")
    assert not (found / name).exists() and (found / "notes.txt").exists()


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_numbers_and_history(tiny, tmp_path, script):
    out = copy_whole(tiny("qwen3_vl"), tmp_path / "out")
    shown = script("prunekit.inspect", out)
    assert shown.returncode == 0 and "vision blocks" in shown.stdout and "copy" in shown.stdout
    told = json.loads(script("prunekit.inspect", out, "--json").stdout)
    assert told["parameters"] == statistics(out)["parameters"] and told["history"][0]["stage"] == "copy"


def test_inspect_ends_with_one_line_on_bad_input(tmp_path, script):
    done = script("prunekit.inspect", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
