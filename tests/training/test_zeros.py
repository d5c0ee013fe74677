"""Zeros that stay, in transformers' Trainer, and what all kinds of sparse training have in common: resuming."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.sparse_trainings import KINDS, STEPS, Watch, rows, sparse, trainer_of, zeros_of
from helpers.tiny_models import build
from safetensors.torch import load_file, save_file

from prunekit.errors import PruneKitError
from prunekit.training import zeros as sparse_training
from prunekit.training.zeros import MASKS, GradualPruning, KeepZeros
from prunekit.training.zeros_settings import Gradual

pytestmark = pytest.mark.usefixtures("plain_trainer")


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


# --- resuming -------------------------------------------------------------------------------------------------


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
