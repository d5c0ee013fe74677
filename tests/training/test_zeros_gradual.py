"""Zeros that become more: in exact steps, until quality falls too far; in ms-swift itself, too."""

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import EMBEDDED, ROOT
from helpers.sparse_trainings import KINDS, STEPS, Watch, trainer_of, zeros_of
from helpers.tiny_models import build
from safetensors.torch import load_file

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery.zeros_weights import choose_weights
from prunekit.training.zeros import GradualPruning, prune_lowest
from prunekit.training.zeros_settings import Gradual

pytestmark = pytest.mark.usefixtures("plain_trainer")


@pytest.mark.parametrize(("stopped", "events"), [(6, [0, 2, 4, 6]), (4, [0, 2, 4, 6]), (2, [0])])
def test_a_stop_that_lies_behind_the_checkpoint_is_forgotten(stopped, events, tmp_path):
    trainer_of(tmp_path, KINDS["gradual"](), evaluated=False).train()
    file = tmp_path / "sparsity.json"
    told = json.loads(file.read_text())
    told["events"] = [event for event in told["events"] if event["step"] < stopped]
    file.write_text(json.dumps(told | {"stopped_before": stopped}))
    trainer_of(tmp_path, KINDS["gradual"](), evaluated=False).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    told = json.loads(file.read_text())
    assert [event["step"] for event in told["events"]] == events
    assert told["stopped_before"] == (2 if stopped == 2 else None)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_by_magnitude_are_exact_and_keep_what_is_zero(scope):
    weights = {str(n): torch.randn(7, 11, generator=torch.Generator().manual_seed(n)) for n in range(3)}
    weights["1"][:, :4] = 0
    masks = prune_lowest(weights, 0.5, scope)
    assert (masks["1"] | (weights["1"] != 0)).all()
    if scope == "layer":
        assert {int(mask.sum()) for mask in masks.values()} == {38}
    else:
        assert sum(int(mask.sum()) for mask in masks.values()) == 116
        threshold = max(float(weights[n][m].abs().max()) for n, m in masks.items())
        assert threshold <= min(float(weights[n][~m].abs().min()) for n, m in masks.items())


def test_each_event_of_a_gradual_pruning_is_exact_and_in_the_history(tmp_path):
    callback = GradualPruning(Gradual(0.75, 0.25, 3, "exponential"))
    watch = Watch(lambda *_: callback.zeros)
    trainer = trainer_of(tmp_path, callback, watch)
    trainer.train()
    history = json.loads((tmp_path / "sparsity.json").read_text())
    total = sum(mask.numel() for mask in callback.masks.values())
    wanted = [round(level * total) for level in Gradual(0.75, 0.25, 3, "exponential").levels()]
    assert [event["zeros"] for event in history["events"]] == wanted
    assert [event["step"] for event in history["events"]] == [0, 2, 5]
    assert watch.seen == [wanted[0]] * 2 + [wanted[1]] * 3 + [wanted[2]] * 3
    assert sum(int(z.sum()) for z in zeros_of(trainer.model).values()) == wanted[-1]
    for event, later in zip(history["events"], history["events"][1:]):
        assert event["retrained"] == later["before"] != event["after"]
    assert history["events"][-1]["retrained"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert [log["sparsity"] for log in trainer.state.log_history if "sparsity" in log] == pytest.approx(
        [zeros / total for zeros in wanted]
    )


def test_pruning_stops_where_quality_falls_too_far(tmp_path):
    callback = GradualPruning(Gradual(0.9, 0.5, 4, worse=1e-9))
    trainer = trainer_of(tmp_path, callback, learning_rate=1.0, max_grad_norm=100.0)
    trainer.train()
    assert callback.history["stopped_before"] == 2 and len(callback.history["events"]) == 1
    assert callback.sparsity == pytest.approx(0.5, abs=1e-4)


def test_a_layer_with_more_zeros_than_its_share_keeps_just_these():
    weights = {"a": torch.tensor([[0.0, 0, 0, 1]]), "b": torch.tensor([[1.0, 2, 3, 4]])}
    masks = prune_lowest(weights, 0.5, "layer")
    assert masks["a"].tolist() == [[True, True, True, False]] and masks["b"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("higher", "quality", "bad"),
    [
        (True, 0.73, False),
        (True, 0.71, True),
        (False, 0.87, False),
        (False, 0.89, True),
        (False, None, False),
    ],
)
def test_quality_is_too_bad_where_it_is_by_more_than_a_share_worse_than_the_dense_models(higher, quality, bad):
    callback = GradualPruning(Gradual(0.9, worse=0.1))
    callback.higher = higher
    assert not callback._too_bad(quality), "before the first event there is nothing to compare with"
    callback.history["events"] = [{"before": 0.8}, {"before": 0.1}]
    assert callback._too_bad(quality) == bad


@pytest.mark.parametrize(
    ("metric", "greater", "higher"),
    [("eval_token_acc", True, True), ("cer", False, False), ("loss", None, False), (None, None, False),
     ("eval_loss", True, False)],
)  # fmt: skip
def test_which_way_a_metric_is_better_is_what_the_trainer_says_but_of_losses(metric, greater, higher):
    callback = GradualPruning(Gradual(0.5, events=1))
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater, resume_from_checkpoint=None)
    state = SimpleNamespace(max_steps=4, global_step=0, is_world_process_zero=False)
    callback.on_train_begin(args, state, None, model=build("llama"))
    assert (callback.metric, callback.higher) == ((metric or "loss").removeprefix("eval_"), higher)


