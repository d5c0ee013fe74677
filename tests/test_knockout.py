"""Knockout sweeps: what a sweep's folder holds, and which folders are refused."""

import fcntl
import json

import pytest

from prunekit import knockout
from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import Sweep, plan_knockouts, sweep_all
from prunekit.trained_knockouts import Training


class StubTraining(Training):
    """Trainings that only write the log that ms-swift would write."""

    def _train(self, run, work, gpus):
        (work / "swift").mkdir()
        token_acc = 0.5 if run.stack is None else 0.4
        record = {"global_step/max_steps": "2/2", "eval_token_acc": token_acc, "eval_loss": 1.0}
        (work / "swift" / "logging.jsonl").write_text(json.dumps(record) + "\n")


def test_a_sweep_writes_a_ranking_relative_to_its_baseline(tiny, tmp_path):
    sweep = Sweep(StubTraining(tiny("qwen3_vl"), "qwen3_vl", tmp_path, (), "group"), [], 2)
    runs = plan_knockouts(open_checkpoint(tiny("qwen3_vl")), "0-1", "none")
    assert sweep_all(sweep, runs, {}) == []
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert [removal["relative"] for removal in ranking["removals"]] == pytest.approx([0.8, 0.8])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["knockout", *map(str, arguments)])
    knockout.main()


def test_a_sweep_of_other_settings_in_the_same_folder_is_refused(monkeypatch, tiny, tmp_path):
    (tmp_path / "settings.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(PruneKitError, match="other settings"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)


def test_a_folder_that_is_no_sweep_is_refused_and_left_as_it_is(monkeypatch, tiny, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(PruneKitError, match="no sweep"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_two_sweeps_in_one_folder_are_refused(monkeypatch, tiny, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PruneKitError, match="another sweep"):
            run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)


def test_more_jobs_than_gpus_are_refused(monkeypatch, tiny, tmp_path):
    with pytest.raises(PruneKitError, match="--jobs 3"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path, "--gpus", "0,1", "--jobs", "3")


def test_the_fingerprint_changes_when_weights_are_written_again(own):
    folder = own("qwen3_vl")
    before = knockout.fingerprint(open_checkpoint(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert knockout.fingerprint(open_checkpoint(folder)) != before
