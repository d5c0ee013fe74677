"""loop.json: rounds begin, are judged, fail and end; what is tidied away."""

import argparse
import json
import math

import pytest
from helpers.cuts import cut_width

from prunekit.errors import PruneKitError
from prunekit.loop import __main__ as commands
from prunekit.loop.__main__ import choose_cuts, next_round
from prunekit.loop.candidates import sizes
from prunekit.loop.choice import Candidate
from prunekit.loop.state import Loop
from prunekit.report import draw_loop


@pytest.fixture
def loop(tiny, tmp_path):
    """A loop to what a quarter of the neurons leaves, that keeps 90% of token_acc, which is 1."""
    model = tiny("qwen3")
    base = sizes(model)
    cut_width(model, tmp_path / "small", neuron_share=0.25)
    targets = {"params": sizes(tmp_path / "small")["params"]}
    settings = {"model": str(model), "fingerprint": "f", "data": [], "targets": targets,
                "keep": 0.9, "metric": "token_acc", "cuts": ["neurons"], "share": 0.25}  # fmt: skip
    made = Loop.begin(tmp_path / "loop", settings, base)
    made.note_base(measured(tmp_path / "base.json", 1.0))
    made.save()
    return made


def measured(file, score):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([{"model": "m", "datasets": {"val": {"token_acc": score}}}]))
    return file


def do_round(loop, score, longer=None, share=0.8):
    this = loop.next_round()
    here = loop.folder / str(this["round"])
    cut_width(loop.model(0), here / "distilled", neuron_share=share)
    measured(here / "evaluation.json", score)
    if longer is not None:
        cut_width(loop.model(0), here / "longer", neuron_share=share)
        measured(here / "longer.json", longer)
    return Loop(loop.folder).judge("distilled")


def test_a_round_behind_the_gate_is_where_the_next_begins(loop):
    assert do_round(loop, 0.95)["good"]
    again = Loop(loop.folder)
    assert again.next_round()["from"] == 1
    assert again.model(1) == loop.folder / "1/distilled"
    assert again.rounds[1]["share"] == pytest.approx(0.25 * (0.4 + 0.6 * 0.5)), "half of the way to the gate is gone"


def test_a_round_below_the_gate_stays_open_until_it_was_recovered_for_longer(loop):
    assert "good" not in do_round(loop, 0.5)
    again = Loop(loop.folder)
    assert again.next_round()["round"] == 1
    cut_width(again.model(0), again.folder / "1/longer", neuron_share=0.8)
    measured(again.folder / "1/longer.json", 0.92)
    this = again.judge("distilled")
    assert this["good"] and this["folder"] == "longer" and [each["kept"] for each in this["tries"]] == [0.5, 0.92]


def test_a_round_may_cost_what_those_before_it_say_that_the_gate_bears(loop):
    def cut(cost):
        again = Loop(loop.folder)
        again.next_round()
        others = [Candidate("kv", "kv 1", 9.0, {"params": 1.0}, ())]
        chosen = [Candidate("neurons", "neurons 0.8", cost, {"params": 1.0}, ())]
        again.note_choice([*others, *chosen], chosen)
        return again

    assert loop.affordable() == loop.failed_cost() == math.inf
    do_round(cut(0.04), 0.95)
    assert Loop(loop.folder).affordable() == pytest.approx(0.04), "as much is left as the first round lost"
    do_round(cut(0.3), 0.7, 0.8)
    assert Loop(loop.folder).affordable() == pytest.approx(0.05 * 0.34 / (0.05 + 0.15)), "a failed round counts, too"
    assert Loop(loop.folder).failed_cost() == 0.3
    do_round(cut(0.02), 0.93)
    assert Loop(loop.folder).failed_cost() == math.inf, "nothing was tried from there yet"


def test_what_a_failed_round_measured_is_known_to_the_next_from_there_and_to_no_other(loop):
    others = [Candidate("layers", "text-01", 0.1, {"params": 2.0}, ("--text", "1"))]
    chosen = [Candidate("neurons", "neurons 0.8", 0.2, {"params": 1.0}, ("--neuron-share", "0.8"))]
    loop.next_round()
    assert loop.known() == []
    loop.note_choice([*others, *chosen], chosen)
    do_round(Loop(loop.folder), 0.5, 0.6)
    assert Loop(loop.folder).known() == [*others, *chosen]
    do_round(Loop(loop.folder), 0.95)
    assert Loop(loop.folder).known() == []


