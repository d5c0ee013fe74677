"""ranking.json says which removals are cheap, whatever the scan and the trainings came to."""

import math
import subprocess
import sys

import pytest
from helpers.rankings import NAN, path, removal, run, scan
from hypothesis import given
from hypothesis import strategies as st

from prunekit.knockout.ranking import build_ranking, finalists, find_bend


def ranked(*args):
    return {entry["name"]: entry for entry in build_ranking(*args, "base", {})["removals"]}


def names(*args):
    return list(ranked(*args))


# --- order -----------------------------------------------------------------------------------------------------------


def test_trained_removals_come_first_by_what_training_left():
    found = scan(removal(0, 0.79), removal(1, 0.78), removal(2, 0.7))
    assert names(found, [run("baseline", 0.9), run("text-00", 0.8), run("text-01", 0.85)]) == [
        "text-01", "text-00", "text-02"
    ]  # fmt: skip


@pytest.mark.parametrize("predictor", ["loss", "kl", "block_influence", "token_acc"])
def test_untrained_removals_come_cheapest_first_by_the_predictor(predictor):
    cheap, dear = (0.7, 0.1) if predictor == "token_acc" else (0.1, 0.7)
    removals = [removal(0, 0.5) | {predictor: dear}, removal(1, 0.5) | {predictor: cheap}]
    found = scan(*removals, predictor=predictor)
    assert names(found, []) == ["text-01", "text-00"]


@pytest.mark.parametrize("failed", [removal(0, None, error="boom"), removal(0, NAN), removal(0, 0.9, loss=NAN)])
def test_a_failed_removal_is_last_and_has_no_share(failed):
    found = ranked(scan(failed, removal(1, 0.1)), [])
    assert (list(found), found["text-00"]["relative"]) == (["text-01", "text-00"], None)


@pytest.mark.parametrize(("token_acc", "error"), [(None, "out of memory"), (NAN, None)])
def test_a_removal_whose_training_failed_is_not_ranked_by_its_scan(token_acc, error):
    found = ranked(scan(removal(0, 0.79), removal(1, 0.1)), [run("baseline", 0.9), run("text-00", token_acc, error)])
    assert list(found) == ["text-01", "text-00"]
    assert found["text-00"]["relative"] is None and found["text-00"]["error"]


# None: failed. In thousandths: of two that differ by less than 1 - token_acc can, the loss would say they are the same
SCANNED = st.none() | st.integers(0, 1000).map(lambda count: count / 1000) | st.just(NAN)
RESULTS = st.lists(st.tuples(SCANNED, st.just("untrained") | SCANNED), max_size=9)


def ranked_results(results):
    """The ranking of removals whose scanned and trained token_acc are given."""
    found = scan(*(removal(i, acc, error=None if acc is not None else "boom") for i, (acc, _) in enumerate(results)))
    runs = [
        run(f"text-{i:02d}", acc, None if acc is not None else "boom")
        for i, (_, acc) in enumerate(results)
        if acc != "untrained"
    ]
    return build_ranking(found, [run("baseline", 0.9), *runs], "base", {})["removals"]


@given(RESULTS)
def test_the_order_is_trained_then_scanned_then_failed_each_from_cheap_to_dear(results):
    keys = []
    for entry in ranked_results(results):
        failed, untrained = entry["relative"] is None, entry["trained"] is None
        keys.append((2, 0) if failed else (untrained, -entry["relative"]))
    assert keys == sorted(keys)


@given(RESULTS)
def test_a_removal_has_a_share_if_it_was_measured_last_without_failing(results):
    shares = {entry["layer"]: entry["relative"] for entry in ranked_results(results)}
    expected = {}
    for layer, (scanned, trained) in enumerate(results):
        last = scanned if trained == "untrained" else trained
        expected[layer] = scanned is not None and last is not None and not math.isnan(last)
    assert {layer: share is not None for layer, share in shares.items()} == expected


# --- shares ----------------------------------------------------------------------------------------------------------


def test_a_scanned_share_is_of_the_scanned_baseline():
    assert ranked(scan(removal(0, 0.4)), [])["text-00"]["relative_scanned"] == pytest.approx(0.5)


def test_a_trained_share_is_of_the_trained_baseline_and_counts():
    found = ranked(scan(removal(0, 0.4)), [run("baseline", 0.9), run("text-00", 0.81)])["text-00"]
    assert found["relative"] == found["relative_trained"] == pytest.approx(0.9)


@pytest.mark.parametrize("baseline", [[], [run("baseline", 0.9, "loss is NaN")]], ids=["none", "failed"])
def test_without_a_trained_baseline_the_scan_counts(baseline):
    found = ranked(scan(removal(0, 0.4)), [*baseline, run("text-00", 0.81)])["text-00"]
    assert (found["relative_trained"], found["relative"]) == (None, pytest.approx(0.5))


def test_trained_knockouts_need_no_scan():
    runs = [run("baseline", 0.8), run("text-00", 0.4), run("text-01", 0.76), run("vision-00", None, "boom")]
    found = ranked(None, runs)
    assert list(found) == ["text-01", "text-00", "vision-00"]
    assert found["text-01"]["relative"] == pytest.approx(0.95)


def test_trained_knockouts_without_a_baseline_have_no_shares():
    assert ranked(None, [run("text-00", 0.4)])["text-00"]["relative"] is None


