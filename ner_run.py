"""Train a classifier of tokens (NER) or of texts, on labels alone or with a teacher, and keep what was pruned.

    python manual_select.py --model checkpoints/dense --out checkpoints/student --text 10
    python ner_run.py --model checkpoints/student --teacher checkpoints/dense --out checkpoints/distilled \\
        --dataset data/train.jsonl --val-dataset data/val.jsonl --num_train_epochs 3
    python -m prunekit.ner evaluate --model checkpoints/dense checkpoints/distilled --dataset data/test.jsonl
    python ner_run.py --model camembert-base --task text-classification --new-head --lora-rank 16 \\
        --out checkpoints/mood --dataset data/reviews.jsonl --val-dataset data/val.jsonl

Data: JSONL with "tokens" and "ner_tags", or CoNLL text; of texts JSONL with "text" and "label". With --lora-rank only a
LoRA beside the layers' projections is trained, and the head; it is merged: OUT is a plain checkpoint either way. Any
flag of transformers' TrainingArguments may follow (--learning_rate 3e-5, --per_device_train_batch_size 32, --bf16 true,
...). With --val-dataset the epoch of the best F1 is kept, and scores of each type are printed. The same command
continues an interrupted run from its last whole checkpoint in OUT.run. One process, on one GPU if there is one.
"""

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, finite_float, positive_float, positive_int
from prunekit.checkpoint import Checkpoint, check_out, history, open_checkpoint, statistics
from prunekit.checkpoint.provenance import model_record
from prunekit.checkpoint.records import CURVES, LOG
from prunekit.checkpoint.training_run import whole_checkpoints
from prunekit.checkpoint.work_folder import begin_publishing, claim_folder, fingerprint, is_published, remove_work
from prunekit.errors import PruneKitError, need_packages, run_script
from prunekit.families import positions
from prunekit.report import draw_curves
from prunekit.tagger.lora import add_lora, merge_lora
from prunekit.tagger.rows import (
    TEXT_CLASSIFIER,
    TOKEN_CLASSIFIER,
    check_labels,
    encode,
    labels_of,
    load_tokenizer,
    model_labels,
    read_rows,
)
from prunekit.tagger.scores import Data, scores_table
from prunekit.tagger.texts import TextData, Texts, check_classes, classes_of, read_labelled
from prunekit.tagger.train import (
    HARD_SHARE,
    LORA_RATE,
    RATE,
    TEMPERATURE,
    Distillation,
    check_teacher,
    load_classifier,
    matching_layers,
    train,
    training_arguments,
)
from prunekit.training.publish import publish
from prunekit.training.tracking import setup_wandb

TASKS = {"token-classification": TOKEN_CLASSIFIER, "text-classification": TEXT_CLASSIFIER}


def encode_all(rows: list[Any], tokenizer, labels: dict[int, str], max_length: int) -> list[Data | TextData]:
    return [
        TextData.encoded(each, tokenizer, labels, max_length)
        if isinstance(each, Texts)
        else Data(*encode(each, tokenizer, labels, max_length), labels)
        for each in rows
    ]


def label_counts(data: Data | TextData) -> dict[str, int]:
    """How many words (or texts) of these rows have each label: what is served is compared with that."""
    numbers = [feature["labels"] for feature in data.features]
    if isinstance(data, Data):
        numbers = [number for labels in numbers for number in labels if number != -100]
    counts = Counter(numbers)
    return {name: counts[number] for number, name in data.labels.items()}


