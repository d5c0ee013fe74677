"""What can be measured of a served folder, and what the numbers say."""

import json
import shutil

import pytest
from helpers.tiny_taggers import save_tokenizer, write_rows

from prunekit.errors import PruneKitError
from prunekit.serving.measure import (
    Measuring,
    check_measurable,
    format_of,
    measure_once,
    measure_served,
    served_table,
    where_zeros_save_nothing,
)
from prunekit.serving.run import measure


def test_it_says_where_zeros_save_nothing():
    times = {"1": {"latency": 1.0}, "32": {"latency": 9.0}}
    dense = {"model": "dense", "bytes": 100, "zeros": 0.0, "batches": times}
    sparse, small = (
        {**dense, "model": "sparse", "zeros": 0.15},
        {**dense, "model": "int8", "bytes": 26, "zeros": None},
    )
    (line,) = where_zeros_save_nothing([dense, sparse, small])
    assert line.startswith("sparse: 15.0% of its layers' weights are zero, and that saves nothing here")
    assert "1.00" in line


def test_rows_longer_than_the_model_are_refused(tagger, tmp_path):
    how = Measuring(write_rows(tmp_path / "rows.jsonl"), length=65)
    with pytest.raises(PruneKitError, match="--length 65: .* has 64 positions"):
        check_measurable([tagger("bert")], how)


def test_a_folder_without_weights_and_a_decoder_on_tagged_rows_are_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PruneKitError, match="no config.json with model"):
        format_of(tmp_path)
    how = Measuring(write_rows(tmp_path / "rows.jsonl"), length=16)
    with pytest.raises(PruneKitError, match="messages"):
        check_measurable([tiny("llama")], how)
    with pytest.raises(PruneKitError, match="neither a token classifier nor a decoder"):
        check_measurable([tiny("bert")], how)


def test_decoders_are_measured_by_their_loss(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.serving.measure.measure_once", measure)  # in this process
    folder = shutil.copytree(tiny("llama"), tmp_path / "llama")
    save_tokenizer(folder)
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "ana is in oslo"}\n{"text": "bo at rome"}\n' * 3)
    (row,) = measure_served([folder], Measuring(data, length=8, sizes=(1,), seconds=0.01, rounds=1), quiet=True)
    assert 3 < row["loss"] < 8  # random weights: about log(128)
    assert "LOSS" in served_table([row]).splitlines()[0]


def test_texts_of_one_token_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "llama")
    save_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a"}\n' * 6)
    with pytest.raises(PruneKitError, match="texts.jsonl: no text is longer than one of .*llama's tokens"):
        measure_served([folder], Measuring(data, length=8, sizes=(1,), seconds=0.01, rounds=1), quiet=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "model: measuring failed .exit code -9.: signal 9 ended it, for want"),
        ("raise MemoryError('too large')", "model: measuring failed .exit code 1.: MemoryError: too large"),
    ],
)
def test_a_process_that_dies_while_it_measures_is_one_line(code, message, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PruneKitError, match=message):
        measure_once({"folder": "model"}, "dying")
