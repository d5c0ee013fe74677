"""ms-swift's GKD trainer with our loss (distillation_loss.py). plugins/distillation.py puts it in ms-swift's place."""

import inspect
import sys

import swift
import torch
from swift.rlhf_trainers import GKDTrainer

from prunekit.errors import PruneKitError

from .distillation_loss import TopK, distillation_loss, top_k

HIGH = 0.8  # nats a token that a healthy distillation starts below


def _check_hook() -> None:
    """PruneKitError unless ms-swift calls what is replaced here, as it is replaced."""
    wanted = ["self", "student_logits", "teacher_output", "labels"]
    method = getattr(GKDTrainer, "_compute_jsd_loss", None)
    called = inspect.unwrap(GKDTrainer.compute_loss).__code__.co_names
    if method is None or list(inspect.signature(method).parameters) != wanted or "_compute_jsd_loss" not in called:
        raise PruneKitError(
            f"ms-swift {swift.__version__}: its GKD trainer isn't the one that our loss fits into; install ms-swift 4.6"
        )


_check_hook()


def _next_token_rows(labels: torch.Tensor) -> torch.Tensor:
    """Of all positions, batch and sequence in one, those whose next token is to be learnt."""
    return (labels.roll(-1, dims=1) != -100).flatten().nonzero()[:, 0]


class DistillationTrainer(GKDTrainer):
    """GKD by our loss: in fp32, and with --gkd_logits_topk not blind to what the student puts outside the top-k."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.use_teacher_api and self.temperature != 1:
            raise PruneKitError(
                f"--temperature {self.temperature}: a teacher server answers at temperature 1: set that, or "
                f"--teacher_model"
            )

    def _compute_jsd_loss(self, student_logits, teacher_output, labels):
        rows, teacher_rows = map(_next_token_rows, (labels, teacher_output.labels))
        if len(rows) != len(teacher_rows):
            raise ValueError(f"{len(rows)} tokens for the student, {len(teacher_rows)} for the teacher")
        student = student_logits.flatten(0, 1)
        if teacher_output.is_topk_mode:
            indices, log_probs = (
                part.flatten(0, 1)[teacher_rows] for part in (teacher_output.topk_indices, teacher_output.topk_logprobs)
            )
            known = (log_probs > -torch.inf).any(-1)
            rows, teacher = rows[known], TopK.without_tail(indices[known], log_probs[known])
        else:
            teacher = teacher_output.full_logits.flatten(0, 1)
            # Embeddings are padded to different sizes: tokens are what both have.
            common = min(student.shape[-1], teacher.shape[-1])
            student, teacher = student[:, :common], teacher[:, :common]
            if self.gkd_logits_topk is not None:
                teacher = top_k(teacher, teacher_rows, self.gkd_logits_topk, self.temperature)
        total = distillation_loss(student, rows, teacher, teacher_rows, self.beta, self.temperature)
        return total / max(1, len(rows))

    def log(self, logs, *args, **kwargs):
        first = "loss" in logs and not any("loss" in record for record in self.state.log_history)
        super().log(logs, *args, **kwargs)
        if first and float(logs["loss"]) > HIGH and self.accelerator.is_main_process:
            warn(
                f"the distillation starts at a loss of {float(logs['loss']):.2f}, over {HIGH}: recover longer by "
                "full_run.sh first; and are tokenizer and template the teacher's?"
            )


def warn(text: str) -> None:
    """Say it in the terminal, and to W&B where a run is open."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.summary["warning"] = text
        wandb.run.alert("Prune-Kit", text, level="WARN")