def test_more_events_than_steps_are_refused(tmp_path):
    with pytest.raises(PruneKitError, match="events=9: more than the run's 8 steps"):
        trainer_of(tmp_path, GradualPruning(Gradual(0.5, events=STEPS + 1))).train()


def test_a_stop_rule_without_a_validation_set_is_refused(tmp_path):
    with pytest.raises(PruneKitError, match="needs a validation set"):
        trainer_of(tmp_path, GradualPruning(Gradual(0.9, worse=0.1)), evaluated=False).train()


@pytest.mark.ci
@pytest.mark.slow
def test_two_processes_of_distillation_killed_and_resumed_prune_exactly(tmp_path):
    """GKD of the embedded model by distil.sh under DDP, pruned gradually: kill -9 in the middle, then go on."""
    model, row = EMBEDDED, {"role": "user", "content": "Read the text."}
    messages = [{"messages": [row, {"role": "assistant", "content": f"a{number}"}]} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(message) + "\n" for message in messages))
    environment = os.environ | {
        "MODEL": str(model), "TEACHER": str(model), "OUTPUT": str(tmp_path / "out"), "GPUS": "", "CPU_PROCESSES": "2",
        "DATASET": str(tmp_path / "rows.jsonl"), "VAL_DATASET": str(tmp_path / "rows.jsonl"), "WANDB_MODE": "offline",
        "PRUNEKIT_GRADUAL": "sparsity=0.6 events=4 modules=language_model", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        "bash", "distil.sh", "--external_plugins", "plugins/images_and_answers.py", "plugins/sparsity.py",
        "--callbacks", "gradual_pruning", "--max_steps", "8", "--save_steps", "2", "--eval_steps", "8",
        "--max_completion_length", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
        "--per_device_eval_batch_size", "20", "--logging_steps", "1", "--learning_rate", "1e-3",
    ]  # fmt: skip
    out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, **out)
    deadline = time.time() + 180
    while not (tmp_path / "out.run/checkpoint-4/trainer_state.json").exists():
        assert launcher.poll() is None and time.time() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout

    history = json.loads((tmp_path / "out/sparsity.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")
    chosen = [tensors[name] for name in choose_weights(open_checkpoint(tmp_path / "out"), "language_model")]
    total = sum(values.numel() for values in chosen)
    assert [event["step"] for event in history["events"]] == [0, 2, 4, 6]
    assert [event["zeros"] for event in history["events"]] == [
        round(level * total) for level in Gradual(0.6, events=4).levels()
    ]
    assert sum(int((values == 0).sum()) for values in chosen) == history["events"][-1]["zeros"]
    for when in ("before", "after", "retrained"):
        assert all(isinstance(event[when], float) for event in history["events"])
    assert (tmp_path / "out/quality.png").exists()
