"""ranking.json says which removals are cheap, whatever the scan and the trainings came to."""

import csv
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.knockout.ranking import (
    build_ranking,
    choose_from_ranking,
    finalists,
    find_bend,
    knockout_importance,
    log_to_wandb,
    read_ranking,
    write_ranking,
)
from prunekit.surgery.layers import plan_layers

NAN = float("nan")


def removal(layer, token_acc, loss=None, error=None, stack="text", **values):
    loss = 1 - token_acc if loss is None and token_acc is not None else loss
    return {
        "name": f"{stack}-{layer:02d}", "stack": stack, "layer": layer, "parameters": 90, "parameters_saved": 10,
        "latency_saved": 0.1, "token_acc": token_acc, "loss": loss, "kl": loss, "block_influence": 0.5,
        "standard_error": {"token_acc": 0.01, "loss": 0.02, "kl": 0.03}, "samples": 4, "decided": True,
        "generation": None, "error": error,
    } | values  # fmt: skip


def scan(*removals, predictor="loss", greedy=None):
    baseline = {"token_acc": 0.8, "loss": 0.2, "samples": 4, "tokens": 40, "parameters": 100}
    return {
        "predictor": predictor, "counts_suffix": True, "baseline": baseline, "removals": list(removals),
        "greedy": greedy,
    }  # fmt: skip


def run(name, token_acc, error=None):
    stack, layer = (None, None) if name == "baseline" else (name.split("-")[0], int(name.split("-")[1]))
    return {
        "name": name, "stack": stack, "layer": layer, "parameters": 90, "token_acc": token_acc, "loss": 0.3,
        "curve": [{"step": 1, "token_acc": token_acc, "loss": 0.3}], "training": [{"step": 1, "loss": 0.3}],
        "error": error, "seconds": 1.0,
    }  # fmt: skip


def path(*accs, healed=False):
    points = [
        {
            "removed": [f"text-{layer:02d}" for layer in range(count)], "parameters": 100 - 10 * count,
            "token_acc": acc, "loss": 0.2, "kl": 0.1, "generation": None,
        }
        for count, acc in enumerate(accs)
    ]  # fmt: skip
    return {"healed": healed, "criterion": "loss", "path": points}


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


# --- files -----------------------------------------------------------------------------------------------------------


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


# --- W&B -------------------------------------------------------------------------------------------------------------


def test_wandb_gets_a_run_of_the_sweeps_group(ranking, tmp_path, monkeypatch):
    import wandb

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


def test_ranking_does_not_import_torch():
    code = "import sys, prunekit.knockout.ranking; sys.exit(bool({'torch', 'numpy', 'wandb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is chosen by it ---------------------------------------------------------------------------------------------


def ranking_of(*entries) -> dict:
    names = ("stack", "layer", "relative")
    return {"removals": [dict(zip(names, entry)) | {"name": f"{entry[0]}-{entry[1]}"} for entry in entries]}


def chosen(tiny, removals, **limits) -> list[tuple[str, int]]:
    found = choose_from_ranking(open_checkpoint(tiny("qwen3_vl")), removals, **limits)
    return [(removal.stack, removal.layer) for removal, _ in found]


def test_a_ranking_gives_what_keeps_enough_of_the_baseline(tiny):
    removals = ranking_of(("text", 3, 1.0), ("vision", 2, 0.96), ("text", 4, 0.94), ("text", 1, None))
    assert chosen(tiny, removals, max_fraction=1.0) == [("text", 3), ("vision", 2)]


def test_a_ranking_gives_no_more_layers_than_allowed(tiny):
    removals = ranking_of(("text", 3, 1.0), ("vision", 2, 0.99))
    assert chosen(tiny, removals, max_layers=1, max_fraction=1.0) == [("text", 3)]


def test_a_ranking_gives_no_more_parameters_than_allowed(tiny):
    removals = ranking_of(("text", 3, 1.0), ("text", 2, 1.0), ("vision", 2, 1.0))
    checkpoint = open_checkpoint(tiny("qwen3_vl"))
    one = plan_layers(checkpoint, text=[3]).result
    fraction = 1 - statistics(one)["parameters"] / statistics(checkpoint)["parameters"]
    assert chosen(tiny, removals, max_fraction=fraction) == [("text", 3)]


def test_a_ranking_never_empties_a_stack_or_leaves_a_tap_without_a_block(tiny):
    removals = ranking_of(*(("text", i, 1.0) for i in range(5)), *(("vision", i, 1.0) for i in range(6)))
    picked = chosen(tiny, removals, max_layers=99, max_fraction=1.0)
    assert [stack for stack, _ in picked].count("text") == 2 and [stack for stack, _ in picked].count("vision") == 3


def test_a_ranking_goes_on_behind_what_keeps_too_little(tiny):
    removals = ranking_of(("text", 3, 0.9), ("text", 2, 1.0))  # trained ones first, then scanned ones
    assert chosen(tiny, removals, max_fraction=1.0) == [("text", 2)]


def greedy(*steps, healed=False) -> dict:
    """A ranking with a path of (stack, layer, relative); alone, every layer keeps all."""
    names = [f"{stack}-{layer:02d}" for stack, layer, _ in steps]
    path = [{"removed": names[:count], "relative": share} for count, share in enumerate((1.0, *(s[2] for s in steps)))]
    return ranking_of(("vision", 5, 1.0)) | {"greedy": {"healed": healed, "path": path, "bend": None}}


def test_a_greedy_path_is_followed_as_long_as_it_keeps_enough(tiny):
    path = greedy(("text", 3, 0.99), ("vision", 2, 0.95), ("text", 1, 0.94), ("text", 2, 0.96))
    assert chosen(tiny, path, max_fraction=1.0) == [("text", 3), ("vision", 2)]


