"""python -m prunekit.memory: tables, JSON, and what it refuses."""

import json
import subprocess
import sys

import pytest
from helpers.paths import EMBEDDED
from helpers.tiny_models import save

from prunekit import memory
from prunekit.errors import PruneKitError
from prunekit.training import memory as training_memory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("qwen3", tmp_path_factory.mktemp("memory") / "qwen3")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["memory", *map(str, words)])
    memory.main()


def test_the_table_names_every_part_and_what_saves_it(model, monkeypatch, capsys):
    run(monkeypatch, "--stage", "sft", "--model", model, "--gpus", 2)
    shown = capsys.readouterr().out
    assert shown.startswith("memory: about ")
    for word in ("weights", "gradients", "optimizer", "activations", "with DEEPSPEED=zero3"):
        assert f"  {word}" in shown


def test_rows_that_an_image_does_not_fit_into_are_no_alternative(monkeypatch, capsys):
    counted = training_memory.Estimate({"weights": 1}, "in a step")
    monkeypatch.setattr(training_memory, "estimate", lambda training: counted)
    for tokens, offered in ((400, True), (600, False)):
        run(monkeypatch, "--stage", "sft", "--model", EMBEDDED, "--gpus", 0, "--image-tokens", tokens)
        assert ("with --max_length 512" in capsys.readouterr().out) == offered


def test_json_has_parts_that_add_up(model, monkeypatch, capsys):
    run(monkeypatch, "--stage", "lora", "--model", model, "--gpus", 1, "--tokens", 64, "--json")
    found = json.loads(capsys.readouterr().out)
    assert sum(found["parts"].values()) == found["total"]
    assert found["rows"]["tokens"] == 64


def test_a_launchers_line_is_one_line_and_says_what_does_not_fit(model, monkeypatch, capsys):
    flags = ["--tuner_type", "full", "--max_length", "64", "--torch_dtype", "float32"]
    run(monkeypatch, "--stage", "sft", "--model", model, "--gpu-memory", 0.001, "--line", "--", *flags)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and "more than its 0.001 GB" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stage", "sft", "--model", "nowhere"], "nowhere"),
        (["--stage", "dpo", "--model", EMBEDDED], "invalid choice: 'dpo'"),
        (["--stage", "sft", "--model", EMBEDDED, "--gpus", "0", "--deepspeed", "zero2"], "it needs GPUs"),
        (["--stage", "sft", "--model", EMBEDDED, "--deepspeed", "zero9"], "--deepspeed zero9"),
        (["--stage", "sft", "--model", EMBEDDED, "--gpus", "-1"], "--gpus"),
        (["--stage", "sft", "--model", EMBEDDED, "--max_lenght", "9"], "did you mean --max_length"),
        (["--stage", "gkd", "--model", EMBEDDED], "--teacher_model"),
        (["--stage", "gkd", "--model", EMBEDDED, "--teacher_model", "nowhere"], "nowhere"),
        (["--stage", "sft", "--model", EMBEDDED, "--tokens", "8", "--image-tokens", "8"], "--image-tokens"),
        (["--stage", "sft", "--model", EMBEDDED, "--image-tokens", "5000"], "--image-tokens 5000: no room"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(words, said, monkeypatch):
    with pytest.raises(PruneKitError, match=said) as refusal:
        run(monkeypatch, *words)
    assert "\n" not in str(refusal.value)


def test_help_needs_no_torch():
    script = "import sys; sys.argv = ['memory', '--help']\nfrom prunekit import memory\n"
    script += "try: memory.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
