"""What RL's losses are divided by."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from prunekit.training.reinforcement_trainer import GRPOTrainer, GuardedGRPOTrainer


@pytest.mark.parametrize(("accumulated", "tokens"), [(1, [3, 1, 2, 6]), (2, [4, 4, 8, 8]), (4, [12] * 4)])
def test_dapo_divides_by_the_tokens_of_an_optimizer_step_not_of_a_rollout(monkeypatch, accumulated, tokens):
    def prepare(trainer, samples):
        masks = [torch.arange(6)[None] < length for length in samples]
        return [{"grpo_batch": SimpleNamespace(completion_mask=mask, num_items_in_batch=12)} for mask in masks]

    monkeypatch.setattr(GRPOTrainer, "_prepare_batch_inputs", prepare)
    trainer = GuardedGRPOTrainer.__new__(GuardedGRPOTrainer)
    trainer.args = SimpleNamespace(gradient_accumulation_steps=accumulated)
    trainer.model, trainer.accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True)
    found = trainer._prepare_batch_inputs([3, 1, 2, 6])
    assert [int(each["grpo_batch"].num_items_in_batch) for each in found] == tokens


def test_a_teacher_is_not_asked_of_tokens_that_its_embedding_has_not(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_teacher_logps", lambda trainer, inputs, batch: inputs["input_ids"])
    trainer = GuardedGRPOTrainer.__new__(GuardedGRPOTrainer)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    trainer.teacher_model = SimpleNamespace(config=config)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer.template = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    inputs = {"input_ids": torch.tensor([[5, 299, 300]])}
    assert trainer._compute_teacher_logps(inputs, None).tolist() == [[5, 299, 0]]
    assert inputs["input_ids"].tolist() == [[5, 299, 300]], "what the student is asked of stays"
