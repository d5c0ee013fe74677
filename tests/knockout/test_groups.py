"""Knockouts by groups of rows: each group's own figures, the worst one as the gate, and columns that make none."""

import json
import sys

import numpy as np
import pytest
from helpers.paths import EMBEDDED
from PIL import Image

from prunekit import scan as scan_command
from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import scanner
from prunekit.knockout import sweep as sweep_command
from prunekit.knockout.ranking import build_ranking, choose_from_ranking, read_ranking, removal_rows, write_ranking
from prunekit.knockout.records import Records
from prunekit.knockout.removal import MEAN, WORST, Removal
from prunekit.knockout.scanner import Job
from prunekit.knockout.search import Scan, find_path

SKILLS = ("count", "read")
METRICS = ("token_acc", "loss", "kl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """grouped.jsonl: twenty questions in two skills; SKILL.jsonl: those of one alone."""
    folder = tmp_path_factory.mktemp("grouped")
    Image.new("RGB", (192, 32), "white").save(folder / "image.png")
    rows = []
    for n in range(20):
        messages = [
            {"role": "user", "content": "<image>" + "a" * (n % 7)},
            {"role": "assistant", "content": f"{n}" * 3},
        ]
        rows.append({"messages": messages, "images": [str(folder / "image.png")], "skill": SKILLS[n % 2]})
    for name in ("grouped", *SKILLS):
        chosen = [row for row in rows if name in ("grouped", row["skill"])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def scan(out, dataset, *arguments):
    command = ["scan", "--model", EMBEDDED, "--dataset", dataset, "--out", out, "--device", "cpu", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, command)])
        scan_command.main()
    return json.loads((out / "scan.json").read_text())


LAYERS = ("--text", "5-7", "--vision", "4")


@pytest.fixture(scope="module")
def grouped(data, tmp_path_factory):
    """A folder with a scan by skill, and what it found."""
    out = tmp_path_factory.mktemp("scanned") / "scan"
    return out, scan(out, data / "grouped.jsonl", *LAYERS, "--by", "skill", "--greedy", 1)


@pytest.mark.parametrize("skill", SKILLS)
def test_a_groups_figures_are_those_of_its_rows_alone(grouped, data, tmp_path, skill):
    _, found = grouped
    alone = scan(tmp_path / "scan", data / f"{skill}.jsonl", *LAYERS)
    for mine, whole in zip([found["baseline"], *found["removals"]], [alone["baseline"], *alone["removals"]]):
        group = mine["groups"][skill]
        assert group["samples"] == whole["samples"] == 10
        assert [group[key] for key in METRICS] == pytest.approx([whole[key] for key in METRICS], rel=1e-4, abs=1e-6)
        if "standard_error" in whole:
            assert group["standard_error"] == pytest.approx(whole["standard_error"], rel=1e-3)


def test_groups_make_up_the_whole_along_the_path_too(grouped):
    _, found = grouped
    for entry in [found["baseline"], *found["removals"], *found["greedy"]["path"]]:
        groups = entry["groups"].values()
        for key in METRICS:
            total = sum(group[key] * group["tokens"] for group in groups)
            assert total / entry["tokens"] == pytest.approx(entry[key], rel=1e-4, abs=1e-6)


def test_a_finished_scan_is_grouped_anew_without_measuring(grouped, data, monkeypatch):
    out, found = grouped
    monkeypatch.setattr(scanner.Scanner, "measure", lambda *_: pytest.fail("measured again"))
    again = scan(out, data / "grouped.jsonl", *LAYERS, "--greedy", 1)
    assert "by" not in again and "groups" not in again["baseline"]
    worst = scan(out, data / "grouped.jsonl", *LAYERS, "--greedy", 1, "--by", "skill", "--gate", "worst")
    assert worst["removals"] == found["removals"] and (worst["by"], worst["gate"]) == ("skill", "worst")


def test_the_worst_gate_of_a_scan_puts_first_what_leaves_its_worst_group_most(grouped, data):
    out, _ = grouped
    found = scan(out, data / "grouped.jsonl", *LAYERS, "--greedy", 1, "--by", "skill", "--gate", "worst")
    base = found["baseline"]["groups"]
    kept = {
        entry["name"]: min(entry["groups"][skill]["token_acc"] / base[skill]["token_acc"] for skill in SKILLS)
        for entry in found["removals"]
    }
    assert [kept[name] for name in found["best"]] == sorted(kept.values(), reverse=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--by", "source"], "no column 'source'"), (["--by", "messages"], "has no word"),
        (["--gate", "worst"], "--by"), (["--by", "skill", "--gate", "worst", "--race"], "--race"),
        (["--by", "skill", "--gate", "median"], "--gate"),
        (["--by", "skill", "--dataset", "org/name"], "org/name is not there"),
    ],
)  # fmt: skip
def test_what_cant_be_grouped_is_refused_before_a_model_is_loaded(data, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(scanner, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(PruneKitError) as refused:
        scan(tmp_path / "out", data / "grouped.jsonl", *arguments)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_group_of_which_too_few_rows_are_drawn_is_named(data, tmp_path):
    with pytest.raises(PruneKitError, match="of the .* rows within --tokens 60"):
        scan(tmp_path / "out", data / "grouped.jsonl", "--by", "skill", "--tokens", 60)


def test_trainings_without_rows_to_group_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", "--model", str(EMBEDDED), "--out", str(tmp_path / "o"), "--by", "skill"])
    with pytest.raises(PruneKitError, match="VAL_DATASET"):
        sweep_command.main()
    assert not (tmp_path / "o").exists()


# --- the path and the ranking, on made-up figures


class MadeUp(Scan):
    """A scan of two samples, one a skill, whose losses rise by what `costs` says of each layer that is gone."""

    def __init__(self, costs):
        self.checkpoint, self.records, self.costs = open_checkpoint(EMBEDDED), Records(None), costs
        self.job, self.groups = Job(str(EMBEDDED), "made up", by="skill"), [list(SKILLS)]
        self.world, self.batches, self.parameters = 1, 1, 2_349_088

    def measure(self, gone, candidates, batches, what):
        names = [str(k) for k in gone]
        scores = {}
        for name in ["baseline", *map(str, candidates)]:
            losses = 1 + np.sum([self.costs[each] for each in [*names, name] if each != "baseline"] or [[0, 0]], axis=0)
            scores[name] = {"right": [1, 1], "loss": [*map(float, losses)], "kl": [0, 0], "tokens": [1, 1]}
        self.records.add({"gone": names, "batch": 0, "scores": scores, "influence": {}, "seconds": {"all": 1.0}})


@pytest.mark.parametrize("gate, chosen", [(MEAN, ["text-01", "text-02"]), (WORST, ["text-02", "text-03"])])
def test_a_path_by_the_worst_group_spares_the_one_that_has_lost_most(gate, chosen):
    """By the mean 1 goes, then 2. By the worst group 2, and then what costs the skill that has lost less."""
    costs = {"text-01": [0.115, 0.0], "text-02": [0.07, 0.05], "text-03": [0.0, 0.125]}
    layers = [Removal("text", number) for number in (1, 2, 3)]
    assert find_path(MadeUp(costs), layers, 2, None, None, gate=gate)[-1]["removed"] == chosen


def scores(count, read, **values):
    groups = {"count": {"token_acc": count, "loss": 1.0}, "read": {"token_acc": read, "loss": 1.0}}
    return {"token_acc": (count + read) / 2, "loss": 1.0, "error": None, "groups": groups} | values


def named(layer, count, read, **values):
    return {"name": f"text-{layer:02d}", "stack": "text", "layer": layer, **scores(count, read, **values)}


def made_ranking(gate, trained=(), by="skill"):
    found = {
        "predictor": "token_acc", "counts_suffix": True, "by": by, "gate": gate,
        "baseline": scores(0.5, 1.0, parameters=100), "removals": [named(1, 0.1, 1.0), named(2, 0.45, 0.6)],
        "greedy": {"healed": False, "path": [
            {"removed": [], "parameters": 100, "generation": None, **scores(0.5, 1.0)},
            {"removed": ["text-02"], "parameters": 90, "generation": None, **scores(0.45, 0.6)},
        ]},
    }  # fmt: skip
    return build_ranking(found, trained, "base", {}, by=by, gate=gate)


def test_by_the_mean_groups_are_told_and_rank_nothing():
    first, second = made_ranking(MEAN)["removals"]
    assert (first["name"], first["relative"]) == ("text-01", pytest.approx(0.55 / 0.75))
    assert (first["worst_group"], second["worst_group"]) == ("count", "read")
    assert first["groups"]["count"]["relative"] == pytest.approx(0.2)


def test_by_the_worst_group_relative_is_what_that_one_keeps_of_its_own():
    ranking = made_ranking(WORST)
    assert [entry["relative"] for entry in ranking["removals"]] == pytest.approx([0.6, 0.2])
    assert [entry["name"] for entry in ranking["removals"]] == ["text-02", "text-01"]
    assert [point["relative"] for point in ranking["greedy"]["path"]] == pytest.approx([1, 0.6])


def test_layers_are_chosen_by_what_their_worst_group_keeps(tmp_path):
    write_ranking(tmp_path, made_ranking(WORST))
    checkpoint = open_checkpoint(EMBEDDED)
    ranking = read_ranking(tmp_path / "ranking.json", checkpoint) | {"greedy": None}
    chosen = choose_from_ranking(checkpoint, ranking, keep_above=0.5)
    assert [str(removal) for removal, _ in chosen] == ["text-02"]


def test_a_trained_knockout_is_set_off_the_trained_baselines_groups():
    more = {"parameters": 90, "curve": [], "training": [], "seconds": 1.0}
    runs = [
        {"name": "baseline", "stack": None, "layer": None, **scores(0.8, 1.0), **more},
        named(1, 0.6, 1.0, **more),
    ]
    [entry] = [entry for entry in made_ranking(WORST, runs)["removals"] if entry["name"] == "text-01"]
    assert (entry["relative_scanned"], entry["relative_trained"]) == (pytest.approx(0.2), pytest.approx(0.75))
    assert entry["groups"]["count"]["relative"] == entry["relative"] == pytest.approx(0.75)


def test_a_group_that_the_baseline_gets_nothing_of_right_is_no_gate():
    found = {
        "predictor": "token_acc", "counts_suffix": True, "by": "skill", "gate": WORST,
        "baseline": scores(0.0, 1.0), "removals": [named(1, 0.0, 0.9)], "greedy": None,
    }  # fmt: skip
    [entry] = build_ranking(found, [], "base", {}, by="skill", gate=WORST)["removals"]
    assert (entry["worst_group"], entry["relative"]) == ("read", 0.9)


def test_a_ranking_without_groups_says_nothing_of_them():
    found = {
        "predictor": "token_acc", "counts_suffix": True, "greedy": None, "baseline": {"token_acc": 1.0},
        "removals": [{"name": "text-01", "stack": "text", "layer": 1, "token_acc": 0.5, "error": None}],
    }  # fmt: skip
    ranking = build_ranking(found, [], "base", {})
    assert not {"by", "gate"} & ranking.keys() and not {"groups", "worst_group"} & ranking["removals"][0].keys()


def test_the_table_for_spreadsheets_and_wandb_names_groups_in_its_columns():
    row = removal_rows(made_ranking(MEAN))[0]
    assert (row["worst_group"], row["groups_count_token_acc"]) == ("count", 0.1)
