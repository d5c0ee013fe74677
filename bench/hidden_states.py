"""For bench/distil_training.py: distillation with a term for hidden states beside our loss. A plugin for ms-swift.

    HIDDEN_STATES=1.0 bash distil.sh --external_plugins bench/hidden_states.py

Adds HIDDEN_STATES times the squared distance between the student's and the teacher's states behind each text layer that
was kept, in shares of the teacher's square, a mean over layers and over the tokens that are learned (FitNets,
arXiv:1412.6550, without a projection: widths are the same). The teacher must be the model that layers were cut from.
"""

import os

import torch
from swift.trainers.trainer_factory import TrainerFactory

from prunekit.checkpoint import history, open_checkpoint
from prunekit.model.replay import find_stack
from prunekit.training.distillation_trainer import DistillationTrainer, _next_token_rows

WEIGHT = float(os.environ["HIDDEN_STATES"])


class HiddenStatesTrainer(DistillationTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        self.states: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
        numbers = list(range(len(self._hook(self.teacher_model, "teacher"))))
        for entry in history(student.config.name_or_path):
            gone = (entry["removed"] or {}).get("text", ())
            numbers = [number for place, number in enumerate(numbers) if place not in gone]
        if len(numbers) != len(self._hook(student, "student")):
            raise ValueError("the student's layers aren't those that its history says were kept")
        self.kept = numbers

    def _hook(self, model, whose):
        row = open_checkpoint(model.config.name_or_path).family.stacks["text"]
        layers = getattr(*find_stack(model, row))

        def keep(_, inputs, result):
            self.states[whose].append(result[0] if isinstance(result, tuple) else result)

        for layer in layers:
            layer.register_forward_hook(keep)
        return layers

    def compute_loss(self, model, inputs, *args, **kwargs):
        for states in self.states.values():
            states.clear()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_jsd_loss(self, student_logits, teacher_output, labels):
        loss = super()._compute_jsd_loss(student_logits, teacher_output, labels)
        ours, theirs = self.states["student"], self.states["teacher"]
        length = labels.shape[1]  # of the states, too, but for prompts that both leave out of the logits
        rows = _next_token_rows(labels)

        def counted(state):
            return state[:, -length:].flatten(0, 1)[rows].float()

        for number, state in zip(self.kept, ours, strict=True):
            wanted = counted(theirs[number])
            away = (counted(state) - wanted).square().sum(-1) / wanted.square().sum(-1)
            loss = loss + WEIGHT / len(ours) * away.mean()
        return loss


TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.HiddenStatesTrainer"
