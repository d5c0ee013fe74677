"""The example of reasoning tasks and its rewards, with reasoning-gym itself, from an environment of its own."""

import json
import subprocess

import pytest
from helpers.paths import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def reasoning_gym(clients):
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('reasoning_gym') is None)"
    if subprocess.run([clients / "python", "-c", code]).returncode:
        pytest.skip("reasoning-gym is not installed: lib/rehearsal.sh says why")


@pytest.fixture(scope="module")
def rows(clients, tmp_path_factory):
    """rows(name): a folder with 48 rows to train on and 24 to judge by, two of each of the twelve tasks. Read only."""
    root = tmp_path_factory.mktemp("reasoning")

    def make(name):
        if not (root / name).exists():
            command = [clients / "python", "examples/reasoning/reasoning.py", "--out", root / name]
            command += ["--rows", 48, "--val-rows", 24]
            subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
        return root / name

    return make


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_same_seed_makes_the_same_rows_and_none_twice(rows):
    one, other = rows("one"), rows("other")
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in ("train.jsonl", "val.jsonl"))
    asked = [row["messages"][0]["content"] for name in ("train", "val") for row in read(one / f"{name}.jsonl")]
    assert len(asked) == 72 == len(set(asked))


def test_a_try_out_finds_the_rewards_sound_and_the_answers_right(rows, clients, tmp_path):
    command = [clients / "python", "-m", "prunekit.tryout", "--rewards", "reasoning_right", "reasoning_form"]
    command += ["--weights", 1, 0.1, "--plugins", "plugins/reasoning_rewards.py", "--limit", 24]
    command += ["--data", rows("one") / "val.jsonl", "--json", tmp_path / "found.json"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "found.json").read_text())["values"]["reasoning_right"]
    assert values["truth"] == [1.0] * 24
    assert sum(values["refusal"]) == 0


def test_an_unknown_task_is_refused_in_one_line(clients, tmp_path):
    command = [clients / "python", "examples/reasoning/reasoning.py", "--out", tmp_path / "out", "--tasks", "chess"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "reasoning-gym has none such" in done.stderr and not (tmp_path / "out").exists()
