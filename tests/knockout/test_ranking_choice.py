"""What is chosen by a ranking: enough of the baseline, no more than allowed, of this model."""

import json

import pytest
from helpers.rankings import path, removal, scan

from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.knockout.ranking import build_ranking, choose_from_ranking, knockout_importance, read_ranking
from prunekit.surgery.layers import plan_layers


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


def test_what_a_scan_alone_wrote_is_no_ranking(tiny, tmp_path):
    found = scan(removal(0, 0.9), greedy=path(0.8, 0.7))
    (tmp_path / "scan.json").write_text(json.dumps(found))
    with pytest.raises(PruneKitError, match="what a removal keeps.*give the ranking.json of knockout_check.sh"):
        read_ranking(tmp_path / "scan.json", open_checkpoint(tiny("llama")))
    (tmp_path / "ranking.json").write_text(json.dumps(build_ranking(found, [], "a model", {})))
    assert read_ranking(tmp_path / "ranking.json", open_checkpoint(tiny("llama")))["removals"]
