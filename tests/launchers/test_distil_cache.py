"""distil.sh with CACHE: a teacher that is asked once, and then no teacher."""

import json
import shutil
from dataclasses import asdict

import pytest
from helpers.lab import check_flags, values

from prunekit.checkpoint import fingerprint, open_checkpoint
from prunekit.training.teacher_cache import Settings

CACHE = {"CACHE": "cache", "GPUS": ""}


@pytest.fixture
def lab(lab):
    settings = Settings(fingerprint(open_checkpoint(lab.env["TEACHER"])), 64, 8, 0.9)
    lab.env["STUB_CACHE"] = json.dumps(asdict(settings))
    return lab


def test_a_cache_is_filled_by_the_teacher_and_then_trained_from_without_it(lab):
    result = lab.run("distil.sh", **CACHE)
    assert result.returncode == 0, result.stderr
    fill, train = lab.calls("rlhf")
    assert fill["env"]["PRUNEKIT_FILL_CACHE"] == "cache" and "PRUNEKIT_FILL_CACHE" not in train["env"]
    assert values(fill["argv"], "--model") == [lab.env["TEACHER"]]
    for call in (fill, train):
        assert "--teacher_model" not in call["argv"] and values(call["argv"], "--lmbda") == ["0"]
        assert values(call["argv"], "--teacher_model_server") == ["cache"]
        assert values(call["argv"], "--gkd_logits_topk") == ["8"]
    assert lab.out.exists() and not list(lab.folder.glob("**/filling"))


def test_the_lines_are_ms_swifts(lab, parsers):
    lab.run("distil.sh", **CACHE)
    fill, train = lab.calls("rlhf")
    for call in (fill, train):
        check_flags(parsers["rlhf"], call["argv"][1:])


def test_a_cache_that_is_filled_is_not_filled_again(lab):
    lab.run("distil.sh", **CACHE)
    result = lab.run("distil.sh", "--learning_rate", "1e-6", OUTPUT="ckpt/other", **CACHE)
    assert result.returncode == 0, result.stderr
    assert len(lab.calls("rlhf")) == 3


@pytest.mark.ci
@pytest.mark.parametrize(
    "change", [{"REFILL": "1"}, {"flags": ["--max_length", "100"]}, {"DATASET": "more.jsonl"}], ids=str
)
def test_other_rows_are_looked_at_again(lab, change):
    lab.run("distil.sh", **CACHE)
    (lab.folder / "more.jsonl").write_text((lab.folder / "train.jsonl").read_text() * 2)
    flags = change.pop("flags", [])
    result = lab.run("distil.sh", *flags, OUTPUT="ckpt/other", **CACHE, **change)
    assert result.returncode == 0, result.stderr
    assert len(lab.calls("rlhf")) == 4


def test_a_teacher_that_fails_is_no_filled_cache(lab):
    result = lab.run("distil.sh", STUB_FAIL_AT=1, **CACHE)
    assert result.returncode == 1
    assert "CACHE=cache isn't filled" in result.stderr.splitlines()[-1]
    assert not list(lab.folder.glob("cache/filled-*")) and lab.left() == []
    assert lab.run("distil.sh", **CACHE).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LMBDA": "0.5"}, "LMBDA=0.5 wants the student's own: leave one out"),
        ({"CACHE": "http://127.0.0.1:8000"}, "give a folder"),
        ({"CACHE": "train.jsonl"}, "no teacher's cache"),
        ({"REFILL": "maybe"}, "REFILL=maybe: set it to 1"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(lab, settings, message):
    before = sorted(path.name for path in lab.folder.iterdir())
    result = lab.run("distil.sh", **CACHE | settings)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(path.name for path in lab.folder.iterdir()) == before and lab.calls() == []


@pytest.mark.parametrize("cache", ["cache", "elsewhere"])
def test_an_interrupted_run_of_other_settings_is_refused_before_a_cache_is_filled(lab, cache):
    lab.run("distil.sh", OUTPUT="ckpt/first", **CACHE)
    assert lab.run("distil.sh", STUB_FAIL_AT=2, **CACHE).returncode == 1
    calls = len(lab.calls("rlhf"))
    shutil.rmtree(lab.folder / "cache")
    result = lab.run("distil.sh", "--max_steps", 7, GPUS="", CACHE=cache)
    assert result.returncode == 2 and "interrupted run with other settings" in result.stderr
    assert len(lab.calls("rlhf")) == calls and not (lab.folder / cache).exists()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("flag", "value", "what"), [("--gkd_logits_topk", 4, "top k"), ("--temperature", 0.5, "temperature")]
)
def test_a_cache_of_other_settings_is_refused(lab, flag, value, what):
    lab.run("distil.sh", **CACHE)
    result = lab.run("distil.sh", flag, value, OUTPUT="ckpt/other", **CACHE)
    assert result.returncode == 2 and f"filled with another {what}" in result.stderr
    assert len(lab.calls("rlhf")) == 2 and not (lab.folder / "ckpt/other.run").exists()


def test_a_check_refuses_a_cache_of_other_settings_too(lab):
    (lab.folder / "cache").mkdir()
    (lab.folder / "cache/cache.json").write_text(lab.env["STUB_CACHE"].replace('"top_k": 8', '"top_k": 4'))
    result = lab.run("distil.sh", CHECK="1", **CACHE)
    assert result.returncode == 2 and "filled with another top k" in result.stderr


def test_another_teachers_cache_is_refused(lab):
    lab.run("distil.sh", **CACHE | {"STUB_CACHE": lab.env["STUB_CACHE"].replace('teacher": "', 'teacher": "f')})
    result = lab.run("distil.sh", OUTPUT="ckpt/other", **CACHE)
    assert result.returncode == 2 and "filled with another teacher" in result.stderr


def test_zero_2_is_left_out_where_nothing_is_trained(lab):
    lab.run("distil.sh", CACHE="cache", GPUS="0,1", STUB_GPUS="2", DEEPSPEED="zero2")
    fill, train = lab.calls("rlhf")
    assert "--deepspeed" not in fill["argv"] and values(train["argv"], "--deepspeed") == ["zero2"]
