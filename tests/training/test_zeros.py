"""Training sparse models: zeros that stay, deepen or move, in transformers' Trainer and in ms-swift itself."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import build
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery.zeros_weights import choose_weights
from prunekit.training import zeros as sparse_training
from prunekit.training.zeros import (
    MASKS,
    DynamicSparsity,
    GradualPruning,
    KeepZeros,
    moved,
    prune_lowest,
)
from prunekit.training.zeros_settings import Dynamic, Gradual, parse_settings

pytestmark = pytest.mark.usefixtures("plain_trainer")

STEPS = 8


def rows(count: int, seed: int = 0) -> list[dict]:
    found = torch.randint(5, 100, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in found]


def trainer_of(folder, *callbacks, model=None, evaluated=True, **settings) -> transformers.Trainer:
    settings = {
        "max_steps": STEPS, "learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True,
    } | settings  # fmt: skip
    trainer = transformers.Trainer(
        model or build("llama"),
        transformers.TrainingArguments(folder, **settings),
        train_dataset=rows(40),
        eval_dataset=rows(8, 1) if evaluated else None,
        callbacks=list(callbacks),
    )
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def sparse(family="llama", threshold=0.03):
    model = build(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.masked_fill_(weight.abs() < threshold, 0)
    return model


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach() == 0 for name, weight in model.named_parameters() if "proj" in name}


class Watch(transformers.TrainerCallback):
    """What `look(model, optimizer)` says after each step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seen.append(self.look(model, optimizer))


# --- zeros that stay ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_zeros_are_the_same_after_every_step(optim, tmp_path):
    model = sparse()
    before, embeddings = zeros_of(model), model.get_input_embeddings().weight.detach().clone()
    watch = Watch(lambda model, _: all(torch.equal(z, before[n]) for n, z in zeros_of(model).items()))
    trainer = trainer_of(tmp_path, KeepZeros(), watch, model=model, optim=optim, gradient_accumulation_steps=2)
    trainer.train()
    assert watch.seen == [True] * STEPS
    assert not torch.equal(model.get_input_embeddings().weight, embeddings), "the others were trained"


def test_adamw_learns_nothing_of_masked_weights(tmp_path):
    model = sparse()
    masks = zeros_of(model)

    def moments(model, optimizer):
        states = [(optimizer.state[w], masks[n]) for n, w in model.named_parameters() if n in masks]
        return max(float(s[key][m].abs().max()) for s, m in states for key in ("exp_avg", "exp_avg_sq"))

    watch = Watch(moments)
    trainer_of(tmp_path, KeepZeros(), watch, model=model).train()
    assert watch.seen == [0.0] * STEPS


def test_clipping_counts_only_what_is_trained(tmp_path):
    norms = {}
    for name, callbacks in {"kept": [KeepZeros()], "free": []}.items():
        trainer = trainer_of(tmp_path / name, *callbacks, model=sparse(threshold=0.06), logging_steps=1, max_steps=1)
        trainer.train()
        norms[name] = trainer.state.log_history[0]["grad_norm"]
    assert norms["kept"] < 0.95 * norms["free"]


def test_a_model_without_zeros_is_refused(tmp_path):
    with pytest.raises(PruneKitError, match="nothing to keep"):
        trainer_of(tmp_path, KeepZeros()).train()


