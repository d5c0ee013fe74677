"""Trained knockouts: what is planned, how a run trains, what is recorded, what an end before time leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers as hf
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import KV4, TEXT
from helpers.trainings import FLAGS, left_running

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import sweep as knockout
from prunekit.knockout.removal import Removal
from prunekit.knockout.trained import Sweep, Training, merged_flag, read_curves
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers


@pytest.fixture(scope="module")
def texter(tmp_path_factory):
    """How to train a tiny Qwen3 for two steps."""
    folder = tmp_path_factory.mktemp("texter")
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT | KV4 | {"vocab_size": 300})).save_pretrained(folder / "model")
    hf.AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * n}], "skill": n % 2}
        for n in range(1, 9)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = (*FLAGS, "--template", "qwen3", "--dataset", str(data), "--val_dataset", str(data))
    return Training(folder / "model", "qwen3", folder / "out", arguments, "group")


@pytest.mark.parametrize(
    "family, stack, layer", [("reader", "text", 1), ("reader", "vision", 3), ("texter", "text", 2)]
)
def test_a_knockout_in_memory_trains_as_the_checkpoint_cut_on_disk(family, stack, layer, request, tmp_path):
    training = request.getfixturevalue(family)
    write_cut(cut_layers(plan_layers(open_checkpoint(training.model), **{stack: [layer]})), tmp_path / "cut")
    on_disk = replace(training, model=tmp_path / "cut").result(None, [])
    in_memory = training.result(Removal(stack, layer), [])
    assert on_disk["error"] is None and len(on_disk["training"]) == 2
    assert {key: in_memory[key] for key in ("curve", "training", "parameters", "error")} == {
        key: on_disk[key] for key in ("curve", "training", "parameters", "error")
    }


def test_a_knockout_trains_a_lora_and_keeps_the_users_callbacks(reader, tmp_path):
    plugin = tmp_path / "user_callback_for_test.py"
    plugin.write_text(
        "from pathlib import Path\n"
        "from swift.callbacks import callbacks_map\n"
        "from swift.callbacks.base import TrainerCallback\n"
        "class Counter(TrainerCallback):\n"
        "    def on_train_begin(self, args, state, control, model, **kwargs):\n"
        "        names = [n for n, _ in model.named_parameters() if '.layers.' in n]\n"
        "        layers = {n.split('.layers.')[1].split('.')[0] for n in names}\n"
        f"        Path({str(tmp_path / 'seen')!r}).write_text(f'{{type(model).__name__}} {{len(layers)}}')\n"
        "callbacks_map['counter'] = Counter\n"
    )
    plugins = (str(ROOT / "plugins" / "images_and_answers.py"), str(plugin))
    more = ("--tuner_type", "lora", "--callbacks", "counter", "--external_plugins", *plugins)
    result = replace(reader, arguments=(*reader.arguments, *more)).result(Removal("text", 3), [])
    assert result["error"] is None
    assert (tmp_path / "seen").read_text().split()[1] == "7"
    assert "Peft" in (tmp_path / "seen").read_text()


@pytest.mark.parametrize("run", [None, Removal("text", 2)], ids=str)
def test_a_training_ends_with_each_groups_scores_as_if_its_rows_were_all_there_are(texter, tmp_path, run):
    data = Path(texter.arguments[-1])
    odd = tmp_path / "odd.jsonl"
    odd.write_text("".join(f"{row}\n" for row in data.read_text().splitlines() if json.loads(row)["skill"]))
    grouped = replace(texter, by="skill", validation=(str(data),)).result(run, [])
    alone = replace(texter, arguments=(*texter.arguments, "--val_dataset", str(odd))).result(run, [])
    assert grouped["groups"].keys() == {"0", "1"}
    assert grouped["groups"]["1"] == pytest.approx({key: alone[key] for key in ("token_acc", "loss")}, rel=1e-5)
    assert len(grouped["curve"]) == len(alone["curve"]) == 2 and grouped["training"] == alone["training"]


def test_groups_of_texts_are_scored_in_blocks_as_the_training_scores_all(texter, tmp_path):
    rows = [json.dumps({"text": "ab " * (10 + n), "skill": n % 2}) + "\n" for n in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    (tmp_path / "odd.jsonl").write_text("".join(rows[1::2]))
    flags = (
        *FLAGS, *("--template", "default", "--use_chat_template", "false", "--loss_scale", "all"),
        *("--truncation_strategy", "split"),
        *("--lazy_tokenize", "false", "--max_length", "32", "--external_plugins", str(ROOT / "plugins" / "texts.py")),
        *("--dataset", str(tmp_path / "data.jsonl"), "--val_dataset"),
    )  # fmt: skip
    both, odd = (replace(texter, arguments=(*flags, str(tmp_path / name))) for name in ("data.jsonl", "odd.jsonl"))
    grouped = replace(both, by="skill", validation=(str(tmp_path / "data.jsonl"),)).result(None, [])
    alone = odd.result(None, [])
    assert grouped["groups"]["1"] == pytest.approx({key: alone[key] for key in ("token_acc", "loss")}, rel=1e-5)


def test_what_a_run_wrote_is_removed_behind_it(reader, tmp_path, monkeypatch):
    def train(training, run, work, gpus):
        (work / "swift/checkpoint-1").mkdir(parents=True)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Training, "_train", train)
    assert replace(reader, out=tmp_path).result(None, [])["error"] == "out of memory"
    assert not any((tmp_path / "work").iterdir())


def test_a_failed_run_names_the_reason_and_its_log(reader):
    result = replace(reader, arguments=(*reader.arguments, "--no_such_flag", "1")).result(None, [])
    assert "no_such_flag" in result["error"]
    assert str(reader.out / "logs" / "baseline.log") in result["error"]


# --- how a run is called, and what is read from it ---


@pytest.mark.parametrize(
    "given",
    [
        ["--callbacks", "mine", "other", "--seed", "-1"],
        ["--callbacks=mine", "--seed", "-1", "--callbacks", "other"],
        ["--seed", "-1", "--callbacks", "mine", "--callbacks", "ours", "other"],
    ],
)
def test_a_flag_that_the_user_gave_is_merged_with_ours(given):
    assert merged_flag(given, "--callbacks", "ours") == [
        "--seed",
        "-1",
        "--callbacks",
        "ours",
        "mine",
        "other",
    ]


def test_a_flag_is_found_by_its_other_spelling():
    merged = merged_flag(["--external-plugins", "a.py", "--x"], "--external_plugins", "b.py")
    assert merged == ["--x", "--external_plugins", "b.py", "a.py"]


SHOW = "import json, os, sys; open(os.environ['SEEN'], 'w').write(json.dumps(dict(os.environ)))"


def test_a_run_doesn_t_wait_for_the_nodes_and_ports_of_other_trainings(texter, tmp_path, monkeypatch):
    (tmp_path / "swift").write_text(f"#!{sys.executable}\n{SHOW}\nsys.exit('ValueError: enough')\n")
    (tmp_path / "swift").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE"):
        monkeypatch.setenv(name, "7")
    result = texter.result(None, ["4", "5"])
    seen = json.loads((tmp_path / "seen").read_text())
    assert result["error"].startswith("ValueError: enough (exit code 1")
    assert (seen["NPROC_PER_NODE"], seen["CUDA_VISIBLE_DEVICES"]) == ("2", "4,5")
    assert not {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} & seen.keys()


def evaluation(step, **values):
    return {"global_step/max_steps": f"{step}/4"} | {f"eval_{key}": value for key, value in values.items()}


def test_a_run_records_its_evaluations_and_training_losses():
    log = [
        {"global_step/max_steps": "1/4", "loss": 3.0},
        evaluation(2, loss=2.0, token_acc=0.5),
        evaluation(4, loss=1.0, token_acc=0.75),
        {"last_model_checkpoint": None},
    ]
    assert read_curves(log) == {
        "token_acc": 0.75,
        "loss": 1.0,
        "curve": [{"step": 2, "token_acc": 0.5, "loss": 2.0}, {"step": 4, "token_acc": 0.75, "loss": 1.0}],
        "training": [{"step": 1, "loss": 3.0}],
        "error": None,
    }


def test_a_loss_of_nan_is_an_error_and_null_in_the_record():
    record = read_curves([evaluation(2, loss=1.0, token_acc=0.5), evaluation(4, loss=float("nan"), token_acc=0.1)])
    assert record["error"].startswith("loss is NaN at step 4")
    assert record["loss"] is None and record["curve"][1]["loss"] is None
    assert "NaN" not in json.dumps(record | {"error": None})


# --- sweeps ---


class StubTraining(Training):
    """Trainings that only write the log that ms-swift would write; those of layer 0 fail, of layer 1 diverge."""

    def _train(self, run, work, gpus):
        if run and run.layer == 0:
            raise RuntimeError("CUDA out of memory")
        (work / "swift").mkdir()
        loss = float("nan") if run and run.layer == 1 else 1.0
        (work / "swift" / "logging.jsonl").write_text(json.dumps(evaluation(4, loss=loss, token_acc=0.5)))


@pytest.fixture
def sweep(tiny, tmp_path):
    return Sweep(StubTraining(tiny("qwen3_vl"), "qwen3_vl", tmp_path, (), "group"), [], 2)


RUNS = [None, *(Removal("text", layer) for layer in range(3))]


def test_each_record_is_on_disk_when_its_run_has_ended(sweep):
    for record in sweep.do_all(RUNS):
        assert json.loads((sweep.training.out / "runs" / f"{record['name']}.json").read_text()) == record


def test_a_failed_run_is_recorded_and_the_others_go_on(sweep):
    records = {record["name"]: record for record in sweep.do_all(RUNS)}
    assert records["text-00"]["error"] == "CUDA out of memory"
    assert records["text-01"]["error"].startswith("loss is NaN")
    assert records["text-02"]["error"] is None and len(records) == 4


def test_a_restart_repeats_failed_runs_and_no_finished_ones(sweep):
    list(sweep.do_all(RUNS))
    assert sorted(sweep.finished(RUNS)) == ["baseline", "text-01", "text-02"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "{", lambda record: "null", lambda record: "{}", lambda record: json.dumps([record]),
        lambda record: json.dumps(record | {"curve": 3}), lambda record: json.dumps(record | {"token_acc": "1"}),
        lambda record: json.dumps(record | {"name": "text-04"}), lambda record: json.dumps(record | {"error": 5}),
        lambda record: json.dumps({key: value for key, value in record.items() if key != "training"}),
    ],
)  # fmt: skip
def test_a_damaged_record_of_a_run_is_named_in_one_line(sweep, damage):
    [record] = sweep.do_all(RUNS[:1])
    file = sweep.result_file(RUNS[0])
    file.write_text(damage(record))
    with pytest.raises(PruneKitError, match="baseline.json") as refused:
        sweep.finished(RUNS)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.ci
def test_layers_that_a_model_needs_end_behind_those_that_it_doesn_t(tmp_path):
    """The embedded reader, trained for real: without its first layer it hardly reads, without a middle one it does."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples/tiny_ocr/tiny_ocr.py", "data", "--out", tmp_path / "data", "--share", "0.2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, count in (("train", 64), ("val", 40)):
        rows = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    arguments = (
        *FLAGS, "--external_plugins", str(ROOT / "plugins" / "images_and_answers.py"), "--learning_rate", "1e-4",
        "--max_steps", "4", "--eval_steps", "4", "--per_device_eval_batch_size", "40",
        "--dataset", str(tmp_path / "train.jsonl"), "--val_dataset", str(tmp_path / "val.jsonl"),
    )  # fmt: skip
    sweep = Sweep(Training(EMBEDDED, "qwen3_vl", tmp_path / "out", arguments, "group"), [], 1)
    runs = [None, *(Removal("text", layer) for layer in (0, 1, 6))]
    ranking = knockout.sweep_all(sweep, runs, None, tmp_path / "out")
    assert [entry["name"] for entry in ranking["removals"]] == ["text-06", "text-01", "text-00"]
    best, _, worst = (entry["relative"] for entry in ranking["removals"])
    assert best > 0.9 > 0.7 > worst


