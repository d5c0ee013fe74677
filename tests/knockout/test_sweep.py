"""Knockout sweeps: what a sweep's folder holds, and which folders are refused."""

import fcntl
import json
import os
import sys

import pytest

from prunekit.checkpoint import fingerprint, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import sweep as knockout
from prunekit.knockout.folder import check_folder
from prunekit.knockout.removal import list_removals
from prunekit.knockout.sweep import choose_runs, sweep_all
from prunekit.knockout.trained import Sweep, Training, run_name


class StubTraining(Training):
    """Trainings that only write the log that ms-swift would write."""

    def _train(self, run, work, gpus):
        (work / "swift").mkdir()
        token_acc = 0.5 if run is None else 0.4
        record = {"global_step/max_steps": "2/2", "eval_token_acc": token_acc, "eval_loss": 1.0}
        (work / "swift" / "logging.jsonl").write_text(json.dumps(record) + "\n")


def sweep(folder, out):
    return Sweep(StubTraining(folder, "qwen3_vl", out / "trained", (), "group"), [], 2)


def test_a_sweep_of_nothing_leaves_no_folder_of_trainings(tmp_path):
    """As MODE=scan is one: the launcher takes that folder for trainings, and would refuse the same command again."""
    assert not list(sweep(tmp_path / "model", tmp_path).do_all([]))
    assert not any(tmp_path.iterdir())


def test_a_sweep_without_a_scan_writes_a_ranking_relative_to_its_trained_baseline(tiny, tmp_path):
    runs = [None, *list_removals(open_checkpoint(tiny("qwen3_vl")), "0-1", "none")]
    sweep_all(sweep(tiny("qwen3_vl"), tmp_path), runs, None, tmp_path)
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert [removal["relative"] for removal in ranking["removals"]] == pytest.approx([0.8, 0.8])
    assert ranking["fingerprint"] == fingerprint(open_checkpoint(tiny("qwen3_vl")))


def scan_of(*losses):
    removals = [
        {
            "name": f"text-{layer:02d}", "stack": "text", "layer": layer, "parameters": 90, "parameters_saved": 10,
            "latency_saved": 0.1, "token_acc": 0.9 - loss / 10, "loss": loss, "kl": loss, "block_influence": 0.1,
            "standard_error": {"token_acc": 0.01, "loss": 0.01, "kl": 0.01}, "samples": 9, "tokens": 90,
            "decided": True, "generation": None, "error": None,
        }
        for layer, loss in enumerate(losses)
    ]  # fmt: skip
    return {
        "predictor": "loss",
        "counts_suffix": True,
        "baseline": {"token_acc": 0.9, "loss": 1.0, "kl": 0.0, "samples": 9, "tokens": 90, "parameters": 100},
        "removals": removals,
        "greedy": None,
        "best": [entry["name"] for entry in sorted(removals, key=lambda entry: entry["loss"])],
        "settings": {},
    }


@pytest.fixture
def runs(tiny):
    return [None, *list_removals(open_checkpoint(tiny("qwen3_vl")), "0-2", "none")]


def names(chosen):
    return [run_name(run) for run in chosen]


def test_the_best_of_a_scan_are_trained_beside_the_baseline(runs):
    assert names(choose_runs(runs, scan_of(3, 1, 2), 2)) == ["baseline", "text-01", "text-02"]


def test_all_means_every_removal_of_the_scan(runs):
    assert len(choose_runs(runs, scan_of(3, 1, 2), None)) == 4


def test_without_a_scan_everything_is_trained(runs):
    assert choose_runs(runs, None, 1) == runs


def test_no_finalists_means_no_training(runs):
    assert choose_runs(runs, scan_of(3, 1, 2), 0) == choose_runs(runs, None, 0) == []


def test_finalists_have_scanned_and_trained_values_side_by_side(tiny, runs, tmp_path):
    scan = scan_of(3, 1, 2)
    ranking = sweep_all(sweep(tiny("qwen3_vl"), tmp_path), choose_runs(runs, scan, 1), scan, tmp_path)
    first, *others = ranking["removals"]
    assert (first["name"], first["relative_trained"]) == ("text-01", pytest.approx(0.8))
    assert first["relative_scanned"] == pytest.approx(0.8 / 0.9)
    assert [entry["trained"] for entry in others] == [None, None]
    assert {path.name for path in tmp_path.iterdir()} == {
        "ranking.json", "ranking.csv", "ranking.png", "curves.png", "trained"
    }  # fmt: skip


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["knockout", *map(str, arguments)])
    knockout.main()


def test_a_sweep_of_other_settings_in_the_same_folder_is_refused(monkeypatch, tiny, tmp_path):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "settings.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(PruneKitError, match="other settings"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)


