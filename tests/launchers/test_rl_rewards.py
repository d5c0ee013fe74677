"""rl_run.sh with the real ms-swift: bad rewards are found before a run, none ends one, every algorithm trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.lab import executable
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_ocr import tiny_ocr
from PIL import Image

from prunekit.checkpoint import history

pytestmark = pytest.mark.ci
ALGORITHMS = ["DAPO", "DR_GRPO", "CISPO", "OPD", "CHORD"]
PLUGIN = """
from swift.rewards import ORM, orms


class FirstRow(ORM):
    def __call__(self, completions, solution, **columns):
        return [float(completion == solution[0]) for completion in completions]


class Fragile(ORM):
    def __call__(self, completions, solution, **columns):
        return [1 / (len(completion) % 3) for completion in completions]


orms["first_row"] = FirstRow
orms["fragile"] = Fragile
"""
QUICK = ["--max_steps", "2", "--num_generations", "4", "--max_completion_length", "12", "--save_steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("rl"), np.random.default_rng(0)
    rows = []
    for number in range(24):
        word = tiny_ocr.make_word(draw, "latin", (3, 6))
        Image.fromarray(tiny_ocr.render(draw, word, tiny_ocr.HARD)).save(folder / f"{number}.png")
        question = {"role": "user", "content": f"<image>{tiny_ocr.PROMPT}"}
        rows.append({"messages": [question], "images": [str(folder / f"{number}.png")], "solution": word})
    (folder / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answered.jsonl").write_text(
        "".join(
            json.dumps(row | {"messages": [*row["messages"], {"role": "assistant", "content": row["solution"]}]}) + "\n"
            for row in rows
        )
    )
    (folder / "planted_rewards.py").write_text(PLUGIN)
    return folder


def environment(data, out):
    return os.environ | {
        "GPUS": "", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "WANDB_DIR": str(out.parent),
        "MODEL": str(EMBEDDED), "TEACHER": str(EMBEDDED), "DATASET": str(data / "rl.jsonl"), "VAL_DATASET": "",
        "CHORD_DATASET": str(data / "answered.jsonl"), "OUTPUT": str(out), "GLOBAL_BATCH": "8",
    }  # fmt: skip


@pytest.fixture
def train(data, tmp_path):
    """train(flags, settings): rl_run.sh on a CPU, and the folder that it makes."""

    def go(*flags, **settings):
        done = subprocess.run(
            ["bash", "rl_run.sh", *QUICK, *map(str, flags)],
            cwd=ROOT, env=environment(data, tmp_path / "out") | settings, capture_output=True, text=True,
        )  # fmt: skip
        return done, tmp_path / "out"

    return go


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained(algorithm): the folder where ms-swift trained by rl_run.sh's line, all of them in one process."""
    root = tmp_path_factory.mktemp("algorithms")
    executable(root / "env/bin/swift", f'#!/bin/sh\nprintf "%s\\n" "$@" > {root}/line\nexit 1\n')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lines = {}
    for algorithm in ALGORITHMS:
        settings = {"VIRTUAL_ENV": f"{root}/env", "PATH": path, "ALGORITHM": algorithm, "TRYOUT": "0"}
        env = environment(data, root / algorithm) | settings
        done = subprocess.run(["bash", "rl_run.sh", *QUICK], cwd=ROOT, env=env, capture_output=True, text=True)
        assert "rl_run failed (exit code 1)" in done.stderr, done.stdout + done.stderr
        lines[algorithm] = [*(root / "line").read_text().splitlines(), "--report_to", "none"]  # one run a process
    (root / "lines.json").write_text(json.dumps(lines))
    command = [sys.executable, "tests/helpers/swift_rlhf.py", root / "lines.json", root / "errors.json"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    errors = json.loads((root / "errors.json").read_text())

    def folder(algorithm):
        assert not errors[algorithm], errors[algorithm]
        return root / f"{algorithm}.run"

    return folder


def records(out):
    return [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]


def test_a_reward_that_looks_at_the_first_row_alone_is_refused_before_anything_is_written(train, data):
    rewards = ("--external_plugins", data / "planted_rewards.py", "--reward_funcs", "first_row")
    done, out = train(*rewards, "--reward_weights", "1")
    assert done.returncode == 2
    assert "fault: first_row scores every completion of a batch against the first row" in done.stdout
    assert "the rewards have faults" in done.stderr
    assert [path.name for path in out.parent.iterdir()] == []


def test_a_reward_that_fails_on_some_answers_ends_no_run_and_is_counted(train, data):
    rewards = ("--external_plugins", data / "planted_rewards.py", "--reward_funcs", "ocr_cer", "fragile")
    done, out = train(*rewards, "--reward_weights", "1", "1", "--temperature", "3", TRYOUT="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    failed = [record["rewards/Fragile/failed"] for record in records(out) if "rewards/Fragile/failed" in record]
    assert failed and sum(failed) > 0
    assert history(out)[-1]["stage"] == "rl_run"
    assert all(record.get("rewards/ocr_cer/failed", 0) == 0 for record in records(out))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_says_its_reward(trained, algorithm):
    out = trained(algorithm)
    assert (out / "checkpoint-2/model.safetensors").exists()
    assert any(np.isfinite(record.get("reward", np.nan)) for record in records(out))
