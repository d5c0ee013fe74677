"""The script expert_cut.py: what it says, records and refuses."""

import re

import pytest
from helpers.calibration import write_texts
from helpers.tiny_words import save_speaking_and_rows

from prunekit.checkpoint import history


@pytest.fixture
def given(tmp_path):
    """A folder with a model, and rows like what it is for."""
    return save_speaking_and_rows("qwen3_moe", tmp_path)


def test_the_script_cuts_on_data_and_records_it(given, tmp_path, script):
    model, file = given
    words = ("--model", model, "--out", tmp_path / "out", "--experts", 3, "--calib", file, "--calib-tokens", 600)
    done = script("expert_cut.py", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"experts +4 +3 +-25.0%", done.stdout)
    assert re.search(r"held-out loss \d+\.\d+ -> \d+\.\d+", done.stdout)
    (entry,) = history(tmp_path / "out")
    assert entry["stage"] == "expert_cut" and entry["removed"] == {"experts": 1}
    assert entry["settings"]["score"] == "error" and entry["settings"]["refitted"] is True
    assert entry["settings"]["calibration_data"][0]["path"] == str(file)
    assert (entry["num_experts_before"], entry["num_experts"]) == (4, 3)
    assert [*entry["experts_removed"]] == ["3"]
    assert "| experts | 4 | 3 | -25.0% |" in (tmp_path / "out" / "README.md").read_text()
    assert "expert_cut.py" in (tmp_path / "out/command.sh").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "out"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--experts", 3], "--calib is needed"),
        (["--calib", "rows.jsonl"], "the following arguments are required: --experts"),
        (["--experts", 3, "--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--experts", 4, "--calib", "rows.jsonl"], "each layer has 4; keep fewer"),
        (["--experts", 3, "--calib", "rows.jsonl", "--score", "best"], "invalid choice"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(words, message, given, tmp_path, script_here):
    model, file = given
    words = [file if word == "rows.jsonl" else word for word in words]
    done = script_here("expert_cut.py", "--model", model, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_before_data_are_read(tiny, tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here("expert_cut.py", "--model", tiny("llama"), "--experts", 1, "--calib", file, "--dry-run")
    assert done.returncode == 2 and "without a mixture of experts" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_dry_run_chooses_and_writes_nothing(given, tmp_path, script_here):
    model, file = given
    done = script_here("expert_cut.py", "--model", model, "--experts", 2, "--calib", file, "--dry-run", "--no-refit")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "dry run: nothing written"), done.stderr
