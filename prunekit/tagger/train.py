"""Classifiers of tokens and of texts learn, from labels alone or from a teacher, too, on transformers' Trainer."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import Checkpoint
from prunekit.checkpoint.records import LOG
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.checkpoint.training_run import whole_checkpoints
from prunekit.errors import PruneKitError
from prunekit.model.light import light_transformers

from .rows import TOKEN_CLASSIFIER, model_labels
from .scores import Data
from .texts import TextData

TEMPERATURE, HARD_SHARE = 2.0, 0.5
RATE, LORA_RATE = 5e-5, 5e-4  # a LoRA, which starts from nothing, needs about ten times as much


def matching_layers(entries: list[dict[str, Any]], teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
    """(student's, teacher's) numbers of hidden states that should be alike; number n is the state after n layers.

    `entries` is the student's history. Where it tells which of the teacher's layers were removed, a student's state is
    matched with what the next layer that was kept saw in the teacher; else with the one as deep in proportion.
    """
    kept: list[int] | None = None
    for entry in entries:
        if entry.get("num_hidden_layers_before") == teacher_layers:
            kept = list(range(teacher_layers))  # the last folder with all of the teacher's layers counts
        gone = (entry.get("removed") or {}).get("text") if isinstance(entry.get("removed"), dict) else None
        if kept and gone:
            kept = [number for place, number in enumerate(kept) if place not in gone]
    if kept is None or len(kept) != student_layers:
        return [(n, round(n * teacher_layers / student_layers)) for n in range(1, student_layers + 1)]
    return list(enumerate([*kept[1:], teacher_layers], 1))


@dataclass(frozen=True)
class Distillation:
    """What a student learns from a teacher: loss = hard * CE + (1 - hard) * T^2 KL(teacher || student) + hidden * MSE.

    KL (Hinton et al., arXiv:1503.02531) and MSE of hidden states (`layers`: pairs of `matching_layers`) are means over
    all sub-words that aren't padding, CE over those with a label. Of texts KL and CE are means over the texts.
    """

    teacher: Any
    temperature: float = TEMPERATURE
    hard: float = HARD_SHARE
    hidden: float = 0.0
    layers: tuple[tuple[int, int], ...] = ()

    def loss(self, student, inputs: dict[str, Any]):
        """The loss of a student's output (with hidden states where `hidden` isn't 0) for these inputs."""
        import torch
        from torch.nn import functional

        mask = inputs["attention_mask"].bool()
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad():
            teacher = self.teacher(**given, output_hidden_states=bool(self.hidden))
        ours, theirs = (
            functional.log_softmax((logits[mask] if logits.dim() == 3 else logits).float() / self.temperature, -1)
            for logits in (student.logits, teacher.logits)
        )
        soft = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2
        loss = self.hard * student.loss + (1 - self.hard) * soft
        if self.hidden:
            pairs = [
                functional.mse_loss(student.hidden_states[ours][mask], teacher.hidden_states[theirs][mask])
                for ours, theirs in self.layers
            ]
            loss = loss + self.hidden * torch.stack(pairs).mean()
        return loss


def _trainer_class():
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class NerTrainer(Trainer):
        """A Trainer that can learn from a teacher. Evaluation's loss is that of the labels alone."""

        distillation: Distillation | None = None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # Token classifiers take further arguments, but no count of a whole batch's labels: their loss is a mean.
            self.model_accepts_loss_kwargs = False

        def _get_eval_sampler(self, dataset):
            return SequentialSampler(dataset)  # predictions are put together by the order of the rows

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teaching = self.distillation if model.training else None
            output = model(**inputs, output_hidden_states=bool(teaching and teaching.hidden))
            loss = teaching.loss(output, inputs) if teaching else output.loss
            return (loss, {"logits": output.logits}) if return_outputs else loss

    return NerTrainer


