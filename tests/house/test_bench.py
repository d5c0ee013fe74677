"""The benches, but for what they measure: settings, files and folders, hours before they would matter."""

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT


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
