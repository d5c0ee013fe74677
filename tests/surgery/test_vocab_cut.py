"""The script vocab_cut.py: what it says, records and refuses."""

import json
import re

import pytest
from helpers.calibration import write_texts
from helpers.paths import TINY_VL
from helpers.tiny_words import save_speaking_and_rows

from prunekit.checkpoint import history, open_checkpoint


@pytest.fixture
def given(tmp_path):
    """A folder with a model, and rows like what it is for."""
    return save_speaking_and_rows("llama", tmp_path)


def test_the_script_cuts_on_data_and_records_it(given, tmp_path, script):
    model, file = given
    (model / "tokenizer.model").write_text("the old numbers")
    words = ("--model", model, "--out", tmp_path / "out", "--size", 350, "--multiple", 16, "--calib", file)
    done = script("vocab_cut.py", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"352 tokens are kept: 350 rounded up to a multiple of 16", done.stdout)
    assert re.search(r"tokens a byte of held-out rows: 0\.\d+ -> 0\.\d+", done.stdout)
    assert "tokenizer.model has the old numbers, and is left out" in done.stdout
    (entry,) = history(tmp_path / "out")
    assert entry["stage"] == "vocab_cut" and entry["removed"] == {"tokens": 81}
    assert entry["settings"]["calibration_data"][0]["path"] == str(file)
    assert (entry["vocab_size_before"], entry["vocab_size"]) == (433, 352)
    assert entry["metrics"].keys() == {"tokens_per_byte_before", "tokens_per_byte"}
    assert "| vocabulary | 433 | 352 | -18.7% |" in (tmp_path / "out" / "README.md").read_text()
    assert "vocab_cut.py" in (tmp_path / "out/command.sh").read_text()


def test_the_embedded_model_is_cut_on_messages(tmp_path, script_here):
    file = tmp_path / "rows.jsonl"
    row = [{"role": "user", "content": "<image>Read the text."}, {"role": "assistant", "content": "koala"}]
    file.write_text(f"{json.dumps({'messages': row})}\n" * 20)
    words = ("--model", TINY_VL, "--out", tmp_path / "out", "--keep-share", 0.5, "--calib", file)
    done = script_here("vocab_cut.py", *words)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["text_config"]["vocab_size"] == 1152
    assert checkpoint.config["image_token_id"] < 1152


@pytest.mark.parametrize(
    "words, message",
    [
        (["--size", 350, "--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--size", 100, "--calib", "rows.jsonl"], "tokens must stay"),
        (["--size", 9000, "--calib", "rows.jsonl"], "nothing to cut"),
        (["--size", 350], "--calib"),
        (["--calib", "rows.jsonl"], "one of the arguments --size --keep-share is required"),
        (["--size", 350, "--keep-share", 0.5, "--calib", "rows.jsonl"], "not allowed with"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(words, message, given, tmp_path, script_here):
    model, file = given
    words = [file if word == "rows.jsonl" else word for word in words]
    done = script_here("vocab_cut.py", "--model", model, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_used_out_is_refused(given, tmp_path, script_here):
    model, file = given
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    done = script_here("vocab_cut.py", "--model", model, "--out", tmp_path / "out", "--size", 350, "--calib", file)
    assert done.returncode == 2 and "exists; choose another OUT" in done.stderr


def test_a_dry_run_writes_nothing(given, tmp_path, script_here):
    model, file = given
    done = script_here("vocab_cut.py", "--model", model, "--size", 352, "--calib", file, "--dry-run")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "dry run: nothing written")


def test_a_model_without_a_tokenizer_is_refused(tiny, tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here("vocab_cut.py", "--model", tiny("llama"), "--size", 64, "--calib", file, "--dry-run")
    assert done.returncode == 2 and "has no tokenizer.json: copy the original model's" in done.stderr
