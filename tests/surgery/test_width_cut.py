"""The script width_cut.py: what it says, records, draws and refuses."""

import re

import pytest
from helpers.calibration import write_texts
from helpers.paths import EMBEDDED

from prunekit.checkpoint import history, open_checkpoint
from prunekit.data.batches import calibrate
from prunekit.model.load import load_model
from prunekit.surgery.width import plan_width
from prunekit.surgery.width_fit import fit_once


def test_the_script_cuts_on_data_records_it_and_draws_the_heads(tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here(
        "width_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--head-share", 0.5, "--neuron-share", 0.75,
        "--calib", file, "--calib-tokens", 600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"held-out loss \d+\.\d+ -> \d+\.\d+", done.stdout)
    (entry,) = history(tmp_path / "out")
    assert entry["removed"] == {"heads": 4, "intermediate_size": 64}
    assert entry["settings"]["score"] == "activation" and entry["settings"]["masked"] == []
    assert [len(row) for row in entry["heads_removed"]] == [4] * 8
    assert [len(row) for row in entry["head_scores"]] == [8] * 8
    assert (entry["neurons_before"], entry["neurons"]) == (256, 192)
    assert "| attention heads | 8 | 4 | -50.0% |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "heads.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.ci
def test_the_script_takes_the_refits_that_lose_less_on_held_out_rows(tmp_path, script_here):
    file, checkpoint = write_texts(tmp_path / "texts.jsonl"), open_checkpoint(EMBEDDED)
    done = script_here(
        "width_cut.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--heads", 4, "--calib", file,
        "--calib-tokens", 600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = {}
    for made_up in (1.0, 0.25):
        model = load_model(checkpoint)
        calibration = calibrate(model, checkpoint, file, 600)
        plan = plan_width(checkpoint, heads_kept=4)
        found = fit_once(plan, model, calibration, "activation", made_up).metrics
        losses[made_up] = found["held_out_loss"]
    assert losses[1.0] != losses[0.25]
    (entry,) = history(tmp_path / "out")
    assert entry["settings"]["made_up"] == min(losses, key=losses.get)
    assert entry["metrics"]["held_out_loss"] == pytest.approx(min(losses.values()), abs=1e-3)


def test_the_script_says_that_masks_save_no_time(tiny, tmp_path, script_here):
    done = script_here("width_cut.py", "--model", tiny("bert"), "--out", tmp_path / "out", "--heads", 2)
    assert done.returncode == 0, done.stderr
    assert "heads are zeroed, not removed (bert" in done.stdout and "nor faster" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", 3], "--heads 3: the model has 4 attention heads"),
        (["--heads", 2, "--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--heads", 2, "--score", "taylor"], "--score taylor needs --calib"),
        (["--heads", 2, "--head-share", 0.5], "not allowed with"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(arguments, message, tiny, tmp_path, script_here):
    done = script_here("width_cut.py", "--model", tiny("llama"), "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tiny, tmp_path, script):
    done = script("width_cut.py", "--model", tiny("llama"), "--neuron-share", 0.5, "--dry-run")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "dry run: nothing written")
