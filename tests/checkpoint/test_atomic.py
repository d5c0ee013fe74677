"""A folder is whole or absent, whatever happens while it is written."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.checkpoints import assert_same_weights, copy_whole, entry, write_raw
from helpers.paths import ROOT
from helpers.tiny_models import load

from prunekit.arguments import new_file
from prunekit.checkpoint import (
    HISTORY,
    atomic,
    check_out,
    history,
    new_folder,
    open_checkpoint,
    scratch_folder,
    write_json,
)
from prunekit.checkpoint.work_folder import claim_folder
from prunekit.errors import PruneKitError


def test_two_processes_that_write_the_same_file_do_not_write_into_each_others_draft(tmp_path, monkeypatch):
    def as_another(draft, target):
        """The other process writes all of its own before this one's draft takes the file's place."""
        monkeypatch.undo()
        monkeypatch.setattr("os.getpid", lambda: 4711)
        write_json(target, "another's")
        monkeypatch.undo()
        return draft.replace(target)

    monkeypatch.setattr(Path, "replace", as_another)
    write_json(tmp_path / "a.json", "mine")
    assert json.loads((tmp_path / "a.json").read_text()) == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_pipe_gets_json_and_is_not_replaced(tmp_path):
    reading, writing = os.pipe()
    write_json(Path(f"/dev/fd/{writing}"), {"a": 1})
    assert json.loads(os.read(reading, 100)) == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    both = os.open(tmp_path / "pipe", os.O_RDWR)
    write_json(tmp_path / "pipe", {"a": 1})
    assert json.loads(os.read(both, 100)) == {"a": 1} and (tmp_path / "pipe").is_fifo()
    for descriptor in (reading, writing, both):
        os.close(descriptor)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_folders_above_out_stay_only_with_it(tmp_path):
    with scratch_folder(tmp_path / "new/dir/out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "new/dir/out") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "new/dir/out/x").exists()


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


def test_an_out_where_a_disk_is_mounted_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "real")
    for overwrite in (False, True):
        with pytest.raises(PruneKitError, match="real: is where a disk is mounted; choose a folder in it"):
            check_out(tmp_path / "real", overwrite=overwrite)


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


def test_a_home_that_the_shell_left_as_it_is_is_no_folders_name(tmp_path, monkeypatch):
    """--out=~/x: bash expands it as a word of its own alone. What would be made is a folder called ~, here."""
    monkeypatch.chdir(tmp_path)
    claim = claim_folder(Path("~/x"), {}, "scan")
    for call in (lambda: check_out("~/x"), lambda: open_checkpoint("~/x"), lambda: new_file("~/x"), claim.__enter__):
        with pytest.raises(PruneKitError, match=r"~/x: the shell left the ~ as it is; write \$HOME"):
            call()
    assert not any(tmp_path.iterdir())


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


def test_a_link_to_an_empty_folder_is_refused_before_anything_is_written(tmp_path):
    """A folder can't be renamed to it: a training would be in vain."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    with pytest.raises(PruneKitError, match=r"out: is a link; give the folder that it leads to, .*/large disk$"):
        check_out(tmp_path / "out")


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


def test_what_killed_processes_left_is_looked_for_once_a_folder(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(atomic, "_remove_leftovers", looked.append)
    with new_folder(tmp_path / "out", need_bytes=1):
        pass
    assert looked == [tmp_path / "out"]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(PruneKitError, match=r"needs 1,000,000,000,000\.0 MB, [\d,.]+ MB are free"):
        new_folder(tmp_path / "out", need_bytes=10**18).__enter__()
    assert list(tmp_path.iterdir()) == []


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
    for part in range(25):
        if used:
            cut(large, out, 7)
        cut(large, out, 8, kill_after=(part + moments.random()) / 25 * duration)
        left_a_partial += any(path != out for path in tmp_path.iterdir())
        if out.exists() or used:
            open_checkpoint(out)
            assert contents(out) in ([old, new] if used else [new])
        cut(large, out, 8)
        assert list(tmp_path.iterdir()) == [out] and contents(out) == new
        shutil.rmtree(out)
    assert left_a_partial, "no run was killed while it wrote"


@pytest.mark.parametrize("files, flushed", [(3, {"each"}), (60, {"all"})])
def test_of_many_files_the_file_system_is_flushed_and_of_few_each_file(files, flushed, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "MANY", 50)
    done = set()
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: done.add("each"))
    monkeypatch.setattr(atomic, "_sync_file_system", lambda folder: done.add("all") or True)
    (tmp_path / "pictures").mkdir()
    for number in range(files):
        (tmp_path / "pictures" / f"{number}.png").touch()
    atomic._sync(tmp_path)
    assert done == flushed


def test_a_file_system_is_flushed_where_linux_can(tmp_path):
    assert atomic._sync_file_system(tmp_path)


def test_many_files_are_flushed_one_by_one_where_linux_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "MANY", 5)
    monkeypatch.setattr(atomic, "_sync_file_system", lambda folder: False)
    flushed = []
    monkeypatch.setattr(atomic.os, "fsync", flushed.append)
    for number in range(9):
        (tmp_path / str(number)).touch()
    atomic._sync(tmp_path)
    assert len(flushed) == 10