def _log_callback(file: Path):
    from transformers import TrainerCallback

    class LogFile(TrainerCallback):
        """Keeps what is logged in the file from which figures are drawn, spelled as ms-swift does."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero:
                step = {"global_step/max_steps": f"{state.global_step}/{state.max_steps}"}
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({**(logs or {}), **step}) + "\n")

    return LogFile()


def load_classifier(
    checkpoint: Checkpoint, labels: dict[int, str], new_head: bool = False, kind: str = TOKEN_CLASSIFIER
):
    """The checkpoint as a classifier of this kind in fp32, with a new head for `labels` if so wanted.

    Raises PruneKitError if anything but a new head (and the pooler that it may read from) is missing from its weights.
    """
    import torch

    check_no_remote_code(checkpoint.path)
    transformers = light_transformers()
    model, info = getattr(transformers, f"AutoModel{kind}").from_pretrained(
        checkpoint.path, dtype="float32", id2label=labels, num_labels=len(labels),
        label2id={name: number for number, name in labels.items()},
        ignore_mismatched_sizes=new_head, output_loading_info=True,
    )  # fmt: skip
    inside = tuple(f"{prefix}." for prefix, module in model.named_children() if module is model.base_model)
    layers = {key for key in info["missing_keys"] if key.startswith(inside) and ".pooler." not in key}
    missing = layers if new_head else info["missing_keys"]
    if missing:
        raise PruneKitError(f"{checkpoint.path}: has no {min(missing)}; copy or download it again")
    if new_head:  # also one that would fit: it is of other labels
        for child in model.children():
            for module in child.modules() if child is not model.base_model else ():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.normal_(module.weight, std=0.02)
                    torch.nn.init.zeros_(module.bias)
    return model


def training_arguments(flags: list[str], run: Path, name: str, validate: bool, rate: float = RATE):
    """transformers' TrainingArguments: our defaults, then the user's flags. PruneKitError for flags it doesn't know.

    `rate`: the learning rate where the flags say none.
    """
    from transformers import HfArgumentParser, TrainingArguments

    defaults = {
        "num_train_epochs": 3,
        "learning_rate": rate,
        "warmup_steps": 0.06,  # below 1: a share of all steps
        "weight_decay": 0.01,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if validate else "no",
        "save_total_limit": 2,
        "load_best_model_at_end": validate,
        "metric_for_best_model": "f1" if validate else "loss",
        "dataloader_pin_memory": False,
        "report_to": "wandb",
        "run_name": f"ner_run-{name}",
    }
    words = [word for key, value in defaults.items() for word in (f"--{key}", str(value))]
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    parser.error = partial(Parser.error, parser)
    if any(re.match("--output[-_]dir(=|$)", flag) for flag in flags):
        raise PruneKitError(f"--output_dir: is {run} here, which is removed in the end; choose --out instead")
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            [*words, *flags, "--output_dir", str(run)], return_remaining_strings=True
        )
    except (ValueError, OSError, ImportError) as error:
        raise PruneKitError(f"training flags: {' '.join(str(error).split())}") from None
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise PruneKitError(f"--{field.name} {value}: give a number")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise PruneKitError(f"--{name} {getattr(arguments, name)}: give 1 or more")
    if arguments.learning_rate < 0:
        raise PruneKitError(f"--learning_rate {arguments.learning_rate}: give a positive number")
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        raise PruneKitError(f"--num_train_epochs {arguments.num_train_epochs}: nothing would be trained")
    if arguments.save_strategy == "no":
        raise PruneKitError("--save_strategy no: what is trained is published from a checkpoint; leave it out")
    if given := arguments.resume_from_checkpoint:
        raise PruneKitError(f"--resume_from_checkpoint {given}: leave it out: the same command goes on from {run}")
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if unknown:
        raise PruneKitError(f"{unknown[0]}: neither ner_run.py nor transformers' TrainingArguments knows it")
    return arguments


def train(
    model,
    arguments,
    tokenizer,
    data: Data | TextData,
    validation: Data | TextData | None = None,
    distillation: Distillation | None = None,
    callbacks: Iterable[Any] = (),
) -> tuple[Path, dict[str, Any]]:
    """Train `model` in place, resuming from the last whole checkpoint in `arguments.output_dir`.

    Returns the checkpoint-N folder to publish, the one of the best F1 if there is `validation` (the last without
    load_best_model_at_end), and its metrics: loss and scores on the validation rows, or the mean training loss.
    """
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, TrainerState

    run = Path(arguments.output_dir)
    scores: dict[str, Any] = {}

    def compute_metrics(prediction):
        assert validation is not None  # else nobody asks
        scores.update(validation.scores(prediction.predictions[prediction.label_ids != -100]))
        return {key: scores[key] for key in ("f1", "precision", "recall", "accuracy") if key in scores}

    trainer = _trainer_class()(
        model=model,
        args=arguments,
        data_collator=(DataCollatorWithPadding if isinstance(data, TextData) else DataCollatorForTokenClassification)(
            tokenizer
        ),
        train_dataset=data.features,
        eval_dataset=validation and validation.features,
        compute_metrics=validation and compute_metrics,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        callbacks=[_log_callback(run / LOG), *callbacks],
    )
    trainer.distillation = distillation
    if distillation:
        distillation.teacher.to(arguments.device).eval()
    whole = whole_checkpoints(run)
    last = whole[max(whole)] if whole else None
    state = TrainerState.load_from_json(str(last / "trainer_state.json")) if last else None
    if state and state.global_step >= state.max_steps:  # killed since: a Trainer would take a step more
        print(f"all steps are taken, in {last}")
        trainer.state = state
        best = arguments.load_best_model_at_end and state.best_model_checkpoint
        trainer._load_from_checkpoint(str(run / Path(best).name if best else last))
    else:
        if last:
            print(f"resuming from {last}")
        trainer.train(resume_from_checkpoint=last and str(last))
        whole = whole_checkpoints(run)
        last = whole[max(whole)]
    assert last
    if not validation:
        return last, _mean_loss(trainer.state.log_history)
    best = arguments.load_best_model_at_end and trainer.state.best_model_checkpoint
    loss = trainer.evaluate()["eval_loss"]  # of what is in memory: that, or the last
    return run / Path(best).name if best else last, {"loss": loss, **scores}


def _mean_loss(history: list[dict[str, Any]]) -> dict[str, float]:
    """The train_loss of all steps up to the last logged one; the Trainer's own is of those since it was resumed."""
    logged = [(record["step"], record["loss"]) for record in history if "loss" in record]
    sums = [loss * (step - before) for (step, loss), before in zip(logged, [0, *(step for step, _ in logged)])]
    return {"train_loss": sum(sums) / logged[-1][0]} if logged else {}


def check_teacher(
    teacher: Checkpoint, student: Checkpoint, labels: dict[int, str], hidden: bool, kind: str = TOKEN_CLASSIFIER
) -> None:
    """PruneKitError if a student of these labels can't learn from this teacher."""
    if (theirs := model_labels(teacher.config, kind)) != labels:
        differ = sorted(set(theirs.items()) ^ set(labels.items()))[0]
        raise PruneKitError(
            f"{teacher.path}: its labels are not the student's ({len(theirs)} and {len(labels)}; {differ[1]} is number "
            f"{differ[0]} of one only); train the teacher on this data first"
        )
    keys = [("vocab_size", "vocab_size")]
    if hidden:
        keys.append((teacher.family.hidden, student.family.hidden))
    for its, own in keys:
        if teacher.config.get(its) != student.config.get(own):
            mend = "leave out --hidden-weight" if own != "vocab_size" else "it must read the same tokens"
            raise PruneKitError(
                f"{teacher.path}: {its} {teacher.config.get(its)}, the student's is {student.config.get(own)}; {mend}"
            )