def test_a_baseline_that_gets_nothing_right_gives_no_shares():
    nothing = scan(removal(0, 0.4)) | {"baseline": {"token_acc": 0.0, "parameters": 100}}
    assert ranked(nothing, [])["text-00"]["relative"] is None


def test_finalists_are_those_that_were_trained():
    found = ranked(scan(removal(0, 0.4), removal(1, 0.5)), [run("baseline", 0.9), run("text-00", 0.8)])
    assert {name: entry["finalist"] for name, entry in found.items()} == {"text-00": True, "text-01": False}


# --- whom to train ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, ["text-02"]), (9, ["text-02", "text-00"]), (None, ["text-02", "text-00"])],
)
def test_the_cheapest_go_to_the_final_and_failed_ones_never(count, expected):
    found = scan(removal(0, 0.5), removal(1, None, error="boom"), removal(2, 0.7), removal(3, NAN))
    assert finalists(found, count) == expected


# --- the greedy path -------------------------------------------------------------------------------------------------


def test_a_path_has_shares_of_quality_and_of_parameters():
    point = build_ranking(scan(greedy=path(0.8, 0.6)), [], "base", {})["greedy"]["path"][1]
    assert (point["relative"], point["parameters_share"]) == (pytest.approx(0.75), pytest.approx(0.9))


def test_a_path_bends_where_quality_begins_to_fall():
    greedy = build_ranking(scan(greedy=path(0.8, 0.79, 0.79, 0.78, 0.5, 0.2)), [], "base", {})["greedy"]
    assert greedy["bend"] == 3


def test_the_bend_counts_points_without_a_number():
    greedy = build_ranking(scan(greedy=path(0.8, NAN, 0.79, 0.78, 0.5, 0.2)), [], "base", {})["greedy"]
    assert greedy["bend"] == 3


@pytest.mark.parametrize(
    "accs",
    [(0.8, 0.8, 0.1), (0.8, 0.7, 0.6, 0.5, 0.4), (0.8, 0.8, 0.8, 0.8, 0.797), (0.8, 0.3, 0.2, 0.1), (0.8,) * 5,
     (0.0,) * 5],
    ids=["three points", "straight", "hardly falls", "falls at once", "flat", "nothing right"],
)  # fmt: skip
def test_a_path_without_a_bend_has_none(accs):
    assert build_ranking(scan(greedy=path(*accs)), [], "base", {})["greedy"]["bend"] is None


POINTS = st.lists(
    st.tuples(st.floats(0.01, 0.2), st.floats(0, 1)), min_size=1, max_size=12
)  # what each step removes, and what is left of token_acc


@given(POINTS)
def test_a_bend_is_never_the_first_or_the_last_point_and_lies_above_the_chord(steps):
    points = [(sum(s for s, _ in steps[count:]), acc) for count, (_, acc) in enumerate(steps)]
    bend = find_bend(points)
    if bend is not None:
        assert 0 < bend < len(points) - 1
        (x0, y0), (x1, y1), (x, y) = points[0], points[-1], points[bend]
        assert y > y1 + (y0 - y1) * (x - x1) / (x0 - x1)


@given(POINTS, st.integers(2, 30))
def test_a_bend_does_not_depend_on_the_unit_of_size(steps, factor):
    points = [(sum(s for s, _ in steps[count:]), acc) for count, (_, acc) in enumerate(steps)]
    scaled = find_bend([(x * 2**factor, y) for x, y in points])
    assert scaled == find_bend(points)


@pytest.mark.parametrize("counts", [True, False])
def test_whether_the_suffix_counts_is_what_the_scan_says_and_ms_swift_counts_it(counts):
    assert build_ranking(scan() | {"counts_suffix": counts}, [], "base", {})["counts_suffix"] == counts
    assert build_ranking(None, [], "base", {})["counts_suffix"] is True


def test_infinite_numbers_are_none_too():
    assert ranked(scan(removal(0, math.inf, loss=-math.inf)), [])["text-00"]["relative"] is None
    assert finalists(scan(removal(0, 0.5, loss=-math.inf), removal(1, 0.5)), None) == ["text-01"]


def test_a_path_that_only_falls_at_its_end_by_a_hair_has_no_bend():
    """Ten points, the last of which lies one in two hundred below the others: that is noise."""
    assert find_bend([(10 - i, 0.8 if i < 9 else 0.796) for i in range(10)]) is None
    assert find_bend([(10 - i, 0.8 if i < 9 else 0.7) for i in range(10)]) == 8


def test_a_bend_lies_farthest_above_the_chord_of_what_was_removed():
    assert find_bend([(100, 0.8), (90, 0.78), (80, 0.7), (70, 0.2)]) == 2  # by 0.3 and 0.5 of the fall
    assert find_bend([(100, 0.8), (90, 0.61), (80, 0.4), (70, 0.2), (60, 0.0)]) is None, "by 0.01: straight"


def test_what_failed_is_no_finalist_even_if_it_has_numbers():
    assert finalists(scan(removal(0, 0.9, error="boom"), removal(1, 0.5)), None) == ["text-01"]


def test_ranking_does_not_import_torch():
    code = "import sys, prunekit.knockout.ranking; sys.exit(bool({'torch', 'numpy', 'wandb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