def test_a_greedy_path_ends_at_the_most_layers(tiny):
    path = greedy(("text", 3, 0.99), ("vision", 2, 0.98), ("vision", 3, 0.97))
    assert chosen(tiny, path, max_layers=2, max_fraction=1.0) == [("text", 3), ("vision", 2)]


def test_a_greedy_path_ends_where_it_would_take_too_many_parameters(tiny):
    path = greedy(("vision", 3, 0.99), ("text", 3, 0.98), ("vision", 2, 0.97))
    checkpoint = open_checkpoint(tiny("qwen3_vl"))
    two = statistics(plan_layers(checkpoint, vision=[2, 3]).result)["parameters"]
    fraction = 1 - two / statistics(checkpoint)["parameters"]
    assert chosen(tiny, path, max_fraction=fraction) == [("vision", 3)]


def test_a_greedy_path_ends_where_its_value_is_missing(tiny):
    assert chosen(tiny, greedy(("text", 3, 0.99), ("text", 2, None)), max_fraction=1.0) == [("text", 3)]


def test_independent_removals_can_be_asked_for_despite_a_path(tiny):
    picked = chosen(tiny, greedy(("text", 3, 0.99)), max_fraction=1.0, independent=True)
    assert picked == [("vision", 5)]


def test_a_greedy_path_of_another_model_is_refused(tiny):
    with pytest.raises(PruneKitError, match="has a text-20, the model has not"):
        chosen(tiny, greedy(("text", 20, 1.0)))


def test_a_ranking_without_a_path_is_taken_one_by_one(tiny):
    assert chosen(tiny, ranking_of(("text", 3, 1.0)) | {"greedy": None}, max_fraction=1.0) == [("text", 3)]


def select(script, tiny, tmp_path, content, *flags):
    (tmp_path / "ranking.json").write_text(json.dumps(content))
    done = script("manual_select.py", "--model", tiny("qwen3_vl"), "--dry-run", "--max-fraction", 1,
                  "--from-ranking", tmp_path / "ranking.json", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_says_of_a_path_that_its_layers_go_together(tiny, tmp_path, script):
    output = select(script, tiny, tmp_path, greedy(("text", 3, 0.99), ("vision", 2, 0.97)))
    assert "vision   2  keeps 97.0% of the baseline with all above removed, too" in output
    assert "alone" not in output


def test_the_script_says_of_independent_layers_that_they_were_removed_alone(tiny, tmp_path, script):
    output = select(script, tiny, tmp_path, greedy(("text", 3, 0.99)), "--independent")
    assert "vision   5  keeps 100.0% of the baseline when removed alone" in output


@pytest.mark.parametrize("healed", [False, True])
def test_the_script_asks_for_healing_if_the_path_was_healed(healed, tiny, tmp_path, script):
    output = select(script, tiny, tmp_path, greedy(("text", 3, 0.99), healed=healed))
    assert ("--heal" in output) == healed


def test_a_ranking_where_nothing_qualifies_says_what_to_lower(tiny):
    with pytest.raises(PruneKitError, match="--keep-above"):
        chosen(tiny, ranking_of(("text", 3, 0.5)))


def test_a_ranking_of_another_model_is_refused(tiny):
    with pytest.raises(PruneKitError, match="ranking of this model"):
        chosen(tiny, ranking_of(("text", 20, 1.0)))


def test_the_layer_behind_a_models_last_is_one_that_it_has_not(tiny):
    with pytest.raises(PruneKitError, match="has a text-05, the model has not"):
        chosen(tiny, ranking_of(("text", 5, 1.0)))


def test_the_script_drops_what_a_ranking_says(tiny, tmp_path, script):
    (tmp_path / "ranking.json").write_text(json.dumps(ranking_of(("text", 3, 1.0))))
    done = script("manual_select.py", "--model", tiny("qwen3_vl"), "--out", tmp_path / "out",
                  "--from-ranking", tmp_path / "ranking.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "out").config["text_config"]["num_hidden_layers"] == 4


def test_a_ranking_says_how_much_layers_matter(tiny):
    removals = [{"stack": "text", "layer": n, "relative": r} for n, r in enumerate((0.2, 1.02, None, 0.9, 0.5))]
    found = knockout_importance(open_checkpoint(tiny("llama")), {"removals": removals})
    assert [round(found["text", n], 3) for n in range(5)] == [0.8, 0.0, 1.0, 0.1, 0.5]


def test_a_ranking_of_a_stack_that_the_model_has_not_says_no_importance(tiny):
    removals = [{"stack": "vision", "layer": 0, "relative": 1.0}]
    with pytest.raises(PruneKitError, match="has a stack 'vision', llama has none"):
        knockout_importance(open_checkpoint(tiny("llama")), {"removals": removals})


def test_a_file_of_another_models_ranking_is_refused(tiny, tmp_path):
    (tmp_path / "ranking.json").write_text(json.dumps(ranking_of(("text", 3, 1.0)) | {"fingerprint": "another"}))
    with pytest.raises(PruneKitError, match="as it was then"):
        read_ranking(tmp_path / "ranking.json", open_checkpoint(tiny("llama")))


def test_a_file_that_is_no_ranking_is_refused(tiny, tmp_path):
    (tmp_path / "ranking.json").write_text('{"layers": []}')
    with pytest.raises(PruneKitError, match="isn't one that knockout_check.sh wrote.*removals is missing"):
        read_ranking(tmp_path / "ranking.json", open_checkpoint(tiny("llama")))
