"""ms-swift's GKD trainer with our loss (distillation_loss.py), and from a cache of what a teacher says.

plugins/distillation.py puts it in ms-swift's place.
"""

import inspect
import json
import os
import sys
from pathlib import Path

import swift
import torch
from swift.rlhf_trainers import GKDTrainer
from swift.rlhf_trainers.gkd_helpers import encode_gkd_samples
from swift.utils import to_device

from prunekit.checkpoint import fingerprint, open_checkpoint
from prunekit.data.rows import find_question
from prunekit.errors import PruneKitError

from .distillation_loss import TopK, distillation_loss, known_to, top_k
from .teacher_cache import SETTINGS, Settings, TeacherCache, row_key

FILL = "PRUNEKIT_FILL_CACHE"  # in the environment: a folder to fill; the model is the teacher then

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


def _encode(trainer: GKDTrainer, samples) -> list[dict]:
    """Rows as a template makes them for a model; of any length, as ms-swift's trainer has it."""
    with trainer._template_context(trainer.template):
        encoded, _, other_prompts = encode_gkd_samples(samples, trainer.template)
    if other_prompts:
        raise PruneKitError("teacher_prompt and teacher_images don't go with CACHE: remove these columns, or CACHE")
    return encoded


def _place_of(trainer: GKDTrainer, messages: list[dict]) -> str:
    """Which row of a training's data sets asks this."""
    line = json.loads((Path(trainer.args.output_dir) / "args.json").read_bytes())
    return find_question([*line["dataset"], *line["val_dataset"]], messages) or f"row {str(messages)[:200]}"


def _numbers_of(teacher: TopK | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return teacher.log_probs if isinstance(teacher, TopK) else teacher[rows]


class CacheFiller(GKDTrainer):
    """Trains nothing: has the model, the teacher, say of all rows what a distillation will ask it."""

    def _setup_teacher(self):
        self.teacher_model_server = None  # it is the model itself
        super()._setup_teacher()

    def train(self, *args, **kwargs):
        teacher = open_checkpoint(self.accelerator.unwrap_model(self.model).config.name_or_path)
        vocabulary = (teacher.config.get("text_config") or teacher.config)["vocab_size"]
        settings = Settings(fingerprint(teacher), vocabulary, self.gkd_logits_topk, self.temperature)
        self.cache = TeacherCache(Path(os.environ[FILL]), settings)
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                self.evaluation_loop(self.get_eval_dataloader(dataset), "teacher", prediction_loss_only=True)
                self.cache.flush()
        self.accelerator.wait_for_everyone()
        raise SystemExit(0)  # there is nothing to save

    def prediction_step(self, model, inputs, *args, **kwargs):
        template, device = self.template, self.accelerator.device
        samples = self.to_samples(inputs)
        rows = _encode(self, samples)
        limit = template.max_length if template.truncation_strategy == "raise" else None  # longer ones aren't learnt
        taken = [number for number, row in enumerate(rows) if not limit or row["length"] <= limit]
        keys = [row_key(row) for row in rows]
        missing = [number for number in taken if keys[number] not in self.cache]
        # A model that lies on several devices answers on all of them or on none.
        waiting = self.accelerator.gather(torch.tensor([len(missing)], device=device))
        if waiting.sum():
            chosen = missing or taken[:1] or [0]
            batch = to_device(template.data_collator([rows[number] for number in chosen]), device)
            counts = [sum(label != -100 for label in rows[number]["labels"]) for number in chosen]
            self.prepare_logits_to_keep(batch)
            labels = batch.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**batch).logits
            top = top_k(
                logits.flatten(0, 1),
                _next_token_rows(labels),
                self.cache.settings.top_k,
                self.cache.settings.temperature,
            )
            for number, part in zip(missing, zip(*(each.split(counts) for each in top), strict=True)):
                if part[1].isnan().any():
                    where = _place_of(self, samples[number].messages)
                    raise PruneKitError(f"NaN of the teacher, in {where}: look at it, or compute in another DTYPE")
                self.cache.add(keys[number], TopK(*part))
        return None, None, None


