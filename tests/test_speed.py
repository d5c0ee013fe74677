"""prunekit.speed from the command line on: what it says and writes of models beside each other."""

import json
import sys

import pytest
from helpers.quantised import write_fp8

from prunekit import speed
from prunekit.errors import PruneKitError


@pytest.fixture
def run(monkeypatch):
    """run(*arguments): the command, on measurements in which every model is as slow as its name is long."""

    def once(job, module):
        seconds = float(len(job["folder"].rpartition("/")[2]))
        times = {"prefill": seconds, "decode": seconds / 10}
        found = {"machine": "m", "dtype": "d", "load_seconds": 1, "peak_memory": 1, "batches": {"1": times}}
        if "gpt2" in job["folder"] and not job["parts"]:
            raise PruneKitError("no memory")
        return found | ({"parts": {"decode": {"mlp": 0.75, "rest": 0.25}}} if job["parts"] else {})

    monkeypatch.setattr("prunekit.serving.measure.measure_once", once)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["speed", *map(str, arguments)])
        return speed.main()

    return go


def test_each_model_is_held_against_the_first(run, tiny, tmp_path, capsys):
    given = (tiny("qwen3_moe"), tiny("llama"), "--batches", 1, "--json", tmp_path / "speed.json", "--parts")
    assert run(*given) == 0
    said = capsys.readouterr().out
    assert "decode 0.5 s a token (1.80 times as fast)" in said and said.count("times as fast") == 2
    assert "of decode: mlp 75%, rest 25%" in said
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["model"].rpartition("/")[2] for row in found["models"]] == ["qwen3_moe", "llama"]
    assert found["models"][0]["parts"]["decode"]["mlp"] == 0.75 and found["pace"]["sizes"] == [1]


def test_what_cannot_be_measured_says_so_and_ends_it_with_a_code(run, tiny, capsys):
    assert run(tiny("llama"), tiny("gpt2")) == 2
    assert f"{tiny('gpt2')}: no memory" in capsys.readouterr().out


def test_quantised_weights_are_timed_too(run, tiny, tmp_path, capsys):
    write_fp8(tiny("llama"), tmp_path / "fp8")
    assert run(tiny("llama"), tmp_path / "fp8") == 0
    assert f"{tmp_path / 'fp8'}  batch 1  prefill 3 s" in capsys.readouterr().out


def test_an_encoder_is_refused(run, tiny):
    with pytest.raises(PruneKitError, match="predicts no next token"):
        run(tiny("bert"))