def train_model(
    checkpoint: Checkpoint,
    teacher: Checkpoint | None,
    data: list[Data | TextData],
    tokenizer: Any,
    training: Any,
    arguments: argparse.Namespace,
) -> tuple[Path, dict[str, Any]]:
    """Load and train: the checkpoint to publish and its metrics. `data`: to train on, and to validate by."""
    labels, kind = data[0].labels, TASKS[arguments.task]
    distillation = None
    if teacher:
        if load_tokenizer(teacher.path).get_vocab() != tokenizer.get_vocab():
            raise PruneKitError(f"{teacher.path}: its tokenizer is not the student's; they must read the same tokens")
        layers = (statistics(each)["num_hidden_layers"] for each in (teacher, checkpoint))
        distillation = Distillation(
            load_classifier(teacher, labels, kind=kind),
            arguments.temperature,
            arguments.hard_share,
            arguments.hidden_weight,
            tuple(matching_layers(history(checkpoint.path), *layers)),
        )
    callbacks = []
    if arguments.keep_zeros:
        from prunekit.training.zeros import KeepZeros

        callbacks.append(KeepZeros())
    from transformers import set_seed

    set_seed(training.seed)  # a new head is drawn before the Trainer would do so
    model = load_classifier(checkpoint, labels, arguments.new_head, kind)
    if arguments.lora_rank:
        model = add_lora(model, checkpoint, arguments.lora_rank, arguments.lora_alpha or 2 * arguments.lora_rank)
        model.print_trainable_parameters()
    folder, metrics = train(model, training, tokenizer, *data, distillation=distillation, callbacks=callbacks)
    if arguments.lora_rank:
        folder = merge_lora(model, folder, folder.parent / "merged")
    return folder, metrics