class DistillationTrainer(GKDTrainer):
    """GKD by our loss: in fp32, and with --gkd_logits_topk not blind to what the student puts outside the top-k.

    With a cache's folder as --teacher_model_server it is a CachedTeacherTrainer.
    """

    use_teacher_api: bool
    teacher_model_server: str | None

    def __new__(cls, *args, **kwargs):
        cached = (Path(kwargs.get("teacher_model_server") or "") / SETTINGS).is_file()
        return super().__new__(CachedTeacherTrainer if cached else cls)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_temperature()

    def _check_temperature(self) -> None:
        if self.use_teacher_api and self.temperature != 1:
            raise PruneKitError(
                f"--temperature {self.temperature}: a teacher server answers at temperature 1: set that, or "
                f"--teacher_model"
            )

    def _compute_jsd_loss(self, student_logits, teacher_output, labels):
        rows, teacher_rows = map(_next_token_rows, (labels, teacher_output.labels))
        cached = teacher_output.topk_logprobs if isinstance(teacher_output.topk_logprobs, TopK) else None
        known_rows = len(teacher_rows if cached is None else cached.log_tail)
        if len(rows) != known_rows:
            raise ValueError(f"{len(rows)} tokens for the student, {known_rows} for the teacher")
        student = student_logits.flatten(0, 1)
        if cached is not None:
            teacher = cached
        elif teacher_output.is_topk_mode:
            indices, log_probs = (
                part.flatten(0, 1)[teacher_rows] for part in (teacher_output.topk_indices, teacher_output.topk_logprobs)
            )
            known = (log_probs > -torch.inf).any(-1)
            rows, teacher = rows[known], TopK.without_tail(indices[known], log_probs[known])
        else:
            # Embeddings are padded to different sizes: what the student's hasn't it can't learn.
            teacher = teacher_output.full_logits.flatten(0, 1)[:, : student.shape[-1]]
            if self.gkd_logits_topk is not None:
                teacher = top_k(teacher, teacher_rows, self.gkd_logits_topk, self.temperature)
        if isinstance(teacher, TopK):
            teacher = teacher.within(student.shape[-1])
        total = distillation_loss(student, rows, teacher, teacher_rows, self.beta, self.temperature)
        if not total.isfinite():
            batch, length, _ = student_logits.shape
            numbers = {"student": student[rows], "teacher": _numbers_of(teacher, teacher_rows)}
            raise PruneKitError(self._blame(numbers, rows // length, batch))
        return total / max(1, len(rows))

    def _prepare_batch_inputs(self, samples):
        chunks = super()._prepare_batch_inputs(samples)
        teacher = self.teacher_model and self.accelerator.unwrap_model(self.teacher_model)
        for chunk, part in zip(chunks, self.split_by_mini_batches(samples), strict=True):
            chunk["samples"] = part
            if teacher:
                inputs = chunk["teacher_model_inputs"]
                inputs["input_ids"] = known_to(teacher, inputs["input_ids"], self.template.tokenizer.pad_token_id)
        return chunks

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._samples = inputs["samples"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _blame(self, numbers: dict[str, torch.Tensor], owners: torch.Tensor, batch: int) -> str:
        """Whose numbers (N, ...) are NaN, and for which row; owners (N,): the tokens' places in the batch."""
        whose, owner = "", owners[:1]
        for name, each in numbers.items():
            bad = owners[each.isnan().flatten(1).any(-1)]
            if len(bad):
                whose, owner = f": NaN of the {name}", bad[:1]
                break
        alone = batch == len(self._samples)  # without padding all of them are one
        where = _place_of(self, self._samples[int(owner) if alone else 0].messages)
        return (
            f"the loss of step {self.state.global_step + 1} is not finite{whose}, in {where}"
            f"{'' if alone else ' or one beside it'}: look at it, lower --learning_rate, or compute in another DTYPE"
        )

    def log(self, logs, *args, **kwargs):
        first = "loss" in logs and not any("loss" in record for record in self.state.log_history)
        super().log(logs, *args, **kwargs)
        if first and float(logs["loss"]) > HIGH and self.accelerator.is_main_process:
            warn(
                f"the distillation starts at a loss of {float(logs['loss']):.2f}, over {HIGH}: recover longer by "
                "full_run.sh first; and are tokenizer and template the teacher's?"
            )


class CachedTeacherTrainer(DistillationTrainer):
    """What the teacher says of the data set's answers is found in a cache, and no teacher is there."""

    def __init__(self, *args, **kwargs):
        self.cache = TeacherCache(Path(kwargs["teacher_model_server"]))
        super().__init__(*args, **kwargs)

    def _check_temperature(self) -> None:
        if self.temperature != (kept := self.cache.settings.temperature):
            raise PruneKitError(f"--temperature {self.temperature}: the cache is of temperature {kept:g}: set that")

    def _setup_teacher(self):
        self.teacher_model_server = None  # there is none to ask
        super()._setup_teacher()
        self.use_teacher_api, self._is_self_distillation = True, False

    def _encode_samples(self, samples):
        rows = _encode(self, samples)
        self._keys = [row_key(row) for row in rows]
        return to_device(self.template.data_collator(rows), self.accelerator.device), None

    def _build_teacher_requests(self, samples):
        return self._keys

    def _fetch_and_assemble_teacher_logprobs(self, chunks):
        for chunk in chunks:
            samples, keys = chunk.pop("_chunk_samples"), chunk.pop("_teacher_requests")
            found = self.cache.look_up(keys, (f"row {str(sample.messages)[:200]}" for sample in samples))
            # Of tokens that are learnt alone: the frames of ms-swift have no place for the tail.
            chunk["gkd_batch"].teacher_topk_logprobs = TopK(*(part.to(self.accelerator.device) for part in found))
            chunk["gkd_batch"].teacher_topk_indices = found.indices


def warn(text: str) -> None:
    """Say it in the terminal, and to W&B where a run is open."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.summary["warning"] = text
        wandb.run.alert("Prune-Kit", text, level="WARN")
