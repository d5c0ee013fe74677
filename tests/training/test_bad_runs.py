"""Whatever runs and cycles leave is published or refused in one line."""

import json
import shutil

import pytest
from helpers.bad_input import contents, link, put, refusal, run


@pytest.fixture
def run_folder(tiny, tmp_path):
    """What ms-swift leaves of a training of llama: checkpoint-5, trainer_state.json, logging.jsonl."""
    folder = tmp_path / "run"
    folder.mkdir()
    link(tiny("llama"), folder / "checkpoint-5")
    put(folder / "checkpoint-5" / "trainer_state.json", {"global_step": 5})
    put(folder / "logging.jsonl", json.dumps({"loss": 1.0, "global_step/max_steps": "1/5"}) + "\n")
    return folder


def test_any_trainer_state_and_log_is_taken_or_refused(run_folder, tiny, tmp_path, tries):
    publish = ("--run", run_folder, "--base", tiny("llama"), "--out", tmp_path / "out", "--stage", "x")
    (run_folder / "checkpoint-²").mkdir()
    put(run_folder / "checkpoint-²" / "trainer_state.json", {})
    state = {"global_step": 5, "best_model_checkpoint": "checkpoint-5"}
    record = {"loss": 1.0, "global_step/max_steps": "1/5", "best_model_checkpoint": "checkpoint-5"}
    for what, content in contents(state):
        put(run_folder / "checkpoint-5" / "trainer_state.json", content)
        tries.survived(what, "prunekit.training.publish", "--run", run_folder, "--find-resume")
        tries.survived(what, "prunekit.training.publish", *publish)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    put(run_folder / "checkpoint-5" / "trainer_state.json", state)
    for what, content in contents(record):
        put(run_folder / "logging.jsonl", content)
        tries.survived(what, "prunekit.training.publish", *publish, "--checkpoint", "best")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        tries.survived(what, "prunekit.report.__main__", run_folder)
    tries.check()


@pytest.mark.ci
def test_any_folder_of_cycles_is_taken_or_refused(tiny, tmp_path, tries):
    cycles = tmp_path / "cycles"
    cycles.mkdir()
    entry = {"stage": "sparsify", "sparsity": {"sparsity": 0.5, "tensors": {}}}
    link(tiny("llama"), cycles / "1")
    put(cycles / "1" / "pruning_info.json", {"history": [entry]})
    scores = {"loss": 1.0, "token_acc": 0.5}
    files = {
        "dense.json": [{"model": "m", "datasets": {"val": scores}}],
        "1.json": [{"model": "m", "datasets": {"val": scores}}] * 2,
        "settings.json": {"modules": None},
    }
    for name, document in files.items():
        put(cycles / name, document)
    judge = ("judge", "--cycles", cycles)
    assert run("prunekit.training.cycles", *judge)[0] == 0
    publish = ("publish", "--cycles", cycles, "--base", tiny("llama"), "--out", tmp_path / "out")
    found = json.loads((cycles / "cycles.json").read_text())
    for name, document in (files | {"cycles.json": found}).items():
        before = (cycles / name).read_bytes()
        for what, content in contents(document):
            put(cycles / name, content)
            reader = judge if name in ("dense.json", "1.json") else publish
            code, _, err = run("prunekit.training.cycles", *reader)
            tries.count += 1
            if code not in (0, 3) and (problem := refusal(code, err)):
                tries.found.append(f"{name} {what}: {problem}")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        put(cycles / name, before)
    tries.check()
