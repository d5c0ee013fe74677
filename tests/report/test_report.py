"""Figures and summaries are drawn from ranking.json, logging.jsonl and checkpoints."""

import json

import pytest
from PIL import Image

from prunekit.errors import PruneKitError
from prunekit.knockout.ranking import build_ranking, finalists
from prunekit.report import (
    draw_curves,
    draw_f1,
    draw_greedy,
    draw_knockout_curves,
    draw_ranking,
    draw_stages,
    knockout,
)
from prunekit.report.training import _series
from prunekit.summary import groups_table, summarise, table

PNG = b"\x89PNG"


FIGURES = {"ranking": draw_ranking, "greedy": draw_greedy, "curves": draw_knockout_curves}


def run(stack, layer, token_acc, error=None):
    losses = [{"step": step, "loss": 1 / step, "token_acc": 0.5} for step in (1, 2, 3)]
    return {
        "name": f"{stack}-{layer:02d}" if stack else "baseline", "stack": stack, "layer": layer,
        "parameters": 10, "token_acc": token_acc, "loss": 0.2, "curve": losses, "training": losses,
        "error": error, "seconds": 1.0,
    }  # fmt: skip


def made_ranking(layers=8, trained=3, generation=True):
    """Text layers of which the first is terrible and the second failed; a path; the best of them trained."""
    accs = [0.01, None, *(0.8 - 0.005 * layer for layer in range(layers - 2))]
    removals = [
        {
            "name": f"text-{layer:02d}", "stack": "text", "layer": layer, "token_acc": acc,
            "loss": acc and 1 - acc, "standard_error": {"token_acc": 0.01, "loss": 0.01, "kl": 0.01},
            "error": None if acc else "out of memory",
        }
        for layer, acc in enumerate(accs)
    ]  # fmt: skip
    scan = {
        "predictor": "loss", "counts_suffix": False, "removals": removals,
        "baseline": {"token_acc": 0.8, "loss": 0.2, "samples": 4, "tokens": 40, "parameters": 100},
    }  # fmt: skip
    names = finalists(scan, None)
    path = [
        {
            "removed": names[:count], "parameters": 100 - count, "token_acc": 0.8 - 0.02 * count**2,
            "generation": {"exact_match": 0.9**count, "cer": 0.1, "samples": 4} if generation else None,
        }
        for count in range(6)
    ]  # fmt: skip
    scan["greedy"] = {"healed": False, "criterion": "loss", "path": path}
    runs = [run(None, None, 0.82), *(run("text", int(name[-2:]), 0.7) for name in names[:trained])]
    return build_ranking(scan, runs if trained else [], "base", {})


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """axes(draw, ranking): the axes of the figure that this draws."""
    figures = []
    monkeypatch.setattr(knockout, "save_figure", lambda figure, path: figures.append(figure))

    def drawn(draw, ranking):
        draw(ranking, tmp_path / "figure.png")
        return figures[-1].axes

    return drawn