def test_two_failures_end_it_and_a_good_round_between_them_does_not(loop):
    assert do_round(loop, 0.5, 0.6)["good"] is False
    assert (again := Loop(loop.folder)).end(8) is None and again.failed == 1
    assert do_round(again, 0.95)["good"]
    assert do_round(Loop(loop.folder), 0.5, 0.6)["good"] is False
    assert Loop(loop.folder).end(8) is None
    do_round(Loop(loop.folder), 0.5, 0.6)
    assert "two rounds failed" in Loop(loop.folder).end(8)
    assert Loop(loop.folder).last_good["round"] == 2


def test_it_ends_where_targets_are_reached_or_rounds_are_used_up(loop):
    do_round(loop, 0.95)
    assert Loop(loop.folder).end(1) == "MAX_ROUNDS=1 are done"
    do_round(Loop(loop.folder), 0.95, share=0.25)
    assert Loop(loop.folder).end(8) == "all targets are reached"


def test_a_loop_that_begins_is_not_written_down_without_what_it_needs_of_its_base(loop, tmp_path):
    made = Loop.begin(tmp_path / "new", loop.settings, loop.base["sizes"])
    with pytest.raises(PruneKitError, match="gone.json"):
        made.note_base(tmp_path / "gone.json")
    assert not made.folder.exists()


def test_a_path_ends_at_what_is_wanted_not_a_little_above(loop, capsys):
    loop.settings["targets"]["params"] = loop.base["sizes"]["params"] * 0.90006
    loop.save()
    next_round(argparse.Namespace(into=loop.folder, dry_run=False, keep_rounds="good", max_rounds=8))
    assert "LEAVES=0.9000\n" in capsys.readouterr().out


def test_smaller_cuts_that_were_tried_are_not_asked_for_again(loop, monkeypatch):
    loop.next_round()
    saved = {"params": 1e9, "bytes": 0.0, "kv": 0.0}
    tried = Candidate("neurons", "neurons 0.5", 1.0, saved, ("--neuron-share", "0.5"))
    monkeypatch.setattr(commands, "from_trials", lambda *_: [tried])
    monkeypatch.setattr(commands, "_trials", lambda *_, **__: [("smaller", "width_cut.py", [*tried.flags])])
    wishes = {"trials": ["trials.json"], "scan": None, "finer": False, "heal": False}
    assert choose_cuts(argparse.Namespace(into=loop.folder, model=loop.settings["model"], **wishes)) == 3


def test_where_a_parameter_is_missing_a_layer_may_go(loop, capsys):
    loop.settings["targets"]["params"] = loop.base["sizes"]["params"] - 1
    loop.save()
    next_round(argparse.Namespace(into=loop.folder, dry_run=False, keep_rounds="good", max_rounds=8))
    assert "LEAVES=0.9999\n" in capsys.readouterr().out, "of all parameters no path of a scan takes any"


def test_other_settings_are_refused_and_a_base_that_moved_is_not(loop):
    same = loop.settings | {"model": "elsewhere"}
    assert Loop.begin(loop.folder, same, loop.base["sizes"]).model(0).name == "elsewhere"
    with pytest.raises(PruneKitError, match="holds a loop with another keep, metric: repeat"):
        Loop.begin(loop.folder, same | {"keep": 0.5, "metric": "loss"}, loop.base["sizes"])


def test_a_metric_that_was_not_measured_is_refused(loop):
    loop.settings["metric"] = "reward"
    with pytest.raises(PruneKitError, match="has no reward .METRIC., only token_acc"):
        loop.scores(loop.folder.parent / "base.json")


def test_a_result_whose_metric_is_no_number_keeps_nothing_and_a_base_of_such_is_refused(loop):
    this = do_round(loop, None, 0.95)
    assert [each["kept"] for each in this["tries"]] == [0, 0.95] and this["folder"] == "longer"
    with pytest.raises(PruneKitError, match="METRIC=token_acc: the base's is NaN or infinite"):
        loop.note_base(measured(loop.folder.parent / "base.json", None))


