"""What a cut costs on rows: lost rows and their order, groups, pictures beside answers."""

import base64
from dataclasses import replace

import numpy as np
import pytest
from helpers.parrot import asked
from PIL import Image

from prunekit.data.answers import Judged, figures_of_answers
from prunekit.data.rows import Rows
from prunekit.report.quality import draw_image, quality_of


def judged(rows, answers):
    ones = np.ones(len(rows))
    forced = {"token_acc": (0.5 * ones, ones), "loss": (ones * [1 + len(a) for a in answers], ones)}
    return Judged(rows, forced | figures_of_answers(answers, rows, {}), answers)


ROWS = Rows("data.jsonl", [asked(truth, skill="ab"[n % 2]) for n, truth in enumerate(["one", "two", "three", "four"])])
BASE = judged(ROWS, ["one", "two", "three", "x"])


def test_rows_that_were_lost_come_farthest_from_the_truth_first(tmp_path):
    found = quality_of([BASE, judged(ROWS, ["on", "zzzzzzzzz", "three", "four"])], None, 9, tmp_path)
    assert [row["truth"] for row in found["worst"][0]] == ["two", "one"]
    assert found["right_then_wrong"] == [[2, 1]]
    assert found["worst"][0][0] | {"images": 0} == {
        "row": 2, "group": "", "question": "what?", "truth": "two", "answer": "zzzzzzzzz", "images": 0, "pictures": [],
    }  # fmt: skip


def test_no_more_rows_are_shown_than_asked(tmp_path):
    assert len(quality_of([BASE, judged(ROWS, ["", "", "", ""])], None, 2, tmp_path)["worst"][0]) == 2


def test_each_model_is_compared_with_the_base(tmp_path):
    found = quality_of([BASE, judged(ROWS, ["one", "two", "", ""]), BASE], None, 9, tmp_path)
    differences = [each["exact_match"]["difference"] for each in found["differences"]]
    assert differences == [-0.25, 0]


def test_groups_are_compared_by_their_own_rows(tmp_path):
    found = quality_of([BASE, judged(ROWS, ["", "two", "", "four"])], "skill", 9, tmp_path)["groups"]
    assert [found[g]["differences"][0]["exact_match"]["difference"] for g in "ab"] == [-1, 0.5]
    assert (found["a"]["samples"], found["a"]["scores"][0]["exact_match"]) == (2, 1)


def test_without_generation_no_row_is_lost(tmp_path):
    forced = Judged(ROWS, {name: BASE.figures[name] for name in ("token_acc", "loss")})
    found = quality_of([forced, forced], None, 9, tmp_path)
    assert (found["right_then_wrong"], found["worst"]) == ([None], [[]])
    assert found["differences"][0].keys() == {"token_acc", "loss"}


def test_what_a_model_said_is_kept_of_the_rows_that_all_models_take():
    among = BASE.among(Rows("data.jsonl", [ROWS[2], ROWS[0]]))
    assert among.answers == ["three", "one"] and among.scores()["exact_match"] == 1


def test_answers_that_were_cut_are_counted_among_the_rows_that_all_models_take():
    among = replace(BASE, cut=[True, True, False, False]).among(Rows("data.jsonl", [ROWS[2], ROWS[0]]))
    scores = among.scores()
    assert (scores["n_cut"], scores["cut_share"]) == (1, 0.5)


# --- pictures


@pytest.fixture
def image(tmp_path):
    Image.effect_noise((900, 300), 50).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_pictures_are_small_ones_of_their_own(image, tmp_path):
    names = [draw_image(each, tmp_path) for each in (str(image), {"path": str(image)}, _base64(image))]
    assert names == ["row-001.png", "row-002.png", "row-003.png"]
    for name in names:
        with Image.open(tmp_path / name) as small:
            assert small.size == (320, 107)


def _base64(file):
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


@pytest.mark.parametrize(
    "what",
    ["https://example.org/a.png", "gone.png", "", {"path": None}, 5, None, "data:image/png;base64,AAAA", "A" * 400],
)
def test_what_is_no_picture_on_this_machine_is_left_out(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw_image(what, tmp_path) is None and not list(tmp_path.iterdir())
