"""Writing weights: the same bytes, aligned, in shards; disks that are too small are left empty."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import assert_same_weights, copy_whole, entry, write_raw
from helpers.paths import ROOT
from helpers.tiny_models import load
from safetensors.torch import save_file

from prunekit.checkpoint import INDEX, open_checkpoint, read_header, statistics, write_checkpoint, write_weights
from prunekit.errors import PruneKitError


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


def test_side_files_that_surgery_changed_are_written_anew_or_left_out(own, tmp_path):
    folder = own("llama")
    for name in ("kept.txt", "changed.txt", "gone.txt"):
        (folder / name).write_text(name)
    files = {"changed.txt": b"anew", "gone.txt": None, "new.txt": b"too"}
    write_checkpoint(replace(open_checkpoint(folder), files=files), tmp_path / "out", {"stage": "copy"})
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.txt")}
    assert found == {"kept.txt": b"kept.txt", "changed.txt": b"anew", "new.txt": b"too"}


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
def test_shards_are_no_larger_than_told(limit, tiny, tmp_path):
    out = copy_whole(tiny("llama"), tmp_path / "out", max_shard_bytes=limit)
    for file in out.glob("*.safetensors"):
        tensors = read_header(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    load(out)
    assert_same_weights(out, tiny("llama"))


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
