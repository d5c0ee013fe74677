"""Two nodes train as one machine does: torchrun through ms-swift, over loopback, by full_run.sh as a user runs it."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_ocr import tiny_ocr
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

pytestmark = [pytest.mark.ci, pytest.mark.slow]
STEPS, SAVE = 12, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """DATASET and VAL_DATASET: a few rendered words."""
    folder = tmp_path_factory.mktemp("data")
    words = tiny_ocr._words("val", 0, frozenset())[:128]
    rows = []
    for number, picture in enumerate(tiny_ocr.pictures("val", words, 0, 0)):
        image = folder / f"{number}.png"
        Image.fromarray(picture).save(image)
        question = {"role": "user", "content": f"<image>{tiny_ocr.PROMPT}"}
        answer = {"role": "assistant", "content": words[number]}
        rows.append(json.dumps({"messages": [question, answer], "images": [str(image)]}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows[:112]))
    (folder / "val.jsonl").write_text("".join(rows[112:]))
    return {"DATASET": str(folder / "train.jsonl"), "VAL_DATASET": str(folder / "val.jsonl")}


def start(output: Path, data: dict[str, str], log: Path, batch: int = 4, **settings: object) -> subprocess.Popen:
    """One node's full_run.sh. KEEP_RUN: the trainer's own fp32 weights are looked at, too."""
    environment = os.environ | {"WANDB_MODE": "offline", "GPUS": "", "KEEP_RUN": "1", "MODEL": str(EMBEDDED)}
    environment |= data | {"OUTPUT": str(output)} | {name: str(value) for name, value in settings.items()}
    flags = {
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "eval_steps": STEPS, "save_steps": SAVE, "logging_steps": 1, "learning_rate": 1e-4,
    }  # fmt: skip
    command = [
        "bash",
        "full_run.sh",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()[-4000:]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output.with_name(f"{output.name}.run") / f"checkpoint-{STEPS}" / "model.safetensors")


def start_nodes(output: Path, data: dict[str, str]) -> tuple[dict[int, Path], dict[int, subprocess.Popen]]:
    """Logs and processes of two nodes of one process each, by rank; the second starts first, as may happen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = {rank: output.with_name(f"node-{rank}.log") for rank in (1, 0)}
    return logs, {rank: start(output, data, log, NODE_RANK=rank, **shared) for rank, log in logs.items()}


@pytest.fixture(scope="module")
def nodes(data, tmp_path_factory) -> Path:
    """OUTPUT of two nodes."""
    output = tmp_path_factory.mktemp("nodes") / "out"
    logs, started = start_nodes(output, data)
    for rank in (0, 1):
        finish(started[rank], logs[rank])
    return output


@pytest.fixture(scope="module")
def one_machine(data, tmp_path_factory):
    """one_machine(processes, batch): OUTPUT of one node with so many processes."""

    def run(processes: int, batch: int) -> Path:
        output = tmp_path_factory.mktemp("machine") / "out"
        log = output.with_name("log")
        finish(start(output, data, log, batch, CPU_PROCESSES=processes), log)
        return output

    return run


def test_two_nodes_publish_one_checkpoint_that_loads_strictly(nodes):
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(nodes, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert [entry["stage"] for entry in json.loads((nodes / "pruning_info.json").read_text())["history"]] == [
        "full_run"
    ]


def test_two_nodes_log_each_step_once(nodes):
    log = [json.loads(line) for line in (nodes / "logging.jsonl").read_text().splitlines()]
    steps = [line["global_step/max_steps"] for line in log if "loss" in line]
    assert steps == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]


def test_two_nodes_are_one_wandb_run(nodes):
    assert len(list((nodes.parent / "wandb").glob("offline-run-*"))) == 1


def test_two_nodes_train_the_very_weights_of_two_processes_on_one(nodes, one_machine):
    expected, found = weights(one_machine(2, 4)), weights(nodes)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_nodes_see_each_others_gradients(nodes, one_machine):
    """One process with the same global batch takes the same steps, but for rounding; half the batch would not."""
    base, expected, found = load_file(EMBEDDED / "model.safetensors"), weights(one_machine(1, 8)), weights(nodes)
    step = sum((expected[name] - base[name].float()).square().sum() for name in expected)
    off = sum((expected[name] - found[name]).square().sum() for name in expected)
    assert off < 1e-6 * step


def test_two_nodes_of_which_one_died_end_as_if_nothing_had_happened(nodes, data, tmp_path):
    output = tmp_path / "out"
    logs, started = start_nodes(output, data)
    saved = output.with_name("out.run") / f"checkpoint-{SAVE}" / "trainer_state.json"
    deadline = time.time() + 180
    while not saved.exists():
        assert started[0].poll() is None and time.time() < deadline, logs[0].read_text()[-4000:]
        time.sleep(0.02)
    started[1].terminate()
    assert started[0].wait(timeout=120) == 1, "the other node goes on alone, or says nothing"
    assert not output.exists()
    logs, started = start_nodes(output, data)
    for rank in (0, 1):
        finish(started[rank], logs[rank])
    assert "resuming from" in logs[0].read_text() and "resuming from" in logs[1].read_text()
    expected, resumed = weights(nodes), weights(output)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
