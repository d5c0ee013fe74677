"""Distillation from a cache by the real ms-swift: the live teacher's loss, changed images, kill -9, two ranks."""

import contextlib
import json
import os
import signal
import subprocess

import numpy as np
import pytest
from helpers.lab import processes_with, wait_for
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_ocr import write_word
from PIL import Image

from prunekit.checkpoint import open_checkpoint
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.training.teacher_cache import TeacherCache

pytestmark = [pytest.mark.slow, pytest.mark.ci]
FLAGS = """
    --max_steps 2 --eval_steps 2 --save_steps 2 --logging_steps 1 --per_device_eval_batch_size 8
    --gradient_accumulation_steps 1 --learning_rate 1e-5 --report_to none
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with train.jsonl of 16 words, val.jsonl of 40, and a student: the embedded model without a layer."""
    folder, draw = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    for name, count in (("train", 16), ("val", 40)):
        rows = [write_word(draw, folder / f"{name}{number}.png") for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_cut(cut_layers(plan_layers(open_checkpoint(EMBEDDED), [3])), folder / "student")
    return folder


def start(words, out, *flags, batch=8, **settings):
    settings = {
        "GPUS": "", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "PYTHONPATH": ROOT, "TEACHER": EMBEDDED,
        "MODEL": words / "student", "DATASET": words / "train.jsonl", "VAL_DATASET": words / "val.jsonl",
        "OUTPUT": words / out,
    } | settings  # fmt: skip
    return subprocess.Popen(
        ["bash", "distil.sh", *FLAGS.split(), "--per_device_train_batch_size", str(batch), *flags],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*args, **settings):
    process = start(*args, **settings)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-5000:]
    return said


def losses(words, out):
    log = [json.loads(line) for line in (words / out / "logging.jsonl").read_text().splitlines()]
    return [record["loss"] for record in log if "loss" in record]


@pytest.fixture(scope="module")
def killed(words):
    """The shard that one process had written when it was killed, and when that was written (ns)."""
    process = start(words, "two", "--per_device_eval_batch_size", "1", CACHE=words / "cache")
    wait_for(lambda: process.poll() is not None or list(words.glob("cache/*.safetensors")), 300)
    assert process.poll() is None, process.communicate()[0]
    process.kill()
    for number in processes_with(f"PRUNEKIT_FILL_CACHE={words / 'cache'}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()
    assert not list(words.glob("cache/filled-*"))
    [first] = words.glob("cache/*.safetensors")
    return first, first.stat().st_mtime_ns


@pytest.fixture(scope="module")
def two(words, killed):
    """Losses of two processes that went on with what was killed, and trained; and what they said."""
    said = run(words, "two", batch=4, CACHE=words / "cache", CPU_PROCESSES=2)
    return losses(words, "two"), said


@pytest.fixture(scope="module")
def one(words, two):
    """Losses of one process that trained from the same cache."""
    run(words, "one", CACHE=words / "cache")
    return losses(words, "one")


def test_a_filling_that_was_killed_goes_on(words, killed, two):
    first, written = killed
    assert "56 rows, " in two[1]
    assert first.stat().st_mtime_ns == written  # what was there is not asked again
    assert len(TeacherCache(words / "cache")) == 56


def test_two_processes_train_from_a_cache_as_one_does(words, two, one):
    assert two[0][0] == pytest.approx(one[0], rel=0.1)
    assert len(list(words.glob("cache/filled-*"))) == 1


def test_a_cache_has_the_live_teachers_loss(words, one):
    run(words, "live", "--gkd_logits_topk", "8", LMBDA="0")
    # What is kept of a probability is within 1%, and the second step comes from the first's gradient.
    assert one == pytest.approx(losses(words, "live"), rel=0.02)


def test_an_image_that_changed_is_refused(words, one):
    file = words / "train3.png"
    picture = np.asarray(Image.open(file)).copy()
    picture[0, 0] ^= 8
    before = file.read_bytes()
    Image.fromarray(picture).save(file)
    try:
        process = start(words, "changed", CACHE=words / "cache")
        said, _ = process.communicate()
    finally:
        file.write_bytes(before)
    assert process.returncode == 1 and "as it is now" in said and "REFILL=1" in said
    assert not (words / "changed").exists()
