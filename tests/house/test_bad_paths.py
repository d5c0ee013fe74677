"""Paths on the command line of every script: what can't be read or written is refused."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.bad_input import CHEAP, put, refusal, words
from helpers.paths import ROOT
from helpers.tiny_taggers import write_rows

LONG, NOT_UTF8 = "x" * 256, os.fsdecode(b"caf\xe9")


def bad_models(folder: Path) -> list:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").mkdir()
    return [folder / "gone", folder / LONG, folder / ("y/" * 3000), folder / "loop", folder / "file",
            folder / "file" / "x", folder / "empty", folder / "weights", folder / NOT_UTF8, folder / "a\nb", "",
            "/dev/null",
            "org/name", "é/name", "-"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CHEAP if name != "prunekit.summary"])
def test_a_model_that_is_no_folder_of_one_is_refused(name, tmp_path, tries):
    for model in bad_models(tmp_path):
        tries.refused(ascii(str(model)[-30:]), name, *words(name, model))
    tries.check()


OUTS = {
    "manual_select.py": ("--text", "1"),
    "kv_cut.py": ("--kv-heads", "1"),
    "width_cut.py": ("--heads", "2"),
    "vocab_cut.py": ("--size", "64", "--calib", "rows.jsonl"),
    "expert_cut.py": ("--experts", "2", "--calib", "rows.jsonl"),
    "sparsify.py": ("--sparsity", "0.5"),
    "deploy.py": (),
    "ner_run.py": ("--dataset",),
}


@pytest.mark.parametrize("name", OUTS)
def test_an_out_that_cannot_be_made_is_refused(name, tagger, linked, tmp_path, tries):
    model = tagger("bert") if name in ("deploy.py", "ner_run.py") else linked("llama")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    used = tmp_path / "used"
    used.mkdir()
    put(used / "mine", "x")
    more = (*OUTS[name], write_rows(tmp_path / "rows.jsonl")) if name == "ner_run.py" else OUTS[name]
    for out in (tmp_path / "loop", tmp_path / "a", tmp_path / "a" / "x", tmp_path / "file", tmp_path / "file" / "x",
                used, tmp_path / LONG, tmp_path / ("x" * 255), tmp_path / ("x" * 240), tmp_path / ("y/" * 3000),
                tmp_path / NOT_UTF8, "/proc/x", "/dev/null", "/dev/null/x", model, model / "..", "/", ""):  # fmt: skip
        for flag in ((), ("--overwrite",)):
            tries.refused((ascii(str(out)[-30:]), flag), name, "--model", model, "--out", out, *more, *flag)
    tries.check()


def as_nobody(*command: object) -> subprocess.CompletedProcess:
    """Run as a user to whom folders can be closed, which they can't be to root."""
    if os.getuid() == 0:
        command = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command)
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def shared_model(tiny):
    """A folder that everybody may read, with a model in it; pytest's own are closed to others."""
    if os.getuid() == 0 and (not shutil.which("setpriv") or as_nobody(sys.executable, "-c", "").returncode):
        pytest.skip("nobody can't run this Python")
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(tiny("llama"), Path(name) / "model")
        for path in [Path(name), *Path(name).rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(name) / "model"
        Path(name).chmod(0o755)


@pytest.mark.parametrize("closed", ["", "config.json", "model.safetensors", ".."])
def test_a_model_that_may_not_be_read_is_refused(closed, shared_model):
    (shared_model / closed).chmod(0o000)
    done = as_nobody(sys.executable, "-m", "prunekit.inspect", shared_model)
    assert refusal(done.returncode, done.stderr) is None, done.stderr
    assert "Permission denied" in done.stderr and str(shared_model) in done.stderr


def test_an_out_in_a_folder_that_may_not_be_written_is_refused_before_the_work(shared_model):
    words = ("--model", shared_model, "--text", 1, "--out", shared_model.parent / "a/b")
    done = as_nobody(sys.executable, "manual_select.py", *words)
    assert refusal(done.returncode, done.stderr) is None and done.stdout == "", done.stderr
    assert f"{shared_model.parent} is no folder that you may write to" in done.stderr