def test_zero_biases_and_embeddings_are_trained(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "wte" in name:
                weight.zero_()
        model.transformer.h[0].mlp.c_fc.weight[0] = 0
    trainer_of(tmp_path, KeepZeros(), model=model).train()
    assert (model.transformer.h[0].mlp.c_fc.weight[0] == 0).all()
    assert (model.transformer.h[0].mlp.c_fc.bias != 0).any() and (model.transformer.wte.weight != 0).any()


def test_after_the_training_nothing_is_held(tmp_path):
    model = sparse()
    trainer_of(tmp_path, KeepZeros(), model=model).train()
    model(**{key: value[None] for key, value in rows(1)[0].items()}).loss.backward()
    masks = zeros_of(model)
    assert any((w.grad[masks[n]] != 0).any() for n, w in model.named_parameters() if n in masks)


def test_weights_that_are_not_trained_keep_nothing(tmp_path):
    model, callback = sparse(), KeepZeros()
    model.model.layers[1].requires_grad_(False)
    trainer_of(tmp_path, callback, model=model, max_steps=1).train()
    assert not any(".layers.1." in name for name in callback.masks) and callback.masks


def test_whatever_a_step_made_of_masked_weights_they_are_zero_after_it():
    callback, weight = KeepZeros(), torch.nn.Parameter(torch.ones(2, 2))
    callback.weights, callback.masks = {"a": weight}, {"a": torch.eye(2).bool()}
    callback.on_optimizer_step(None, None, None)
    assert weight.tolist() == [[0, 1], [1, 0]]


def test_masks_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    callback, saved = KeepZeros(), SimpleNamespace(should_save=True, output_dir=tmp_path)
    callback.masks = {"a": torch.eye(2).bool()}
    (tmp_path / "checkpoint-3").mkdir()

    def torn(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(sparse_training, "save_file", torn)
    with pytest.raises(OSError, match="disk is full"):
        callback.on_save(saved, SimpleNamespace(global_step=3), None)
    assert not (tmp_path / "checkpoint-3" / MASKS).exists()


# --- resuming -------------------------------------------------------------------------------------------------

KINDS = {
    "keep_zeros": lambda: KeepZeros(),
    "gradual": lambda: GradualPruning(Gradual(0.7, events=4)),
    "dynamic": lambda: DynamicSparsity(Dynamic(interval=1, share=0.5, sparsity=0.6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_ends_with_the_same_bits(kind, tmp_path):
    ends, histories = [], []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback = KINDS[kind]()
        trainer = trainer_of(tmp_path, callback, model=sparse())
        trainer.train(resume_from_checkpoint=resume)
        ends.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        histories.append(getattr(callback, "history", None))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert histories[0] == histories[1]


def test_a_weight_that_happens_to_be_zero_is_no_part_of_a_resumed_mask(tmp_path):
    trainer_of(tmp_path, KeepZeros(), model=sparse()).train()
    file, name = tmp_path / "checkpoint-4/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    place = tuple(tensors[name].nonzero()[0])
    tensors[name][place] = 0
    save_file(tensors, file, {"format": "pt"})
    trainer = trainer_of(tmp_path, KeepZeros())
    trainer.train(resume_from_checkpoint=str(file.parent))
    assert trainer.model.get_parameter(name)[place] != 0


def test_moving_zeros_are_not_guessed_where_their_masks_are_missing(tmp_path):
    trainer_of(tmp_path, KINDS["dynamic"]()).train()
    (tmp_path / "checkpoint-4" / MASKS).unlink()
    with pytest.raises(PruneKitError, match="so it isn't whole; remove it"):
        trainer_of(tmp_path, KINDS["dynamic"]()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_other_settings_for_a_resumed_run_are_refused(tmp_path):
    trainer_of(tmp_path, KINDS["gradual"]()).train()
    other = GradualPruning(Gradual(0.5, events=4))
    with pytest.raises(PruneKitError, match="other settings of sparsity"):
        trainer_of(tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


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


# --- zeros that become more -----------------------------------------------------------------------------------


def test_schedules_are_the_papers_formulas():
    assert Gradual(0.8, 0.1, 4, "exponential").levels() == pytest.approx([0.1, 0.2, 0.4, 0.8])
    thirds = [0.8 + (0.1 - 0.8) * (1 - share / 3) ** 3 for share in range(4)]
    assert Gradual(0.8, 0.1, 4, "cubic").levels() == pytest.approx(thirds)
    assert Gradual(0.6, events=1).levels() == [0.6]


@given(st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(1, 30), st.sampled_from(["cubic", "exponential"]))
def test_sparsity_never_falls_and_ends_where_it_shall(sparsity, start, events, schedule):
    levels = Gradual(sparsity, start * sparsity, events, schedule).levels()
    assert len(levels) == events and levels[-1] == sparsity
    assert all(a <= b + 1e-12 for a, b in zip(levels, levels[1:]))


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


@pytest.mark.parametrize("kind", ["gradual", "dynamic"])
def test_adamw_has_nothing_of_what_was_pruned_on_the_way(kind, tmp_path):
    callback = KINDS[kind]()

    def moments(model, optimizer):
        states = [(optimizer.state[callback.weights[name]], mask) for name, mask in callback.masks.items()]
        return max(float(s[key][m].abs().max()) for s, m in states for key in ("exp_avg", "exp_avg_sq"))

    watch = Watch(moments)
    trainer = trainer_of(tmp_path, callback, watch, evaluated=False)
    trainer.train()
    assert watch.seen == [0.0] * STEPS
    state = trainer.optimizer.state[next(iter(callback.weights.values()))]
    assert (state["exp_avg"] != 0).any(), "the others are learnt"


def test_a_stop_rule_without_a_validation_set_is_refused(tmp_path):
    with pytest.raises(PruneKitError, match="needs a validation set"):
        trainer_of(tmp_path, GradualPruning(Gradual(0.9, worse=0.1)), evaluated=False).train()


# --- zeros that move ------------------------------------------------------------------------------------------


@given(st.data())
def test_a_moved_mask_has_as_many_zeros_drops_the_smallest_and_grows_the_steepest(data):
    size = data.draw(st.integers(2, 60))
    values = st.lists(st.floats(-4, 4, width=16), min_size=size, max_size=size)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    weight = torch.tensor(data.draw(values)).masked_fill(mask, 0)
    gradient = torch.tensor(data.draw(values))
    share = data.draw(st.floats(0, 1))
    new = moved(mask, weight, gradient, share)
    assert int(new.sum()) == int(mask.sum())
    dropped, grown = new & ~mask, mask & ~new
    if dropped.any():
        assert gradient[grown].abs().min() >= gradient[new].abs().max()
        count = min(int(share * int((~mask).sum())), int(mask.sum()))
        assert weight[dropped].abs().max() <= weight[~mask].abs().sort().values[count - 1]


def test_counts_of_each_matrix_are_constant_while_zeros_move(tmp_path):
    callback = DynamicSparsity(Dynamic(interval=2, share=0.5, sparsity=0.7, until=1.0))
    watch = Watch(lambda model, _: {name: int(mask.sum()) for name, mask in callback.masks.items()})
    before = {}
    trainer = trainer_of(tmp_path, callback, watch)
    trainer.add_callback(Watch(lambda model, _: before.setdefault("first", dict(callback.masks))))
    trainer.train()
    assert all(counts == watch.seen[0] for counts in watch.seen)
    assert sum(watch.seen[0].values()) == round(0.7 * sum(m.numel() for m in callback.masks.values()))
    weights = dict(trainer.model.named_parameters())
    for name, mask in callback.masks.items():
        assert (weights[name][mask] == 0).all()
    differing = sum(int((mask ^ before["first"][name]).sum()) for name, mask in callback.masks.items())
    assert differing > 0
    assert [event["step"] for event in callback.history["events"]] == [2, 4, 6]


def test_what_grows_begins_without_a_past_and_what_moves_is_counted(tmp_path):
    """AdamW's first moment of a weight that has just grown is a tenth of its gradient: nothing is left from before."""
    callback = DynamicSparsity(Dynamic(interval=1, share=0.5, sparsity=0.6, until=1.0))
    masks, gradients, found = [], [], []

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            masks.append({name: mask.clone() for name, mask in callback.masks.items()})
            gradients.append({name: callback.weights[name].grad.clone() for name in callback.masks})

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            for name, mask in callback.masks.items():
                grown = masks[-2][name] & ~mask if len(masks) > 1 else torch.zeros_like(mask)
                moment = optimizer.state[callback.weights[name]]["exp_avg"][grown]
                found.append(torch.allclose(moment, 0.1 * gradients[-1][name][grown], atol=1e-7))

    trainer = trainer_of(tmp_path, callback, evaluated=False, max_steps=5)
    trainer.add_callback(Gradients())
    trainer.train()
    assert all(found) and len(masks) == 5
    moves = [
        sum(int((later[name] & ~earlier[name]).sum()) for name in later) for earlier, later in zip(masks, masks[1:])
    ]
    assert [event["moved"] for event in callback.history["events"]] == moves and min(moves) > 0


def test_dynamic_sparsity_begins_with_one_threshold_for_all():
    callback = DynamicSparsity(Dynamic(sparsity=0.6))
    callback.weights = {"a": torch.tensor([[1.0, 2, 3]]), "b": torch.tensor([[4.0, 5.0]])}
    masks = callback._first_masks(None)
    assert masks["a"].all() and not masks["b"].any()


def test_the_share_that_moves_falls_along_a_cosine():
    dynamic = Dynamic(interval=10, share=0.4, until=0.5)
    shares = [dynamic.share_at(step, 200) for step in range(200)]
    assert [step for step, share in enumerate(shares) if share] == list(range(10, 100, 10))
    assert shares[50] == pytest.approx(0.2) and shares[10] == pytest.approx(0.2 * (1 + 0.9510565))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Gradual, "", "say how sparse it shall be"),
        (Gradual, "sparsity=1.2", "0 < start <= sparsity < 1"),
        (Gradual, "sparsity=half", "'sparsity=half' needs a number"),
        (Gradual, "sparsity=0.5 start=0.6", "0 < start <= sparsity"),
        (Gradual, "sparsity=0.5 sparsity=0.6", "each once"),
        (Gradual, "sparsity=0.5 event=4", "'event=4' isn't one of sparsity, start, events"),
        (Gradual, "sparsity=0.5 events=0", "events=0: at least 1"),
        (Gradual, "sparsity=0.5 schedule=linear", "choose one of cubic, exponential"),
        (Gradual, "sparsity=0.5 worse=-1", "worse=-1.0: a positive share"),
        (Dynamic, "interval=0", "interval=0: at least 1 step"),
        (Dynamic, "share=2", "share=2.0: above 0, at most 1"),
    ],
)
def test_bad_settings_are_named(kind, text, message):
    with pytest.raises(PruneKitError, match="^PRUNEKIT_X: ") as error:
        parse_settings(kind, text, "PRUNEKIT_X")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_are_words():
    found = parse_settings(Gradual, "sparsity=0.7 events=5 modules=mlp|o_proj worse=0.1", "X")
    assert found == Gradual(0.7, events=5, modules="mlp|o_proj", worse=0.1)
    assert parse_settings(Dynamic, "", "X") == Dynamic()


# --- ms-swift -------------------------------------------------------------------------------------------------


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
        "bash", "distil.sh", "--external_plugins", "plugins/qwen_vl_token_ids.py", "plugins/sparsity.py",
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
