"""The script kv_cut.py: what it says, records and refuses."""

import runpy
import sys

import pytest
from helpers.calibration import write_texts
from helpers.paths import EMBEDDED, ROOT

from prunekit.checkpoint import heads, history, open_checkpoint
from prunekit.checkpoint.provenance import data_record


def test_script_cuts_and_records_history(tiny, tmp_path, script):
    done = script("kv_cut.py", "--model", tiny("qwen3_vl"), "--out", tmp_path / "out", "--kv-heads", 1)
    assert done.returncode == 0, done.stderr
    (entry,) = history(tmp_path / "out")
    assert entry["kv_bytes_per_token"] * 4 == entry["kv_bytes_per_token_before"]
    assert entry["settings"] == {"kv_heads": 1, "method": "mean"}


def test_script_ends_with_one_line_on_bad_input(tiny, tmp_path, script_here):
    done = script_here("kv_cut.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--kv-heads", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --kv-heads 3: the model has 2 KV heads; choose one of 1\n"


def test_the_script_merges_and_says_so(tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here("kv_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--kv-heads", 1, "--calib", file)
    assert done.returncode == 0, done.stderr
    entry = history(tmp_path / "out")[-1]
    assert entry["settings"]["method"] == "calibrated" and entry["settings"]["calib"] == str(file)
    assert entry["settings"]["calibration_tokens"] > 0 and entry["settings"]["repeat"] == 0.5
    said = f"{entry['metrics']['held_out_loss_unmerged']:.4f} -> {entry['metrics']['held_out_loss']:.4f}"
    assert f"held-out loss {said}" in done.stdout
    assert heads(open_checkpoint(tmp_path / "out")).kv == 1


def test_the_script_reads_the_rows_once_and_records_them(tmp_path, opens, monkeypatch):
    file, out = write_texts(tmp_path / "texts.jsonl"), tmp_path / "out"
    line = ["kv_cut.py", "--model", EMBEDDED, "--out", out, "--kv-heads", 1, "--calib", file, "--calib-tokens", 500]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    count = opens(file)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "kv_cut.py"), run_name="__main__")
    assert (ended.value.code, count()) == (0, 1)
    assert history(out)[-1]["settings"]["calibration_data"] == [data_record(file)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "calibrated"], "--method calibrated and --calib need each other"),
        (["--method", "mean", "--calib", "x.jsonl"], "--method calibrated and --calib need each other"),
        (["--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--refine", "3"], "--refine: is for --calib"),
        (["--repeat", "0"], "--repeat: is for --calib"),
        (["--repeat", "2", "--calib", "x.jsonl"], "argument --repeat: '2' is no number from 0 to 1"),
        (["--refine", "-1", "--calib", "x.jsonl"], "argument --refine: '-1' is no whole number"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(arguments, message, tmp_path, script_here):
    done = script_here("kv_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--kv-heads", 1, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_refined_is_refused_before_data_are_read(tiny, tmp_path, script_here):
    arguments = ["--kv-heads", 1, "--refine", 3, "--calib", tmp_path / "nowhere.jsonl"]
    done = script_here("kv_cut.py", "--model", tiny("gemma3_text"), "--out", tmp_path / "out", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --refine: gemma3_text has norms behind attention")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_families_without_shared_heads_are_refused(family, tiny, tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here(
        "kv_cut.py", "--model", tiny(family), "--out", tmp_path / "out", "--kv-heads", 1, "--calib", file
    )
    assert done.returncode == 2
    assert f"{family}: has no form with fewer KV heads" in done.stderr
