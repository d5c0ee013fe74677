"""Searches among removals: races, greedy paths, a cluster's answers, all in this process."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from helpers.paths import EMBEDDED
from helpers.scans import LAYERS, record
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.checkpoint import open_checkpoint
from prunekit.data import encode
from prunekit.data.batches import read_calibration
from prunekit.knockout import cluster
from prunekit.knockout.records import Records
from prunekit.knockout.removal import Removal
from prunekit.knockout.scanner import Job
from prunekit.knockout.search import Scan, calibration_of, find_path


class MadeUp(Scan):
    """A scan whose removals cost what `costs` says, give or take `noise`, in batches of four samples.

    Any two of them together cost `both` more, by their names.
    """

    def __init__(self, costs, noise=0.0, batches=64, both=None):
        self.checkpoint, self.records = open_checkpoint(EMBEDDED), Records(None)
        self.job = Job(str(EMBEDDED), "made up")
        self.world, self.batches, self.costs, self.noise = 1, batches, costs, noise
        self.parameters, self.both = 2_349_088, both or {}
        self.measured = {name: 0 for name in costs}

    def cost(self, names):
        return sum(self.costs[name] for name in names) + sum(
            self.both.get(pair, 0) for pair in combinations(sorted(names), 2)
        )

    def measure(self, gone, candidates, batches, what):
        names = [str(k) for k in gone]
        base = self.cost(names)
        for index in batches:
            known = self.records.scores.get((tuple(names), index), {})
            draws = np.random.default_rng(index)
            common = draws.normal(size=4)
            scores = {}
            for name in ["baseline", *(str(k) for k in candidates)]:
                if name in known:
                    continue
                own = np.random.default_rng([index, sum(map(ord, name))]).normal(size=4) * self.noise
                cost = base if name == "baseline" else self.cost([*names, name])
                scores[name] = {
                    "right": list(-common - cost - own),  # token_acc tells them apart as the loss does
                    "loss": list(5 + common + cost + own),
                    "kl": [cost] * 4,
                    "tokens": [1] * 4,
                }
                if name in self.measured:
                    self.measured[name] += 1
            self.records.add(record(names, index, scores))


def costs(values):
    return {str(layer): value for layer, value in zip(LAYERS, values)}


@settings(deadline=None, max_examples=25)
@given(st.permutations([0.1 * i for i in range(14)]), st.integers(1, 13))
def test_a_race_finds_the_best_of_removals_that_differ_clearly(values, keep):
    scan = MadeUp(costs(values), noise=0.05)
    best, undecided = scan.race([], LAYERS, keep, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert set(best) == set(sorted(scan.costs, key=scan.costs.get)[:keep])
    assert not undecided


def test_a_race_measures_clear_cases_least():
    scan = MadeUp(costs([0.0, 0.01, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]), noise=0.3)
    scan.race([], LAYERS, 1, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert scan.measured["text-02"] < scan.measured["text-01"] / 4


def test_a_race_ends_with_its_share_of_the_work_and_names_what_is_undecided():
    scan = MadeUp(costs([0.0] * 14), noise=1.0)
    best, undecided = scan.race([], LAYERS, 5, {str(k): 1.0 for k in LAYERS}, share=0.25)
    assert len(best) == 5
    assert undecided
    assert max(scan.measured.values()) <= 0.4 * scan.batches


def test_a_race_on_few_samples_decides_nothing_and_a_path_goes_on():
    scan = MadeUp(costs([0.1 * i for i in range(14)]), batches=1)
    best, undecided = scan.race([], LAYERS, 3, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert (best, undecided) == (["text-00", "text-01", "text-02"], {str(k) for k in LAYERS})
    assert len(find_path(scan, LAYERS, 2, None, race_share=1.0)) == 3


def test_a_race_for_all_there_are_decides_at_once():
    scan = MadeUp(costs([0.1 * i for i in range(14)]))
    best, undecided = scan.race([], LAYERS, 14, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert (len(best), undecided) == (14, set())


def test_the_greedy_path_removes_what_costs_least_per_parameter():
    values = [1.0] * 14
    values[3], values[9] = 0.11, 0.10  # a text layer is 1.27 times a vision block
    path = find_path(MadeUp(costs(values)), LAYERS, 2, None, None)
    assert [entry["removed"] for entry in path] == [[], ["text-03"], ["text-03", "vision-01"]]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(0, 50), min_size=14, max_size=14), st.data())
def test_the_greedy_path_is_the_exhaustive_one_where_costs_grow_with_what_is_gone(values, data):
    pairs = list(combinations(sorted(map(str, LAYERS)), 2))
    extra = data.draw(st.lists(st.integers(0, 20), min_size=len(pairs), max_size=len(pairs)))
    scan = MadeUp(costs([value / 100 for value in values]), batches=1, both={p: e / 100 for p, e in zip(pairs, extra)})
    for before, after in pairwise(find_path(scan, LAYERS, 4, None, None)):
        gone = before["removed"]
        possible = [k for k in LAYERS if str(k) not in gone and scan.parameters_without([*map(Removal.parse, gone), k])]
        per_parameter = {
            str(k): (scan.cost([*gone, str(k)]) - scan.cost(gone))
            / (before["parameters"] - scan.parameters_without([*map(Removal.parse, gone), k]))
            for k in possible
        }
        [chosen] = set(after["removed"]) - set(gone)
        assert per_parameter[chosen] == pytest.approx(min(per_parameter.values()), abs=1e-9)


def test_a_path_measures_dear_layers_once():
    scan = MadeUp(costs([0.01 * i**2 for i in range(14)]), batches=1)
    find_path(scan, LAYERS, 3, None, None)
    assert [scan.measured[str(LAYERS[place])] for place in (1, 13)] == [2, 1]


def test_the_greedy_path_ends_at_the_parameters_asked_for():
    scan = MadeUp(costs([0.1 * i for i in range(14)]))
    path = find_path(scan, LAYERS, None, 0.75, None)
    assert path[-1]["parameters"] <= 0.75 * scan.parameters < path[-2]["parameters"]


def test_the_greedy_path_ends_where_nothing_more_can_be_removed():
    path = find_path(MadeUp(costs([0.1 * i for i in range(14)])), LAYERS, 99, None, None)
    taps = open_checkpoint(EMBEDDED).config["vision_config"]["deepstack_visual_indexes"]
    assert len(path[-1]["removed"]) == 14 - 2 * len(taps)  # each tap needs a block, and a text layer to enter


def test_a_raced_path_is_the_full_one_where_removals_differ_clearly():
    values = [((i * 5) % 14) * 0.1 for i in range(14)]
    full = find_path(MadeUp(costs(values)), LAYERS, 4, None, None)
    raced = find_path(MadeUp(costs(values), noise=0.02), LAYERS, 4, None, 1.0)
    assert [entry["removed"] for entry in raced] == [entry["removed"] for entry in full]


def test_a_removal_scored_on_few_samples_is_set_off_the_baseline_on_all():
    scan = MadeUp(costs([0.5] * 14))
    scan.measure([], [], range(64), "")
    scan.measure([], LAYERS[:1], range(3), "")
    base, found = scan.score([], "baseline"), scan.score([], "text-00")
    assert found["loss"] - base["loss"] == pytest.approx(0.5, abs=1e-4)
    assert found["samples"] == 12


def test_a_cluster_s_answers_are_those_of_one_machine(monkeypatch, answers):
    job = Job(str(EMBEDDED), str(answers), device="cpu")
    removals = [[Removal("text", 7)], [Removal("text", 3), Removal("vision", 2)]]
    here = Scan(job, None, quiet=True).generate(removals, 5, 3)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "run_tasks", lambda function, items, gpus: [(i, function(i)) for i in reversed(items)])
    assert Scan(job, None, quiet=True).generate(removals, 5, 3) == here
    assert [found["samples"] for found in here] == [5, 5]


def test_other_rows_are_encoded_by_the_template_that_is_loaded(answers, texts, monkeypatch):
    loaded: list[str] = []
    load = encode.load_template
    monkeypatch.setattr(encode, "load_template", lambda *arguments: loaded.append("one") or load(*arguments))
    job = Job(str(EMBEDDED), str(answers), device="cpu", max_length=300)
    for rows in (answers, texts):
        assert calibration_of(job, read_calibration(rows), 400).fit
    assert loaded == ["one"]
