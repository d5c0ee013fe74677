"""Zeros that move: as many as before, the smallest for the steepest."""

import shutil

import pytest
import torch
import transformers
from helpers.cuts import sparsify
from helpers.sparse_trainings import Watch, trainer_of
from helpers.tiny_models import load
from hypothesis import given
from hypothesis import strategies as st

from prunekit.training.zeros import DynamicSparsity, moved
from prunekit.training.zeros_settings import Dynamic

pytestmark = pytest.mark.usefixtures("plain_trainer")


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


def test_a_training_that_is_interrupted_before_zeros_first_move_goes_on(tmp_path):
    settings, ends = Dynamic(interval=6, share=0.5, sparsity=0.6, until=1.0), []

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer_of(tmp_path, DynamicSparsity(settings), Stop()).train()
    for folder, resume in (("whole", None), (".", str(tmp_path / "checkpoint-4"))):
        callback = DynamicSparsity(settings)
        trainer = trainer_of(tmp_path / folder, callback)
        trainer.train(resume_from_checkpoint=resume)
        assert [event["step"] for event in callback.history["events"]] == [6]
        ends.append([weight.detach() for weight in trainer.model.parameters()])
    assert all(map(torch.equal, *ends))


def test_zeros_that_moved_are_drawn_without_a_quality_that_nobody_measured(tiny, tmp_path, script_here):
    sparsify(tiny("llama"), tmp_path / "out", sparsity=0.5)
    trainer_of(tmp_path / "run", DynamicSparsity(Dynamic(interval=2)), model=load(tmp_path / "out")).train()
    shutil.copy(tmp_path / "run/sparsity.json", tmp_path / "out")
    done = script_here("prunekit.report.__main__", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/sparsity.png").exists() and not (tmp_path / "out/quality.png").exists()


def test_dynamic_sparsity_begins_with_one_threshold_for_all():
    callback = DynamicSparsity(Dynamic(sparsity=0.6))
    callback.weights = {"a": torch.tensor([[1.0, 2, 3]]), "b": torch.tensor([[4.0, 5.0]])}
    masks = callback._first_masks(None)
    assert masks["a"].all() and not masks["b"].any()