@pytest.mark.parametrize("layers", [3, 8, 64])
@pytest.mark.parametrize("figure", FIGURES)
def test_knockout_figures_are_drawn(figure, layers, tmp_path):
    FIGURES[figure](made_ranking(layers, trained=min(layers - 2, 12)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_ranking_figure_of_trained_knockouts_alone_is_drawn_though_one_failed(tmp_path):
    runs = [run(None, None, 0.8), run("text", 0, 0.76), run("vision", 0, None, "out of memory")]
    draw_ranking(build_ranking(None, runs, "base", {}), tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(PNG)


def test_dollars_in_names_of_models_and_groups_are_no_formula(tmp_path):
    scores = {"f1": 0.5, "entities": {r"$\no$": {"f1": 0.5, "support": 1}}}
    draw_f1([(r"a$\b$", scores)], tmp_path / "f1.png")
    assert (tmp_path / "f1.png").read_bytes().startswith(PNG)


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_ranking_figure_marks_what_failed(axes):
    assert texts(axes(draw_ranking, made_ranking())[0]).count("failed") == 1


def test_ranking_figure_gives_the_number_of_a_bar_that_is_cut_off(axes):
    assert "1.2" in texts(axes(draw_ranking, made_ranking(layers=64))[0])


def test_ranking_figure_says_whether_the_suffix_counts(axes):
    assert "without the template's suffix" in axes(draw_ranking, made_ranking())[0].get_ylabel()


@pytest.mark.parametrize(("trained", "legends"), [(0, 0), (3, 1)])
def test_ranking_figure_explains_its_diamonds_if_it_has_any(axes, trained, legends):
    assert bool(axes(draw_ranking, made_ranking(trained=trained))[-1].get_legend()) == legends


def test_greedy_figure_runs_from_all_parameters_down(axes):
    left, right = axes(draw_greedy, made_ranking())[0].get_xlim()
    assert left > 1 > 0.95 > right


def test_greedy_figure_names_what_goes_at_each_point(axes):
    ranking = made_ranking()
    shown = [text for text in texts(axes(draw_greedy, ranking)[0]) if text.startswith("text-")]
    assert shown == ranking["greedy"]["path"][-1]["removed"]


def test_names_above_the_greedy_figure_stand_apart_though_their_points_are_close(axes):
    ranking = made_ranking()
    for point, share in zip(ranking["greedy"]["path"], (1, 0.9, 0.8999, 0.8998, 0.7, 0.6999)):
        point["parameters_share"] = share
    places = [t.xyann[0] for t in axes(draw_greedy, ranking)[0].texts if t.get_text().startswith("text-")]
    assert min(a - b for a, b in zip(places, places[1:])) > 0.005


@pytest.mark.parametrize("generation", [False, True])
def test_greedy_figure_has_a_line_of_exact_match_if_that_was_measured(axes, generation):
    _, labels = axes(draw_greedy, made_ranking(generation=generation))[0].get_legend_handles_labels()
    assert ("exact match of generated answers" in labels) == generation


def test_knockout_curves_show_a_run_that_diverged(axes):
    runs = [run(None, None, 0.8), run("text", 0, None, "loss is NaN at step 3")]
    runs[1]["curve"][-1]["loss"] = None
    legend = axes(draw_knockout_curves, build_ranking(None, runs, "base", {}))[0].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["text-00", "baseline"]


@pytest.mark.parametrize(("trained", "entries"), [(9, 10), (30, 10)])
def test_the_legend_of_knockout_curves_stays_short(axes, trained, entries):
    ranking = made_ranking(layers=40, trained=trained)
    figure = axes(draw_knockout_curves, ranking)[0].figure
    assert len(figure.legends[0].get_texts()) == entries


def log(folder, *records):
    (folder / "logging.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_show_a_repeated_step_once_with_its_last_value(tmp_path):
    records = [{"global_step/max_steps": f"{step}/9", "loss": loss} for step, loss in [(2, 1.0), (1, 2.0), (2, 0.5)]]
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
    scores = {str(folder.resolve()): {"test": {"token_acc": 0.99, "exact_match": 0.97}, "rl_val": {"cer": 0.2}}}
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


def test_table_has_seconds_where_a_stage_has_some(stages):
    base, again = stages
    assert "seconds" not in table(stages)
    assert "seconds" in table([base, again | {"seconds": 3}])


def test_stage_figure_is_drawn(stages, tmp_path):
    draw_stages(stages, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").read_bytes().startswith(PNG)


@pytest.fixture
def skilled(stages):
    """Stages whose second has lost one of two skills; a third skill was measured at the first alone."""
    exact = ({"read": 0.95, "add": 0.9, "copy": 1.0}, {"read": 0.94, "add": 0.1})
    return [
        stage | {"groups": {group: {"exact_match": value} for group, value in values.items()}}
        for stage, values in zip(stages, exact)
    ]


def test_a_table_by_group_says_what_a_stage_has_lost(skilled):
    head, base, again = groups_table(skilled).splitlines()
    assert head.split()[2:] == ["add", "read"]
    assert base.split() == ["base", "0.900", "0.950"] and again.split() == ["again", "0.100", "0.940"]


def test_without_groups_there_is_no_table_of_them(stages):
    assert groups_table(stages) == ""


def test_the_stage_figure_has_a_map_of_groups_where_there_are_some(stages, skilled, tmp_path):
    widths = []
    for rows in (stages, skilled):
        draw_stages(rows, tmp_path / "stages.png")
        with Image.open(tmp_path / "stages.png") as image:
            widths.append(image.width)
    assert widths[1] > widths[0]
