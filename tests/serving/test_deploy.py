"""What is served computes what the checkpoint computes, or nearly so, and is measured as it is served."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny_models import load
from helpers.tiny_taggers import write_rows

from prunekit.checkpoint import history, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.ner import evaluate
from prunekit.serving.deploy import choose_format, deploy, quantise_onnx, sums_overflow
from prunekit.serving.run import load_served, mean_loss, pad
from prunekit.tagger.rows import TEXT_CLASSIFIER, read_rows
from prunekit.tagger.train import load_classifier

ROWS = [list(range(5, 30)), list(range(40, 47)), list(range(20, 33))]


@pytest.fixture(scope="module")
def served(tagger, tmp_path_factory):
    """served(family, format): a tiny token classifier in that format, and the checkpoint it was made from."""
    root, made = tmp_path_factory.mktemp("served"), {}

    def folders(family, form):
        if (family, form) not in made:
            out = made[family, form] = root / f"{family}-{form}"
            with pytest.MonkeyPatch.context() as patch:
                if form == "onnx-int8":  # of the same export, which takes seconds
                    patch.setattr("prunekit.serving.deploy.export_onnx", copy_of(folders(family, "onnx")[0]))
                deploy(open_checkpoint(tagger(family)), out, form)
        return made[family, form], tagger(family)

    return folders


def copy_of(folder):
    """An export that writes the file of a model exported before."""
    return lambda _, file: shutil.copyfile(folder / "model.onnx", file)


@pytest.mark.parametrize("family", ["bert", "camembert", "distilbert"])
def test_onnx_equals_torch_for_any_batch_and_length(family, served):
    folder, source = served(family, "onnx")
    session, model = onnxruntime.InferenceSession(folder / "model.onnx"), load(source)
    for rows in (ROWS, ROWS[:1], [row[:1] for row in ROWS]):
        inputs = pad(rows)
        (ours,) = session.run(["logits"], inputs)
        with torch.inference_mode():
            theirs = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
        counted = inputs["attention_mask"].astype(bool)
        np.testing.assert_allclose(ours[counted], theirs[counted], atol=1e-5 * np.abs(theirs).max())


def test_a_text_classifier_as_onnx_gives_the_same_logits(tagger, tmp_path):
    labels = {0: "good", 1: "bad"}
    model = load_classifier(open_checkpoint(tagger("distilbert")), labels, True, TEXT_CLASSIFIER).eval()
    model.save_pretrained(tmp_path / "texts")
    shutil.copy(tagger("distilbert") / "tokenizer.json", tmp_path / "texts")
    entry = deploy(open_checkpoint(tmp_path / "texts"), tmp_path / "out", "onnx")
    assert entry["metrics"]["largest_difference"] < 1e-4
    inputs = pad(ROWS)
    with torch.inference_mode():
        theirs = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(load_served(tmp_path / "out")(inputs), theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.ci
def test_a_decoder_as_onnx_gives_the_same_loss(tiny, tmp_path):
    deploy(open_checkpoint(tiny("llama")), tmp_path / "out", "onnx")
    losses = [mean_loss(load_served(folder), ROWS, 0) for folder in (tiny("llama"), tmp_path / "out")]
    model, total = load(tiny("llama")), 0.0
    with torch.inference_mode():
        for row in ROWS:
            ids = torch.tensor([row])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
    assert losses == pytest.approx([total / sum(len(row) - 1 for row in ROWS)] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("processor", "overflows"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False, "avx512_vnni": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False, "avx512_vnni": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
    ids=["avx2", "vnni", "arm"],
)
def test_weights_have_7_bits_where_8_would_overflow(monkeypatch, tmp_path, processor, overflows):
    asked = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", lambda *_, **settings: asked.update(settings))
    quantise_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert asked["reduce_range"] is overflows


def test_int8_is_near_small_and_tells_its_story(served):
    folder, source = served("bert", "onnx-int8")
    inputs = pad(ROWS)
    counted = inputs["attention_mask"].astype(bool)
    ours, theirs = (load_served(each)(inputs)[counted] for each in (folder, source))
    share = 0.2 if sums_overflow() else 0.1  # of 7 bits weights are twice as coarse
    assert 0 < np.abs(ours - theirs).max() < share * np.abs(theirs).max()
    (entry,) = history(folder)
    assert (entry["stage"], entry["settings"], entry["input"]) == (
        "deploy",
        {"format": "onnx-int8"},
        str(source),
    )
    assert entry["bytes"] == (folder / "model.onnx").stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.onnx", "pruning_info.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "onnxruntime.InferenceSession" in (folder / "README.md").read_text()


@pytest.mark.ci
def test_the_table_holds_what_files_and_plain_evaluation_say(served, tmp_path, script):
    (int8, source), data = served("bert", "onnx-int8"), write_rows(tmp_path / "rows.jsonl")
    done = script("deploy.py", "--model", source, int8, "--dataset", data, "--length", 16, "--batches", 1, 4,
                  "--seconds", 0.1, "--rounds", 1, "--json", tmp_path / "table.json", "--require", "bytes<=1e9",
                  "--require", "batches.4.latency<=1e-9")  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"gate: {int8}: batches.4.latency is 0.")
    first, second = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (first["format"], second["format"]) == ("float32", "onnx-int8")
    assert first["f1"] == evaluate(source, read_rows(data))["f1"]
    assert second["bytes"] == (int8 / "model.onnx").stat().st_size
    assert (first["zeros"], second["zeros"]) == (0.0, None)
    assert first["peak_memory"] > second["peak_memory"] + 50e6  # torch alone is more than that
    for row in (first, second):
        assert list(row["batches"]) == ["1", "4"]
        for size, times in row["batches"].items():
            assert times["throughput"] == pytest.approx(int(size) / times["latency"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["model", str(source), str(int8)]


def test_a_killed_export_leaves_nothing_half_and_the_next_one_cleans_up(served, tmp_path, monkeypatch):
    folder, source = served("bert", "onnx")
    command = [sys.executable, "deploy.py", "--model", source, "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("out.partial-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name[:12] for path in tmp_path.iterdir()] == ["out.partial-"]
    monkeypatch.setattr("prunekit.serving.deploy.export_onnx", copy_of(folder))
    deploy(open_checkpoint(source), tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_onnx_that_computes_no_numbers_is_not_written(tiny, tmp_path, monkeypatch):
    source = open_checkpoint(tiny("bert"))
    logits = {True: np.ones((2, 24, 3)), False: np.full((2, 24, 3), np.nan)}
    monkeypatch.setattr("prunekit.serving.deploy.export_onnx", lambda model, file: file.write_bytes(b""))
    monkeypatch.setattr(
        "prunekit.serving.deploy.load_served", lambda folder: lambda inputs: logits[folder == source.path]
    )
    with pytest.raises(PruneKitError, match="as ONNX it computes something else"):
        deploy(source, tmp_path / "out", "onnx")


def test_a_model_that_computes_something_else_as_onnx_is_not_written(served, tmp_path, monkeypatch):
    other, source = served("distilbert", "onnx")[0], served("bert", "onnx")[1]
    monkeypatch.setattr("prunekit.serving.deploy.export_onnx", copy_of(other))
    with pytest.raises(PruneKitError, match="as ONNX it computes something else"):
        deploy(open_checkpoint(source), tmp_path / "out", "onnx-int8")
    assert not list(tmp_path.iterdir())


def test_the_format_follows_the_size(tiny, monkeypatch):
    checkpoint = open_checkpoint(tiny("llama"))
    assert choose_format(checkpoint, None) == "onnx-int8"
    monkeypatch.setattr("prunekit.serving.deploy.ONNX_LIMIT", 1000)
    assert choose_format(checkpoint, None) == "torchao-int8"
    with pytest.raises(PruneKitError, match="--format onnx: .* more than an ONNX file holds"):
        choose_format(checkpoint, "onnx")
    with pytest.raises(PruneKitError, match="qwen3_vl has a vision tower"):
        choose_format(open_checkpoint(tiny("qwen3_vl")), None)


def test_bad_input_ends_with_one_line_before_anything_is_written(served, tmp_path, script_here):
    (tmp_path / "a.txt").write_text("acme B-ORG\n")
    arguments = ["--model", served("bert", "onnx")[1], "--length", 16, "--out", tmp_path / "out"]
    done = script_here("deploy.py", *arguments, "--dataset", tmp_path / "a.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: dataset {tmp_path}/a.txt: its tag B-ORG is none of the model's labels")
    for flags in (["--out", tmp_path / "out", "--json", tmp_path / "a"], ["--dataset", "a", "--format", "onnx"]):
        done = script_here("deploy.py", *arguments[:2], *flags)
        assert (done.returncode, done.stdout) == (2, "") and "give --" in done.stderr
    done = script_here("deploy.py", *arguments[:2], "--out", arguments[1], "--overwrite")
    assert done.returncode == 2 and "is or holds the input" in done.stderr
    measured = served("bert", "onnx")[0]  # a model beside the last one is an input, too
    done = script_here("deploy.py", "--model", measured, arguments[1], "--out", measured, "--overwrite")
    assert done.returncode == 2 and f"is or holds the input {measured}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("architecture", ["BertModel", "BertForPreTraining", "BertForQuestionAnswering"])
def test_a_model_without_logits_is_refused_before_it_is_loaded(architecture, tagger, tmp_path):
    folder = shutil.copytree(tagger("bert"), tmp_path / "headless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    with pytest.raises(PruneKitError, match=f"{architecture} gives no logits"):
        deploy(open_checkpoint(folder), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(served, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(PruneKitError, match=r"torchao is not installed: pip install -e '.\[deploy\]'"):
        deploy(open_checkpoint(served("bert", "onnx")[1]), tmp_path / "out", "torchao-int8")
    assert not list(tmp_path.iterdir())
