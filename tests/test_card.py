"""The report card of real tiny models, from the command line on; what it refuses."""

import json
import re
import shutil
import sys

import pytest
import torch
from helpers.bad_input import contents, put
from helpers.cuts import first_experts
from helpers.parrot import asked, save_parrot
from helpers.paths import ROOT
from helpers.quantised import write_fp8
from PIL import Image
from safetensors.torch import load_file, save_file

from prunekit import card
from prunekit.checkpoint import HISTORY, fingerprint, new_folder, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.loop.candidates import sizes
from prunekit.loop.state import Loop
from prunekit.serving.quantise import publish_quantised
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.width import cut_width, plan_width

SCRIPT = "<script>x()</script>"


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, ["card", *arguments])])
        card.main()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of three layers that says `cat`, and what was cut from it, in two stages: it says `car` now."""
    root = tmp_path_factory.mktemp("models")
    save_parrot(root / "base", layers=3)
    for source, out, layer in (("base", "first", 1), ("first", "a <b> & c", 0)):
        write_cut(cut_layers(plan_layers(open_checkpoint(root / source), text=[layer])), root / out)
    entries = json.loads((root / "a <b> & c" / HISTORY).read_text())["history"]
    entries[1] |= {"metrics": {"train_runtime": 12.5, "eval_token_acc": 0.75}, "stage": f"stage {SCRIPT}"}
    (root / "a <b> & c" / HISTORY).write_text(json.dumps({"history": entries}))
    (root / "first" / "command.sh").write_text(f"python cut.py {SCRIPT}\n")
    trained = save_parrot(root / "trained", layers=1, word="car")
    shutil.copy(trained / "model.safetensors", root / "a <b> & c")
    return root


def write_rows(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """(folder, report.json) of a card of both models, with groups and hostile rows."""
    folder = tmp_path_factory.mktemp("made")
    rows = [
        asked("cat", skill="name"), asked("cat", f"and {SCRIPT}?", skill="name"), asked("car", skill="other"),
        asked(f"{SCRIPT}", skill="other"),
    ]  # fmt: skip
    run(
        models / "first", models / "a <b> & c", "--base", models / "base", "--dataset", write_rows(folder, rows),
        "--by", "skill", "--no-speed", "--max-new-tokens", 8, "--device", "cpu", "--out", folder / "card",
    )  # fmt: skip
    return folder / "card", json.loads((folder / "card/report.json").read_text())


def test_a_folder_holds_the_page_its_twins_and_pictures_alone(made):
    folder, _ = made
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "report.json", "pictures"}
    assert {path.name for path in (folder / "pictures").iterdir()} == {"model-1.png", "model-2.png", "way.png"}


def test_quality_is_that_of_each_model_beside_the_base(made):
    scores = made[1]["quality"]["rows"]["scores"]
    assert [each["exact_match"] for each in scores] == [0.5, 0.5, 0.25]
    differences = made[1]["quality"]["rows"]["differences"]
    assert differences[0]["exact_match"] == {"difference": 0, "low": 0, "high": 0}
    low, high = (differences[1]["exact_match"][key] for key in ("low", "high"))
    assert low < differences[1]["exact_match"]["difference"] == -0.25 < high


def test_rows_that_were_lost_are_named_and_those_that_were_won_are_counted(made):
    found = made[1]["quality"]["rows"]
    assert found["right_then_wrong"] == [[0, 0], [2, 1]]
    assert [row["row"] for row in found["worst"][1]] == [1, 2]


def test_groups_have_their_own_scores(made):
    groups = made[1]["quality"]["rows"]["groups"]
    assert groups["name"]["differences"][1]["exact_match"]["difference"] == -1


def test_the_way_has_every_stage_with_its_time_and_its_command(made):
    one, two = made[1]["way"]
    assert [stage["stage"] for stage in two] == ["manual_select", f"stage {SCRIPT}"]
    assert two[1]["seconds"] == 12.5
    assert one[0]["command"] == two[0]["command"] == f"python cut.py {SCRIPT}\n"
    assert two[1]["command"] is None


def test_what_is_left_is_told_in_the_bases_numbers(made):
    one, two = (each["stacks"]["text"] for each in made[1]["anatomy"])
    assert (one["kept"], two["kept"], two["gone"]) == ([0, 2], [2], {"1": 1, "0": 2})


def test_a_loops_rounds_and_the_lines_that_ran_are_on_the_page(models, tmp_path):
    base, settings = (
        sizes(models / "base"),
        {"model": "base", "targets": {"params": 1.0}, "keep": 0.9, "metric": "loss"},
    )
    loop = Loop.begin(tmp_path / "a.loop", settings | {"fingerprint": "of another", "share": 0.2, "cuts": []}, base)
    loop.next_round()
    tries = [{"folder": "recovered", "scores": {"loss": 0.25}, "kept": 0.95}]
    loop.rounds[0] |= {
        "good": True,
        "folder": "recovered",
        "kept": 0.95,
        "tries": tries,
        "sizes": sizes(models / "first"),
    }
    cuts = [("layers", "text-01", True), ("neurons", "neurons 0.5", False)]
    loop.rounds[0]["candidates"] = [
        {"kind": kind, "name": name, "cost": 0.1, "saved": {"params": 1.0}, "flags": [], "chosen": chosen}
        for kind, name, chosen in cuts
    ]
    loop.ended.append({"stage": "rl", "good": False, "from": "x", "nothing": "skipped"})
    loop.save()
    (loop.folder / "seconds").write_text(
        f"0 3 python -m prunekit.evaluate {SCRIPT}\n1 40 python manual_select.py --text 1\n"
    )
    line = [
        models / "first",
        "--base",
        models / "base",
        "--no-speed",
        "--loop",
        loop.folder,
        "--out",
        tmp_path / "card",
    ]
    with pytest.raises(PruneKitError, match="began with another base"):
        run(*line)
    loop.settings["fingerprint"] = fingerprint(open_checkpoint(models / "base"))
    loop.save()
    run(*line)
    page = (tmp_path / "card/report.html").read_text()
    found = json.loads((tmp_path / "card/report.json").read_text())["loop"]
    assert [each["seconds"] for each in found["lines"]] == [3, 40]
    for text in (
        "Rounds",
        "text-01",
        "Together 43 s",
        "manual_select.py --text 1",
        "95.0%",
        "tokens of the vocabulary",
    ):
        assert text in page
    assert "neurons 0.5" not in page and "<script" not in page, "what was chosen, as text"
    assert (tmp_path / "card/pictures/loop.png").exists()


@pytest.mark.parametrize("end", ["html", "md"])
def test_every_section_is_on_the_page(made, end):
    text = (made[0] / f"report.{end}").read_text()
    for title in ("At a glance", "What was cut", "Size", "What fits", "Quality", "The way", "How to serve it"):
        assert f"{title}</h" in text or re.search(rf"^##+ {title}$", text, re.MULTILINE)
    assert "Speed" not in text


def test_what_models_and_rows_are_called_is_escaped(made):
    text = (made[0] / "report.html").read_text()
    assert "<script" not in text and "<b>" not in text
    assert "a &lt;b&gt; &amp; c" in text and "&lt;script&gt;x()&lt;/script&gt;" in text


def test_the_page_has_its_pictures_within_and_fetches_nothing(made):
    text = (made[0] / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(.{0,22})", text) == ["data:image/png;base64,"] * 3


def test_a_model_of_nan_is_on_the_page_and_null_in_json(models, tmp_path):
    cut = shutil.copytree(models / "first", tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    save_file({name: torch.full_like(each, torch.nan) for name, each in weights.items()}, cut / "model.safetensors")
    rows = write_rows(tmp_path, [asked("cat")])
    run(cut, "--base", models / "base", "--dataset", rows, "--no-speed", "--max-new-tokens", 2, "--device", "cpu",
        "--out", tmp_path / "card")  # fmt: skip
    report = json.loads((tmp_path / "card/report.json").read_text(), parse_constant=pytest.fail)
    assert report["quality"]["rows"]["scores"][1]["loss"] is None
    assert "<td>nan</td>" in (tmp_path / "card/report.html").read_text()


def test_without_rows_sizes_are_drawn_and_speed_is_measured(models, tmp_path, monkeypatch):
    from prunekit.serving import speed

    monkeypatch.setattr("prunekit.serving.measure.measure_once", lambda job, module: speed.measure(job))
    folder = shutil.copytree(models / "first", tmp_path / "first")
    flags = ("--prompt-tokens", 4, "--decode-tokens", 2, "--batches", 2, "--rounds", 1, "--device", "cpu")
    run(folder, "--base", models / "base", *flags)
    report = json.loads((tmp_path / "report/report.json").read_text())  # beside the model
    assert report["quality"] == {} and report["way_picture"] is None
    assert all(row["batches"]["2"]["decode_rate"] > 0 for row in report["speed"]["rows"])
    assert "batch 2: decoding, tokens/s" in (tmp_path / "report/report.md").read_text()


def test_a_picture_of_a_lost_row_is_drawn_beside_the_answer(models, tmp_path, monkeypatch):
    from prunekit.data.answers import Judged, figures_of_answers
    from prunekit.data.rows import Rows

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = Rows("rows", [asked("cat", images=[str(tmp_path / "a.png")])])
    judged = [Judged(rows, _forced() | figures_of_answers([said], rows, {}), [said]) for said in ("cat", "car")]
    monkeypatch.setattr(card, "prepare", lambda *_: ({"rows": rows}, []))
    monkeypatch.setattr(card, "judge_all", lambda *_: {"rows": judged})
    run(models / "first", "--base", models / "base", "--no-speed", "--out", tmp_path / "out")
    assert (tmp_path / "out/pictures/row-001.png").is_file()
    assert (tmp_path / "out/report.html").read_text().count('src="data:image/png;base64,') == 3


def test_engines_are_tried_before_a_model_takes_this_processs_part_of_a_gpu(models, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(card, "prepare", lambda *_: ({"rows": []}, []))
    monkeypatch.setattr(card, "serving_lines", lambda *_: done.append("serving") or [])
    monkeypatch.setattr(card, "judge_all", lambda *_: done.append("quality") or {})
    run(models / "first", "--base", models / "base", "--no-speed", "--out", tmp_path / "out")
    assert done == ["serving", "quality"]


def _forced():
    import numpy as np

    return {name: (np.ones(1), np.ones(1)) for name in ("token_acc", "loss")}


def test_what_shapes_do_not_show_is_said(tiny, tmp_path):
    write_cut(cut_width(plan_width(open_checkpoint(tiny("gpt2")), heads_kept=2)), tmp_path / "masked")
    run(tmp_path / "masked", "--base", tiny("gpt2"), "--no-speed", "--out", tmp_path / "out")
    assert "stage 1 zeroed heads instead of removing them" in (tmp_path / "out/report.md").read_text()


def test_experts_that_went_are_on_the_page_and_in_the_drawing(tiny, tmp_path):
    write_cut(first_experts(tiny("mixtral"), 4), tmp_path / "fewer")
    run(tmp_path / "fewer", "--base", tiny("mixtral"), "--no-speed", "--out", tmp_path / "out")
    page = (tmp_path / "out/report.md").read_text()
    assert "experts 6 to 4" in page and "expert\\_cut" in page
    assert json.loads((tmp_path / "out/report.json").read_text())["anatomy"][0]["widths"]["experts"] == [6, 4]


# --- what is refused, before anything is loaded or written


@pytest.fixture
def refused(models, tmp_path, monkeypatch):
    """refused(*arguments): the one line, asserting that nothing was loaded or written."""
    monkeypatch.setattr(card, "judge_all", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(PruneKitError) as error:
            run(*arguments, "--no-speed")
        assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    return refuse


def test_another_base_is_refused(refused, models, tmp_path):
    other = save_parrot(tmp_path / "other", layers=3, word="dog")
    assert "not from" in refused(models / "first", "--base", other, "--out", tmp_path / "out")


def test_a_used_folder_is_refused_and_replaced_only_if_it_is_a_report(refused, made, models, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out")
    arguments = (models / "first", "--base", models / "base", "--out", out)
    assert "--overwrite" in refused(*arguments)
    (out / "mine.txt").write_text("x")
    assert "holds no report alone" in refused(*arguments, "--overwrite")
    (out / "mine.txt").unlink()
    run(*arguments, "--overwrite", "--no-speed")
    assert json.loads((out / "report.json").read_text())["quality"] == {}


def test_an_out_that_holds_a_model_is_refused(refused, models):
    assert "choose another OUT" in refused(models / "first", "--base", models / "base", "--out", models / "first")


def test_a_model_that_predicts_no_next_token_is_refused(refused, tiny):
    assert "predicts no next token" in refused(tiny("bert"), "--base", tiny("bert"), "--out", "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--limit", "0"), ("--examples", "-1"), ("--device", "gpu"), ("--batches", "0"), ("--rounds", "x"),
        ("--dataset", "nowhere.jsonl"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_bad_argument_is_refused_in_one_line(refused, models, arguments):
    assert arguments[-1] in refused(models / "first", "--base", models / "base", *arguments)


@pytest.mark.parametrize(
    "arguments", [("--by", "skill"), ("--rewards", "ocr_cer"), ("--plugins", "x.py")], ids=" ".join
)
def test_what_is_asked_of_rows_needs_some(refused, models, arguments):
    assert "name some by --dataset" in refused(models / "first", "--base", models / "base", *arguments)


def test_a_column_that_a_row_lacks_is_refused(refused, models, tmp_path):
    file = write_rows(tmp_path, [asked("cat")])
    line = refused(models / "first", "--base", models / "base", "--dataset", file, "--by", "skill")
    assert "has no column 'skill'" in line


def test_a_long_way_is_refused_by_the_models_positions(models, tmp_path):
    with pytest.raises(PruneKitError, match="--prompt-tokens 500"):
        run(models / "first", "--base", models / "base", "--prompt-tokens", 500, "--out", tmp_path / "out")


def test_it_is_a_command(script_here):
    done = script_here("prunekit.card", "--help")
    assert done.returncode == 0 and "report.html" in done.stdout


def test_plugins_that_register_rewards_are_taken(models, tmp_path):
    plugins = [ROOT / "plugins" / name for name in ("gpt2_model.py", "ocr_rewards.py")]
    file = write_rows(tmp_path, [asked("cat", solution="cat"), asked("dog", solution="dog")])
    run(
        models / "first", "--base", models / "base", "--dataset", file, "--no-speed", "--plugins", *plugins,
        "--rewards", "ocr_perfect=2", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["quality"]["rows"]["scores"][0]["reward"] == 1


@pytest.mark.ci
def test_any_history_is_taken_or_refused(tiny, tmp_path, tries):
    base, folder, out = tiny("qwen3_vl"), tmp_path / "model", tmp_path / "out"
    write_cut(cut_layers(plan_layers(open_checkpoint(base), text=[3], vision=[4], drop_taps=[0])), folder)
    [entry] = json.loads((folder / HISTORY).read_text())["history"]
    read = ("stage", "input", "input_fingerprint", "removed", "parameters", "kv_bytes_per_token", "time")
    more = {"seams": [{"stack": "text", "layer": 2, "refitted": [2]}], "settings": {"masked": ["heads"]}}
    more |= {"metrics": {"eval_token_acc": 0.5, "train_runtime": 3.5}, "seconds": 1.5}
    for what, content in contents({"history": [{key: entry[key] for key in read} | more]}):
        put(folder / HISTORY, content)
        tries.survived(what, "prunekit.card", folder, "--base", base, "--no-speed", "--out", out)
        shutil.rmtree(out, ignore_errors=True)
    tries.check()


def test_a_quantised_folder_stands_beside_base_and_cut(tiny, pruned, tmp_path):
    with new_folder(tmp_path / "fp8") as folder:
        publish_quantised(open_checkpoint(pruned), write_fp8(pruned, tmp_path / "written"), folder, {"method": "fp8"})
    run(pruned, tmp_path / "fp8", "--base", tiny("qwen3_vl"), "--no-speed", "--out", tmp_path / "card")
    report = json.loads((tmp_path / "card/report.json").read_text())
    base, cut, small = report["sizes"]
    assert base["parameters"] > cut["parameters"] == small["parameters"]
    assert base["bytes"] > cut["bytes"] > small["bytes"]
    assert (cut["quantised"], small["quantised"]) == (None, "compressed-tensors")
    assert [stage["stage"] for stage in report["way"][1]] == ["manual_select", "quantise"]
    assert [[each["engine"] for each in engines] for engines in report["serving"]] == [["vLLM", "llama.cpp"], ["vLLM"]]
