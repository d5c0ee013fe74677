"""Tiny models with zeros, and short trainings of them in transformers' Trainer."""

import torch
import transformers
from helpers.tiny_models import build

from prunekit.training.zeros import DynamicSparsity, GradualPruning, KeepZeros
from prunekit.training.zeros_settings import Dynamic, Gradual

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


KINDS = {
    "keep_zeros": lambda: KeepZeros(),
    "gradual": lambda: GradualPruning(Gradual(0.7, events=4)),
    "dynamic": lambda: DynamicSparsity(Dynamic(interval=1, share=0.5, sparsity=0.6)),
}
