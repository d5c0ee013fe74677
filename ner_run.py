"""Train a token classifier (NER), on labels alone or with a teacher, and keep what was pruned.

    python manual_select.py --model checkpoints/dense --out checkpoints/student --text 10
    python ner_run.py --model checkpoints/student --teacher checkpoints/dense --out checkpoints/distilled \\
        --dataset data/train.jsonl --val-dataset data/val.jsonl --num_train_epochs 3
    python -m prunekit.ner --model checkpoints/dense checkpoints/distilled --dataset data/test.jsonl

Data: JSONL with "tokens" and "ner_tags", or CoNLL text. Any flag of transformers' TrainingArguments may follow
(--learning_rate 3e-5, --per_device_train_batch_size 32, --bf16 true, ...). With --val-dataset the epoch of the best F1
is kept, and per-type scores are printed. The same command continues an interrupted run from its last whole checkpoint
in OUT.run. One process, on one GPU if there is one.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, finite_float, positive_int
from prunekit.checkpoint import Checkpoint, check_out, history, open_checkpoint, statistics
from prunekit.checkpoint.provenance import model_record
from prunekit.checkpoint.records import CURVES, LOG
from prunekit.checkpoint.training_run import whole_checkpoints
from prunekit.checkpoint.work_folder import claim_folder, fingerprint
from prunekit.errors import PruneKitError, need_packages, run_script
from prunekit.families import positions
from prunekit.report import draw_curves
from prunekit.tagger.rows import Row, check_labels, encode, labels_of, load_tokenizer, model_labels, read_rows
from prunekit.tagger.scores import Data, scores_table
from prunekit.tagger.train import (
    HARD_SHARE,
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


def train_model(
    checkpoint: Checkpoint,
    teacher: Checkpoint | None,
    rows: list[list[Row]],
    labels: dict[int, str],
    max_length: int,
    training: Any,
    arguments: argparse.Namespace,
) -> tuple[Path, dict[str, Any]]:
    """Load, encode and train: the checkpoint to publish and its metrics. `rows`: to train on, and to validate by."""
    tokenizer = load_tokenizer(checkpoint.path)
    data = [Data(*encode(each, tokenizer, labels, max_length), labels) for each in rows]
    distillation = None
    if teacher:
        if load_tokenizer(teacher.path).get_vocab() != tokenizer.get_vocab():
            raise PruneKitError(f"{teacher.path}: its tokenizer is not the student's; they must read the same tokens")
        layers = (statistics(each)["num_hidden_layers"] for each in (teacher, checkpoint))
        distillation = Distillation(
            load_classifier(teacher, labels),
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
    model = load_classifier(checkpoint, labels, arguments.new_head)
    return train(model, training, tokenizer, *data, distillation=distillation, callbacks=callbacks)


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder to train")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to write")
    parser.add_argument("--dataset", required=True, help="to train on: .jsonl, or CoNLL text")
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
    out = check_out(arguments.out, *inputs, overwrite=arguments.overwrite)
    limit = positions(checkpoint.config)
    max_length = arguments.max_length or min(512, limit)
    if not 8 <= max_length <= limit:
        raise PruneKitError(f"--max-length {max_length}: choose 8 to {limit}, the model's positions")
    for name, low, high in (("temperature", 0.01, 100), ("hard_share", 0, 1), ("hidden_weight", 0, 1e6)):
        if not low <= (value := getattr(arguments, name)) <= high:
            raise PruneKitError(f"--{name.replace('_', '-')} {value:g}: choose {low:g} to {high:g}")
    if arguments.val_dataset:
        need_packages("seqeval", extra="encoders")
    datasets = [arguments.dataset, *filter(None, [arguments.val_dataset])]
    rows = [read_rows(dataset) for dataset in datasets]
    labels = labels_of(row for each in rows for row in each) if arguments.new_head else model_labels(checkpoint.config)
    for each, dataset in zip(rows, datasets):
        check_labels(each, labels, dataset)
    if teacher:
        check_teacher(teacher, checkpoint, labels, arguments.hidden_weight > 0)

    run = out.with_name(f"{out.name}.run")
    training = training_arguments(flags, run, out.name, validate=bool(arguments.val_dataset))
    settings = {
        **{key: value for key, value in vars(arguments).items() if key not in ("out", "overwrite", "model", "teacher")},
        "flags": flags,
        "models": [fingerprint(each) for each in (checkpoint, teacher) if each],
        "data": [each.record for each in rows],
    }
    if "wandb" in training.report_to:
        setup_wandb(out)
    with claim_folder(run, settings, "training run"):
        try:
            folder, metrics = train_model(checkpoint, teacher, rows, labels, max_length, training, arguments)
        except PruneKitError:
            if not whole_checkpoints(run):
                shutil.rmtree(run)  # a mistake found late: nothing to go on with
            raise
        names = {name: number for number, name in labels.items()}
        entry = publish(
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
                "keep_zeros": arguments.keep_zeros,
                "flags": " ".join(flags),
            },
            extra_files=[run / LOG],
            overwrite=arguments.overwrite,
            new_head={"id2label": labels, "label2id": names} if arguments.new_head else None,
        )
        shutil.rmtree(run)
    draw_curves(out, out / CURVES)
    if "f1" in metrics:
        print(scores_table(metrics))
    print(f"wrote {out} ({entry['parameters']:,} parameters)")


if __name__ == "__main__":
    run_script(main)
