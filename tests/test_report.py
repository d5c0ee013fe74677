"""Figures and summaries are drawn from ranking.json, logging.jsonl and checkpoints."""

import json

import pytest

from prunekit.errors import PruneKitError
from prunekit.knockout import rank
from prunekit.report import _series, draw_curves, draw_ranking, draw_stages
from prunekit.summary import summarise, table

PNG = b"\x89PNG"


def result(stack, layer, token_acc, error=None):
    return {
        "stack": stack,
        "layer": layer,
        "name": f"{stack}-{layer}",
        "token_acc": token_acc,
        "error": error,
    }


@pytest.fixture
def ranking():
    results = [
        result(None, None, 0.8),
        result("text", 0, 0.4),
        result("text", 1, 0.76),
        result("vision", 0, None, "out of memory"),
    ]
    return rank(results, {}, "base")


def test_rank_puts_the_cheapest_removal_first_and_failed_ones_last(ranking):
    assert [(r["stack"], r["layer"]) for r in ranking["removals"]] == [
        ("text", 1),
        ("text", 0),
        ("vision", 0),
    ]


def test_rank_is_relative_to_the_baseline(ranking):
    assert ranking["removals"][0]["relative"] == pytest.approx(0.95)


def test_rank_without_a_baseline_has_no_relative_values():
    assert rank([result("text", 0, 0.4)], {}, "base")["removals"][0]["relative"] is None


def test_ranking_figure_is_drawn_though_a_run_failed(ranking, tmp_path):
    draw_ranking(ranking, tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(PNG)


def log(folder, *records):
    (folder / "logging.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_show_a_repeated_step_once_with_its_last_value(tmp_path):
    records = [
        {"global_step/max_steps": f"{step}/9", "loss": loss} for step, loss in [(2, 1.0), (1, 2.0), (2, 0.5)]
    ]
    assert _series(records, "loss") == ([1, 2], [2.0, 0.5])


def test_curves_are_drawn_from_a_log_with_a_torn_last_line(tmp_path):
    log(tmp_path, {"global_step/max_steps": "1/2", "loss": 1.0, "token_acc": 0.5})
    with (tmp_path / "logging.jsonl").open("a") as file:
        file.write('{"loss": 0.')
    draw_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_curves_of_a_log_without_training_are_an_error_that_names_the_folder(tmp_path):
    log(tmp_path, {"message": "hello"})
    with pytest.raises(PruneKitError, match=str(tmp_path)):
        draw_curves(tmp_path, tmp_path / "curves.png")


@pytest.fixture
def stages(tiny):
    folder = tiny("qwen3_vl")
    scores = {
        str(folder.resolve()): {"test": {"token_acc": 0.99, "exact_match": 0.97}, "rl_val": {"cer": 0.2}}
    }
    return summarise([("base", folder), ("again", folder)], scores, "test", None)


def test_summary_rows_hold_size_and_quality(stages):
    assert stages[0].keys() >= {
        "stage", "parameters", "kv_bytes_per_token", "token_acc", "exact_match", "seconds"
    }  # fmt: skip
    assert stages[0]["parameters"] > 0


def test_summary_of_a_checkpoint_that_was_not_evaluated_says_what_to_run(tiny):
    with pytest.raises(PruneKitError, match="prunekit.evaluate"):
        summarise([("base", tiny("qwen3_vl"))], {}, "test", None)


def test_table_has_a_line_for_each_stage(stages):
    assert len(table(stages).splitlines()) == 3


def test_stage_figure_is_drawn(stages, tmp_path):
    draw_stages(stages, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").read_bytes().startswith(PNG)