@pytest.mark.parametrize(("keep", "left"), [("good", {1, 2}), ("last", {2}), ("all", {1, 2, 3})])
def test_checkpoints_of_rounds_stay_as_the_setting_says_and_measurements_always(keep, left, loop):
    do_round(loop, 0.95)
    do_round(Loop(loop.folder), 0.94)
    do_round(Loop(loop.folder), 0.5, 0.6)
    (loop.folder / "1/recovered").symlink_to(loop.folder / "1/distilled")
    again = Loop(loop.folder)
    again.next_round()
    (loop.folder / "4/cut").mkdir(parents=True)
    again.tidy(keep)
    stays = {number for number in (1, 2, 3) if (loop.folder / str(number) / "distilled").exists()}
    assert stays == left and (loop.folder / "4/cut").exists()
    assert all((loop.folder / str(number) / "evaluation.json").exists() for number in (1, 2, 3))


def test_behind_the_last_round_each_stage_begins_with_the_last_one_that_kept_enough(loop):
    do_round(loop, 0.95)
    again = Loop(loop.folder)
    assert again.best()[0] == loop.folder / "1/distilled" and again.next_stage(["kv", "lora", "rl"]) == "kv"
    for stage, score, longer in (("kv", 0.5, 0.6), ("lora", 0.97, None), ("rl", 0.4, None)):
        here = again.folder / "end" / stage
        cut_width(again.model(0), here / "made", neuron_share=0.8)
        here.mkdir(exist_ok=True)
        measured(here / "evaluation.json", score)
        if longer:
            assert "good" not in again.judge_stage(stage, "made"), "KV heads may be recovered for longer"
            cut_width(again.model(0), here / "longer", neuron_share=0.8)
            measured(here / "longer.json", longer)
        again.judge_stage(stage, "made")
        again = Loop(loop.folder)
    assert [(each["stage"], each["good"]) for each in again.ended] == [("kv", False), ("lora", True), ("rl", False)]
    assert again.best()[0] == loop.folder / "end/lora/made" and again.best()[1]["kept"] == pytest.approx(0.97)
    assert again.ended[1]["from"] == str(loop.folder / "1/distilled"), "not with what fell below the gate"
    assert again.next_stage(["kv", "lora", "rl"]) is None
    again.tidy("good")
    assert [(again.folder / "end" / stage / "made").exists() for stage in ("kv", "lora", "rl")] == [False, True, False]


def test_a_teacher_with_fewer_tokens_teaches_the_rounds_behind_it(loop):
    do_round(loop, 0.95)
    again = Loop(loop.folder)
    assert again.teacher(1) is None
    for name in ("teacher", "teacher.cache"):
        (loop.folder / "1" / name).mkdir()
    again.next_round()
    again.tidy("last")
    assert (loop.folder / "1/teacher.cache").exists()
    assert again.teacher(0) is None and again.teacher(1) == loop.folder / "1/teacher"


def test_a_loss_is_held_against_the_bases_by_the_same_text(loop):
    loop.settings["metric"] = "loss"
    loop.base["scores"] = {"loss": 0.2, "tokens": 100}
    assert loop.kept({"loss": 0.1, "tokens": 200}) == pytest.approx(1)
    assert loop.kept({"loss": 0.2, "tokens": 101}) < 1 == loop.kept({"loss": 0.2, "tokens": 100})


def test_a_damaged_file_is_refused_by_its_place(loop):
    (loop.folder / "loop.json").write_text('{"settings": {}, "base": {}, "rounds": [{"round": 1}]}')
    with pytest.raises(PruneKitError, match=r"loop.json: rounds\[0\].from is missing"):
        Loop(loop.folder)


def test_the_way_is_drawn_with_a_panel_for_each_target(loop, tmp_path):
    loop.settings["targets"]["kv"] = 0.5 * loop.base["sizes"]["kv"]
    loop.save()
    for score, longer in ((0.95, None), (0.5, 0.6)):
        do_round(Loop(loop.folder), score, longer)
    draw_loop(Loop(loop.folder).content, tmp_path / "loop.png")
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