# --- sweeps that end before time ---

SWEEP = """
import contextlib, json, sys
from pathlib import Path
from prunekit.errors import run_script
from prunekit.knockout.removal import Removal
from prunekit.knockout.trained import Sweep, Training, run_name

def main():
    spec = json.loads(sys.argv[1])
    training = Training(Path(spec["model"]), spec["model_type"], Path(spec["out"]), tuple(spec["arguments"]), "group")
    sweep = Sweep(training, spec["gpus"], 1)
    runs = [None, Removal("text", 2), Removal("text", 3)]
    todo = [run for run in runs if run_name(run) not in sweep.finished(runs)]
    print("sweep: todo", *[run_name(run) for run in todo], flush=True)
    with contextlib.closing(sweep.do_all(todo)) as done:
        for record in done:
            print("sweep:", record["name"], record["error"], flush=True)

if __name__ == "__main__":
    run_script(main)
"""


def start_sweep(training, gpus=(), **environment):
    spec = {"model": str(training.model), "model_type": training.model_type, "out": str(training.out)}
    spec |= {"arguments": training.arguments, "gpus": gpus}
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, json.dumps(spec)], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,
    )  # fmt: skip


def said_by(sweep):
    """The lines of the script above; libraries print to the same stream."""
    return (line.removeprefix("sweep: ").strip() for line in sweep.stdout if line.startswith("sweep: "))