def finish(out: Path, run: Path) -> None:
    """What is left to do when OUT is published."""
    try:
        draw_curves(out, out / CURVES)
    except PruneKitError as error:  # --logging_strategy no
        print(f"warning: no figure: {error}", file=sys.stderr)
    entry = history(out)[-1]
    remove_work(run, out)
    if "f1" in (entry["metrics"] or {}):
        print(scores_table(entry["metrics"]))
    print(f"wrote {out} ({entry['parameters']:,} parameters)")


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder to train")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to write")
    parser.add_argument("--dataset", required=True, help="to train on: .jsonl, or CoNLL text")
    parser.add_argument("--task", choices=TASKS, default="token-classification", help="(default: token-classification)")
    parser.add_argument("--val-dataset", help="to choose the best epoch by, and to report on")
    parser.add_argument("--teacher", help="checkpoint folder of a token classifier with the same labels")
    parser.add_argument(
        "--temperature",
        type=finite_float,
        default=TEMPERATURE,
        help=f"of the distillation (default: {TEMPERATURE:g})",
    )
    parser.add_argument(
        "--hard-share",
        type=finite_float,
        default=HARD_SHARE,
        help=f"of the labels' loss; the rest is the teacher's (default: {HARD_SHARE:g}; 0: the labels don't count)",
    )
    parser.add_argument(
        "--hidden-weight",
        type=finite_float,
        default=0.0,
        help="of the teacher's hidden states (default: 0; try 1)",
    )
    parser.add_argument("--lora-rank", type=positive_int, help="train a LoRA of this rank, and merge it (try 16)")
    parser.add_argument("--lora-alpha", type=positive_float, help="its scale is alpha / rank (default: twice the rank)")
    parser.add_argument("--keep-zeros", action="store_true", help="what is zero in the model (sparsify.py) stays zero")
    parser.add_argument(
        "--new-head", action="store_true", help="a fresh classifier for the data's labels, on any encoder"
    )
    parser.add_argument(
        "--max-length", type=positive_int, help="sub-words of a row's piece (default: 512 or all positions)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    arguments, flags = parser.parse_known_args()

    checkpoint = open_checkpoint(arguments.model)
    family = checkpoint.family
    if family.causal:
        raise PruneKitError(f"{checkpoint.path}: {family.model_type} is no encoder; full_run.sh trains it")
    teacher = open_checkpoint(arguments.teacher) if arguments.teacher else None
    inputs = [each.path for each in (checkpoint, teacher) if each]
    run = arguments.out.parent / f"{arguments.out.name}.run"
    published = is_published(run, arguments.out)  # and killed before the run was removed
    out = check_out(arguments.out, *inputs, overwrite=arguments.overwrite or published)
    limit = positions(checkpoint.config)
    max_length = arguments.max_length or min(512, limit)
    if not 8 <= max_length <= limit:
        raise PruneKitError(f"--max-length {max_length}: choose 8 to {limit}, the model's positions")
    for name, low, high in (("temperature", 0.01, 100), ("hard_share", 0, 1), ("hidden_weight", 0, 1e6)):
        if not low <= (value := getattr(arguments, name)) <= high:
            raise PruneKitError(f"--{name.replace('_', '-')} {value:g}: choose {low:g} to {high:g}")
        if not teacher and value != parser.get_default(name):
            raise PruneKitError(f"--{name.replace('_', '-')} {value:g}: is of what a teacher says; name one: --teacher")
    if arguments.lora_alpha and not arguments.lora_rank:
        raise PruneKitError("--lora-alpha is of a LoRA: give --lora-rank, too")
    if arguments.lora_rank and arguments.keep_zeros:
        raise PruneKitError("--keep-zeros: merging a LoRA fills zeros; leave out --lora-rank")
    kind = TASKS[arguments.task]
    read, named, check = (
        (read_rows, labels_of, check_labels) if kind == TOKEN_CLASSIFIER else (read_labelled, classes_of, check_classes)
    )
    if arguments.val_dataset:
        need_packages("seqeval", extra="encoders")  # which brings scikit-learn
    datasets = [arguments.dataset, *filter(None, [arguments.val_dataset])]
    rows: list[Any] = [read(dataset) for dataset in datasets]
    if arguments.new_head:
        try:
            named(rows[0])  # what only the others have can't be learned
        except PruneKitError as error:
            raise PruneKitError(f"dataset {arguments.dataset}: {error}") from None
        labels = named(row for each in rows for row in each)
    else:
        labels = model_labels(checkpoint.config, kind)
    for each, dataset in zip(rows, datasets):
        check(each, labels, dataset)
    if teacher:
        check_teacher(teacher, checkpoint, labels, arguments.hidden_weight > 0, kind)

    rate = LORA_RATE if arguments.lora_rank else RATE
    training = training_arguments(flags, run, out.name, validate=bool(arguments.val_dataset), rate=rate)
    settings = {
        **{key: value for key, value in vars(arguments).items() if key not in ("out", "overwrite", "model", "teacher")},
        "flags": flags,
        "models": [fingerprint(each) for each in (checkpoint, teacher) if each],
        "data": [each.record for each in rows],
    }
    if "wandb" in training.report_to and not published:
        setup_wandb(out)
    with claim_folder(run, settings, "training run"):
        if published:
            finish(out, run)
            return
        try:
            tokenizer = load_tokenizer(checkpoint.path)
            data = encode_all(rows, tokenizer, labels, max_length)
            folder, metrics = train_model(checkpoint, teacher, data, tokenizer, training, arguments)
        except PruneKitError:
            if not whole_checkpoints(run):
                shutil.rmtree(run)  # a mistake found late: nothing to go on with
            raise
        names = {name: number for number, name in labels.items()}
        begin_publishing(run, out)
        publish(
            folder,
            out,
            checkpoint.path,
            "ner",
            metrics,
            {
                "dataset": settings["data"][:1],
                "val_dataset": settings["data"][1:] or None,
                "teacher_model": [model_record(teacher.path)] if teacher else None,
                **{key: settings[key] for key in ("temperature", "hard_share", "hidden_weight") if teacher},
                "task": arguments.task,
                "label_counts": label_counts(data[0]),
                **({"lora_rank": arguments.lora_rank} if arguments.lora_rank else {}),
                "keep_zeros": arguments.keep_zeros,
                "flags": " ".join(flags),
            },
            extra_files=[run / LOG],
            overwrite=arguments.overwrite,
            new_head={"id2label": labels, "label2id": names} if arguments.new_head else None,
        )
        finish(out, run)


if __name__ == "__main__":
    run_script(main)