def test_a_folder_that_is_no_sweep_is_refused_and_left_as_it_is(monkeypatch, tiny, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(PruneKitError, match="no sweep"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_a_folder_that_only_has_a_sweeps_names_in_it_is_none(tmp_path):
    (tmp_path / "ranking.json").write_text("mine")
    with pytest.raises(PruneKitError, match="no sweep"):
        check_folder(tmp_path)
    (tmp_path / "trained").mkdir()
    check_folder(tmp_path)


@pytest.mark.parametrize("draft", [".ranking.png.4711.new", ".ranking.json.4711.new", ".ranking.csv.new"])
def test_a_sweep_that_was_killed_while_it_drew_goes_on(monkeypatch, tiny, tmp_path, draft):
    monkeypatch.setattr(knockout, "Training", StubTraining)
    (tmp_path / "trained").mkdir()
    (tmp_path / draft).write_text("half")
    run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path, "--text", "0", "--vision", "none")
    assert (tmp_path / "ranking.json").exists() and not (tmp_path / draft).exists()


def test_two_sweeps_in_one_folder_are_refused(monkeypatch, tiny, tmp_path):
    (tmp_path / "trained").mkdir()
    with (tmp_path / "trained" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PruneKitError, match="another sweep"):
            run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)


def test_more_jobs_than_gpus_are_refused(monkeypatch, tiny, tmp_path):
    with pytest.raises(PruneKitError, match="--jobs 3"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path, "--gpus", "0,1", "--jobs", "3")


def test_a_number_of_finalists_that_is_none_is_refused(monkeypatch, tiny, tmp_path):
    with pytest.raises(PruneKitError, match="--finalists: 'many'"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path / "out", "--finalists", "many")


@pytest.mark.parametrize("gpus, jobs", [("0,1,2", 2), ("0,1,2,3,4,5,6,7", 3)])
def test_gpus_that_can_t_be_shared_out_evenly_are_refused(monkeypatch, tiny, tmp_path, gpus, jobs):
    with pytest.raises(PruneKitError, match="evenly"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path / "o", "--gpus", gpus, "--jobs", jobs)
    assert not (tmp_path / "o").exists()


def test_a_sweep_goes_on_with_as_many_gpus_a_run_only(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(knockout, "Training", StubTraining)
    sweep_on = ("--model", tiny("qwen3_vl"), "--out", tmp_path, "--text", "0", "--vision", "none", "--gpus")
    run_main(monkeypatch, *sweep_on, "0,1", "--jobs", 1)
    run_main(monkeypatch, *sweep_on, "0,1,2,3", "--jobs", 2)
    with pytest.raises(PruneKitError, match="other settings"):
        run_main(monkeypatch, *sweep_on, "0,1,2,3", "--jobs", 1)


def test_a_scan_of_another_model_is_refused(monkeypatch, tiny, tmp_path):
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "scan.json").write_text(json.dumps(scan_of(1, 2) | {"settings": {"fingerprint": "another"}}))
    with pytest.raises(PruneKitError, match="another model"):
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)


SCAN = scan_of(1, 2) | {"settings": {"fingerprint": "x"}}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", b"\xff", "[" * 100_000,
        *(json.dumps({key: value for key, value in SCAN.items() if key != gone}) for gone in SCAN),
        *(json.dumps(SCAN | {key: 1}) for key in SCAN if key != "counts_suffix"),
        json.dumps(SCAN | {"removals": [SCAN["removals"][0] | {"loss": "1"}]}),
        json.dumps(SCAN | {"greedy": {"path": [{"removed": [1], "token_acc": 1, "loss": 1, "parameters": 1}]}}),
    ],
    ids=lambda content: str(content)[:20],
)  # fmt: skip
def test_a_damaged_scan_is_named_in_one_line(monkeypatch, tiny, tmp_path, content):
    (tmp_path / "scan").mkdir()
    file = tmp_path / "scan" / "scan.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PruneKitError, match="scan.json") as refused:
        run_main(monkeypatch, "--model", tiny("qwen3_vl"), "--out", tmp_path)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"scan"}


@pytest.mark.parametrize("said, threads", [({}, max(1, (os.cpu_count() or 1) // 2)), ({"OMP_NUM_THREADS": "3"}, None)])
def test_runs_side_by_side_share_the_cores_unless_the_user_says_how_many(tiny, tmp_path, monkeypatch, said, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "argv", ["sweep", "--model", str(tiny("qwen3")), "--out", str(tmp_path / "o"), "--jobs", "2"]
    )

    class Seen(Exception):
        pass

    def see(made, *_):
        raise Seen(made.training.threads, os.environ.get("OMP_NUM_THREADS"))

    monkeypatch.setattr(knockout, "sweep_all", see)
    with pytest.raises(Seen) as seen:
        knockout.main()
    assert seen.value.args == (threads, said.get("OMP_NUM_THREADS"))