def ctrl_c(sweep):
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does


def kill_9(sweep):
    sweep.kill()


@pytest.mark.parametrize("end, code", [(ctrl_c, 130), (kill_9, -9)])
@pytest.mark.ci
def test_a_sweep_ended_keeps_what_is_done_and_the_same_command_does_the_rest(end, code, texter, tmp_path):
    training = replace(texter, out=tmp_path)
    sweep = start_sweep(training)
    lines = said_by(sweep)
    assert [next(lines), next(lines)] == ["todo baseline text-02 text-03", "baseline None"]
    time.sleep(0.5)  # into the next training
    end(sweep)
    assert sweep.wait(timeout=20) == code
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["baseline.json"]
    assert not left_running(str(tmp_path))
    again = start_sweep(training)
    assert list(said_by(again)) == ["todo text-02 text-03", "text-02 None", "text-03 None"]
    assert again.wait(timeout=20) == 0


@pytest.mark.parametrize("end", [ctrl_c, kill_9])
def test_a_sweep_ended_on_gpus_leaves_no_trainer_behind_swift(end, tiny, tmp_path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "swift"
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests/helpers" / "stub_swift.py"}" "$@"\n')
    stub.chmod(0o755)
    training = Training(tiny("qwen3_vl"), "qwen3_vl", tmp_path / "out", (), "group")
    calls = tmp_path / "calls"
    sweep = start_sweep(
        training,
        ["0"],
        STUB_CALLS=str(calls),
        STUB_HANG_AT="1",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    while not (calls.exists() and '"hang"' in calls.read_text()) and sweep.poll() is None:
        time.sleep(0.1)
    end(sweep)
    sweep.wait(timeout=20)
    assert not left_running(str(calls))
    assert not list((tmp_path / "out" / "runs").iterdir())
