"""Rows that are longer than a model's positions: left out where they are judged, cut where they calibrate."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_models import load
from tiny_taggers import save_tokenizer

from prunekit.calibration import calibrate
from prunekit.checkpoint import open_checkpoint

SHORT, LONG = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}
    for content in ("b", "b" * 100)
)


@pytest.fixture
def speaking(tiny, tmp_path):
    """A GPT-2 of 64 positions with a tokenizer of letters."""
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "gpt2")
    save_tokenizer(folder)
    return folder


def evaluate(model, rows, folder):
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        "-m",
        "prunekit.evaluate",
        "--model",
        model,
        "--dataset",
        data,
        "--max-new-tokens",
        2,
    ]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Of WANDB_MODE=offline a library of the trainer's speaks on stdout
        env={name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        | {"CUDA_VISIBLE_DEVICES": ""},
    )


def test_rows_that_the_model_cant_take_are_left_out_and_counted(speaking, tmp_path):
    result = evaluate(speaking, [SHORT, LONG, SHORT], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rows: 1 rows are longer than" in result.stderr
    assert "rows (2 rows)  token_acc" in result.stdout


def test_a_model_that_takes_none_of_the_rows_is_refused_in_one_line(speaking, tmp_path):
    result = evaluate(speaking, [LONG], tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "all rows are longer" in result.stderr.splitlines()[-1]


def test_texts_calibrate_within_the_models_positions(speaking, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * 100}) + "\n" for _ in range(8)))
    model = load(speaking)
    batches = calibrate(model, open_checkpoint(speaking), data).fit
    assert {batch["input_ids"].shape[1] for batch in batches} == {64}
    with torch.inference_mode():
        assert model(**batches[0]).loss.isfinite()
