"""Knockout sweeps: what is planned, what a restart repeats, what a failure leaves."""

import fcntl
import json

import pytest

from prunekit import knockout
from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import Knockout, Sweep, plan_knockouts, sweep_all


class StubSweep(Sweep):
    """A sweep whose trainings only write the log that ms-swift would write."""

    failing: frozenset = frozenset()

    def _train(self, run, model, work, gpus):
        self.trained = [*getattr(self, "trained", []), run.name]
        if run.name in self.failing:
            raise RuntimeError("CUDA out of memory")
        layers = open_checkpoint(model).config["text_config"]["num_hidden_layers"]
        record = {"global_step/max_steps": "2/2", "eval_token_acc": 0.1 * layers, "eval_loss": 1.0}
        (work / "swift").mkdir()
        (work / "swift" / "logging.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture
def checkpoint(tiny):
    return open_checkpoint(tiny("qwen3_vl"))


@pytest.fixture
def sweep(checkpoint, tmp_path):
    (tmp_path / "runs").mkdir()
    return StubSweep(checkpoint, tmp_path, [], "group", [], 2, "qwen3_vl")


def test_all_means_the_baseline_and_every_layer(checkpoint):
    names = [run.name for run in plan_knockouts(checkpoint, "all", "all")]
    assert names == ["baseline", *(f"text-{i:02d}" for i in range(5)), *(f"vision-{i:02d}" for i in range(6))]


def test_ranges_and_none_choose_layers(checkpoint):
    assert [run.name for run in plan_knockouts(checkpoint, "1-2,4", "none")] == [
        "baseline",
        "text-01",
        "text-02",
        "text-04",
    ]


def test_a_layer_out_of_range_is_refused_before_any_run(checkpoint):
    with pytest.raises(PruneKitError, match="5"):
        plan_knockouts(checkpoint, "5", "none")


def test_a_sweep_writes_a_ranking_relative_to_its_baseline(sweep, checkpoint):
    assert sweep_all(sweep, plan_knockouts(checkpoint, "0-1", "none"), {}) == []
    ranking = json.loads((sweep.out / "ranking.json").read_text())
    assert [removal["relative"] for removal in ranking["removals"]] == pytest.approx([0.8, 0.8])


def test_no_temporary_checkpoint_is_left(sweep, checkpoint):
    sweep_all(sweep, plan_knockouts(checkpoint, "0", "0"), {})
    assert not list(sweep.out.rglob("*.safetensors"))


def test_a_restart_repeats_no_finished_run(sweep, checkpoint):
    sweep_all(sweep, plan_knockouts(checkpoint, "0", "none"), {})
    sweep.trained = []
    sweep_all(sweep, plan_knockouts(checkpoint, "0-1", "none"), {})
    assert sweep.trained == ["text-01"]


def test_a_failed_run_is_recorded_and_the_others_go_on(sweep, checkpoint):
    sweep.failing = frozenset({"text-00"})
    failed = sweep_all(sweep, plan_knockouts(checkpoint, "0-1", "none"), {})
    ranking = json.loads((sweep.out / "ranking.json").read_text())
    assert failed == ["text-00: CUDA out of memory"]
    assert [removal["name"] for removal in ranking["removals"]] == ["text-01", "text-00"]


def test_a_failed_run_is_tried_again_by_a_restart(sweep, checkpoint):
    sweep.failing = frozenset({"text-00"})
    sweep_all(sweep, plan_knockouts(checkpoint, "0", "none"), {})
    sweep.failing, sweep.trained = frozenset(), []
    assert sweep_all(sweep, plan_knockouts(checkpoint, "0", "none"), {}) == []
    assert sweep.trained == ["text-00"]


def test_the_last_line_of_a_log_that_is_no_wandb_message_tells_the_failure(tmp_path):
    (tmp_path / "log").write_text("step 1\nValueError: no such flag\nwandb: find logs at x\n\n")
    assert knockout._last_line(tmp_path / "log") == "ValueError: no such flag"


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


def test_gpus_are_shared_out_among_jobs(checkpoint, tmp_path):
    sweep = Sweep(checkpoint, tmp_path, [], "group", ["0", "1", "2", "3"], 2, "qwen3_vl")
    assert [sweep.slots.get() for _ in range(2)] == [["0", "2"], ["1", "3"]]


def test_the_fingerprint_changes_when_weights_are_written_again(own):
    folder = own("qwen3_vl")
    before = knockout.fingerprint(open_checkpoint(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert knockout.fingerprint(open_checkpoint(folder)) != before


def test_names_sort_in_the_order_of_layers():
    names = [Knockout("text", layer).name for layer in (2, 10)]
    assert names == sorted(names)
