"""A ranking as files, pictures and a W&B run."""

import csv
import json

import pytest
from helpers.rankings import NAN, fewer, path, removal, run, scan

from prunekit.knockout.ranking import build_ranking, log_to_wandb, write_ranking


@pytest.fixture
def ranking():
    found = scan(
        removal(0, 0.79, generation={"exact_match": 0.5, "cer": 0.2, "samples": 4}),
        removal(1, NAN),
        removal(2, None, error="one,\ntwo"),
        greedy=path(0.8, 0.79, 0.7),
    )
    return build_ranking(found, [run("baseline", 0.9), run("text-00", 0.85)], "base", {"steps": 3})


def test_the_json_file_has_null_for_what_is_no_number(ranking, tmp_path):
    write_ranking(tmp_path, ranking)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "ranking.json").read_text(), parse_constant=refuse) == ranking


def test_the_csv_file_has_a_line_for_each_removal_with_every_metric(ranking, tmp_path):
    write_ranking(tmp_path, ranking)
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["text-00", "text-01", "text-02"]
    wanted = {
        "token_acc": "0.79", "kl": str(1 - 0.79), "block_influence": "0.5", "standard_error_loss": "0.02",
        "generation_exact_match": "0.5", "trained_token_acc": "0.85", "parameters_saved": "10",
        "latency_saved": "0.1", "finalist": "True", "relative": str(0.85 / 0.9),
    }  # fmt: skip
    assert wanted.items() <= rows[0].items()


def test_numbers_of_experts_are_in_every_file_behind_the_layers(tmp_path):
    found = scan(removal(0, 0.79), removal(1, 0.7)) | {"experts": [fewer(6, 0.78), fewer(4, 0.6)]}
    ranking = build_ranking(found, [run("baseline", 0.9), run("text-00", 0.85)], "base", {})
    assert [entry["layer"] for entry in ranking["removals"]] == [0, 1], "there are layers alone to choose from"
    assert [(entry["experts"], entry["relative"]) for entry in ranking["experts"]] == [(6, 0.78 / 0.8), (4, 0.6 / 0.8)]
    assert "ranking.png" in {path.name for path in write_ranking(tmp_path, ranking)}
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["text-00", "text-01", "experts-06", "experts-04"]
    assert [rows[-1][key] for key in ("stack", "layer", "experts", "token_acc")] == ["experts", "", "4", "0.6"]


def test_a_ranking_leaves_its_files_and_no_drafts(ranking, tmp_path):
    pictures = write_ranking(tmp_path, ranking)
    assert {path.name for path in pictures} == {"ranking.png", "greedy.png", "curves.png"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "ranking.json", "ranking.csv", *(path.name for path in pictures)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "runs"),
    [(scan(), []), (scan(removal(0, None, error="boom")), []), (None, []), (None, [run("baseline", 0.9)])],
    ids=["nothing scanned", "all failed", "nothing at all", "baseline only"],
)
def test_a_ranking_of_little_is_written_without_pictures_of_removals(found, runs, tmp_path):
    write_ranking(tmp_path, build_ranking(found, runs, "base", {}))
    assert (tmp_path / "ranking.json").exists() and not (tmp_path / "ranking.png").exists()


def test_a_table_that_breaks_off_leaves_the_one_before_it(ranking, tmp_path, monkeypatch):
    write_ranking(tmp_path, ranking)
    before = (tmp_path / "ranking.csv").read_text()

    def broken(self, rows):
        raise OSError("the disk is full")

    monkeypatch.setattr(csv.DictWriter, "writerows", broken)
    with pytest.raises(OSError, match="disk is full"):
        write_ranking(tmp_path, ranking)
    assert (tmp_path / "ranking.csv").read_text() == before


def test_a_path_of_one_point_is_no_picture(tmp_path):
    pictures = write_ranking(tmp_path, build_ranking(scan(removal(0, 0.7), greedy=path(0.8)), [], "base", {}))
    assert [path.name for path in pictures] == ["ranking.png"]


def test_a_line_of_the_table_says_once_what_was_removed(ranking, tmp_path):
    write_ranking(tmp_path, ranking)
    header = (tmp_path / "ranking.csv").read_text().splitlines()[0].split(",")
    assert not {"trained_name", "trained_stack", "trained_layer", "trained_error"} & set(header)
    assert {"trained_loss", "trained_seconds", "name", "stack", "error"} <= set(header)


def test_wandb_gets_a_run_of_the_sweeps_group(ranking, tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # what an earlier test began in this process keeps its own settings
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log_to_wandb(ranking, write_ranking(tmp_path, ranking), "my-group")
    wandb.teardown()  # a run of no network may still be on its way to its file when it has finished
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert [
        word for word in (b"my-group", b"knockout/ranking", b"removals", b"greedy_path") if word not in content
    ] == []


def test_wandb_failing_is_one_line_and_no_error(ranking, monkeypatch, capsys):
    import wandb

    def broken(**kwargs):
        raise OSError("no network,\nno run")

    monkeypatch.setattr(wandb, "init", broken)
    log_to_wandb(ranking, [], "group")
    assert capsys.readouterr().err == "warning: W&B has no ranking (no network, no run); see the files\n"
