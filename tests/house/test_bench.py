"""The benches, but for what they measure: settings, files and folders, hours before they would matter."""

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT

from prunekit.errors import PruneKitError


@pytest.fixture
def bench(monkeypatch):
    """bench(name): the module."""
    monkeypatch.setenv("WANDB_MODE", "offline")  # as some of them do for good
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_a_file_of_results_is_made_sure_of_before_anything_is_measured(bench, tmp_path):
    result_file = bench("materials").result_file
    assert result_file(f"{tmp_path}/new/result.json").parent.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="no folder"):
        result_file(f"{tmp_path}/file/result.json")


def test_what_texts_are_learnt_from_and_what_judges_share_no_docstring(bench, tmp_path):
    for number in range(20):  # each says something of its own, and what its neighbour says, too
        said = [f'"""{n:03} {"what it does, at length. " * 60}"""' for n in range(2 * number, 2 * number + 3)]
        code = "".join(f"def f{place}():\n    {doc}\n" for place, doc in enumerate(said))
        (tmp_path / f"module{number:02}.py").write_text(code)
    paths = bench("materials")._split(tmp_path, "some", tmp_path.glob("*.py"))
    train, test = (set(re.findall(r"\d{3}", path.read_text())) for path in paths.values())
    assert train and test and not train & test


def test_every_bench_makes_sure_of_its_file_of_results():
    takes = {file.name: re.findall(r'add_argument\("--json", type=(\w+)', file.read_text()) for file in BENCHES}
    assert {name: types for name, types in takes.items() if types not in ([], ["result_file"])} == {}
    assert sum(map(len, takes.values())) > 10


BENCHES = sorted((ROOT / "bench").glob("*.py"))


def test_results_of_other_settings_are_neither_mixed_with_new_ones_nor_called_by_their_name(bench, tmp_path):
    result, vocabulary = tmp_path / "result.json", bench("vocabulary")
    given = {"json": result, "runs": tmp_path, "parts": [], "fresh": False, "rows": 16}
    began = vocabulary.Bench(argparse.Namespace(**given))
    began.keep(1, "untrained", "uncut")
    assert vocabulary.Bench(argparse.Namespace(**given)).result == json.loads(result.read_text()) == began.result
    with pytest.raises(PruneKitError, match="'rows': 16"):
        vocabulary.Bench(argparse.Namespace(**given | {"rows": 60}))


@pytest.mark.parametrize(
    ("name", "flag"), [("tasks", "--cases"), ("vocabulary", "--parts"), ("width", "--parts"), ("memory", "--cases")]
)
def test_a_part_that_isnt_there_is_refused_at_once(bench, monkeypatch, name, flag):
    monkeypatch.setattr(sys, "argv", [name, flag, "999"])
    with pytest.raises(SystemExit) as ended:
        bench(name).main()
    assert ended.value.code == 2


def test_parts_that_need_another_ones_cuts_say_so_at_once(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["kv_merge", "recovery", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        bench("kv_merge").main()
    assert ended.value.code == 2


def test_texts_that_are_too_few_for_the_steps_are_an_error_before_the_first(bench, monkeypatch):
    width = bench("width")
    batch = {"input_ids": torch.zeros(1, 4)}
    monkeypatch.setattr(width, "calibrate", lambda *_, **__: SimpleNamespace(fit=[batch, batch], held_out=[batch]))
    short = object.__new__(width.Bench)
    short.texts, short.args = Path("texts.jsonl"), argparse.Namespace(steps=3, length=4)
    assert len(short.rows(None, None)) == 3
    short.args.steps = 4
    with pytest.raises(PruneKitError, match=r"texts.jsonl: 3 of .*--steps 4"):
        short.rows(None, None)


def test_the_time_that_filling_a_cache_took_is_of_the_method_that_filled_it(bench, monkeypatch, tmp_path):
    training = bench("distil_training")

    def run(*_, OUTPUT, CACHE, **__):
        mark = Path(CACHE) / "filled-1"
        if not mark.exists():
            mark.parent.mkdir()
            time.sleep(0.05)
            mark.touch()
        (tmp_path / f"{OUTPUT}.run" / "checkpoint-2").mkdir(parents=True)
        Path(OUTPUT).mkdir()
        (Path(OUTPUT) / "logging.jsonl").write_text('{"train_speed(s/it)": 1.0}\n')

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "losses", lambda *_: {})
    setting = {"steps": 2, "flags": [], "answer": 1, "teacher": "a", "train": "b", "tests": {"test": "c"}}
    args = argparse.Namespace(points=1, test_tokens=1)
    first, second = (training.train(tmp_path, name, setting, args) for name in ("cached", "cached forward"))
    assert first["filling_seconds"] >= 0 and "filling_seconds" not in second


def test_surgery_leaves_alone_what_lies_beside_a_model(bench, monkeypatch, tmp_path):
    surgery, beside = bench("surgery"), tmp_path / "base-surgery" / "precious"
    beside.mkdir(parents=True)
    monkeypatch.setattr(surgery, "MERGEKIT", tmp_path)
    monkeypatch.setattr(surgery, "measure", lambda model, work, *_: {"empty": not any(work.iterdir())})
    monkeypatch.setattr(sys, "argv", ["surgery", str(tmp_path / "base"), "--json", str(tmp_path / "result.json")])
    surgery.main()
    assert beside.exists() and json.loads((tmp_path / "result.json").read_text())["models"] == {"base": {"empty": True}}
    assert {each.name for each in tmp_path.iterdir()} == {"base-surgery", "result.json"}


def test_a_loop_that_goes_on_is_told_its_own_time_of_this_call(bench, tmp_path):
    loop = bench("loop")
    (tmp_path / "loop.json").write_text(json.dumps({"base": {}, "rounds": [], "settings": {}}))
    (tmp_path / "seconds").write_text("1/scan 100 python -m prunekit.scan\n1 5 bash full_run.sh\n")
    assert loop.summary(tmp_path, 110.0, 0)["seconds_of_stages"] == 105
    assert loop.summary(tmp_path, 10.0, 1)["own_share"] == 0.5


def test_rl_is_benched_as_the_demo_does_it():
    demo, bench = ((ROOT / name).read_text() for name in ("demo.sh", "bench/rl.py"))
    line = r"data/(\w+\.jsonl) VAL_DATASET='' [^\n]* bash rl_run.sh.*?steps (\d+)"
    [(data, steps)] = re.findall(line, demo, re.DOTALL)
    assert f"data/{data}" in bench and f'"--steps", type=int, default={steps},' in bench
