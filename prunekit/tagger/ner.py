"""Token classifiers (named entities): word-level data, training and distillation on transformers' Trainer, seqeval.

    python -m prunekit.ner --model checkpoints/dense checkpoints/student deploy/int8 --dataset data/test.jsonl

Data are JSONL, {"tokens": ["Ana", ...], "ner_tags": ["B-PER", ...]}, or CoNLL text (a word and, in the last column, its
tag on each line, an empty line between sentences). A word's label is learned and predicted at its first sub-word; rows
longer than the model's positions go on in a further piece, so that no word is lost. Precision, recall and F1 are
seqeval's (https://github.com/chakki-works/seqeval): an entity counts if its type and both its ends are right.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, new_file, positive_int
from prunekit.checkpoint import Checkpoint, read_config, write_json
from prunekit.checkpoint.provenance import DataDigest
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, need_packages, run_script
from prunekit.families import positions
from prunekit.rules import short
from prunekit.serving.run import ONNX

TAG = re.compile(r"O|[BI]-\S+")
TOKEN_CLASSIFIER = "ForTokenClassification"
TEMPERATURE, HARD_SHARE = 2.0, 0.5


@dataclass(frozen=True)
class Row:
    """A sentence's words and, one a word, their tags."""

    words: list[str]
    tags: list[str]


# --- data ------------------------------------------------------------------------------------------------------------


class Rows(list[Row]):
    """Sentences, and the record of their data set as `data_record` makes it."""

    def __init__(self, rows: Iterable[Row], record: dict[str, Any]):
        super().__init__(rows)
        self.record = record


def read_rows(dataset: str | Path) -> Rows:
    """Rows of a JSONL file (by its suffix) or of CoNLL text. PruneKitError names file and line of what is bad."""
    path, digest = Path(dataset), DataDigest()
    if not path.is_file():
        raise PruneKitError(f"dataset {path} is not there: give a JSONL or CoNLL file")
    try:
        with path.open("rb") as file:
            lines = (line.decode() for line in digest.reading(file))
            rows = list((_json_rows if path.suffix in (".jsonl", ".json") else _conll_rows)(path, lines))
    except UnicodeDecodeError as error:
        raise PruneKitError(f"dataset {path} is not UTF-8 text ({error.reason}): convert it") from None
    if not rows:
        raise PruneKitError(f"dataset {path} is empty: it needs at least one row")
    return Rows(rows, digest.record(dataset))


def _json_rows(path: Path, lines: Iterable[str]) -> Iterable[Row]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PruneKitError(f"dataset {path} line {number} is not JSON ({error})") from None
        lists: list[Any] = [row.get(key) if isinstance(row, dict) else None for key in ("tokens", "ner_tags")]
        if not all(isinstance(a, list) and a and all(isinstance(b, str) for b in a) for a in lists):
            raise PruneKitError(
                f'dataset {path} line {number}: needs "tokens" and "ner_tags", lists of words and of names like "B-PER"'
            )
        words, tags = lists
        if len(words) != len(tags):
            raise PruneKitError(
                f"dataset {path} line {number}: {len(words)} tokens and {len(tags)} ner_tags; one tag a token"
            )
        yield _row(path, number, words, tags)


def _conll_rows(path: Path, lines: Iterable[str]) -> Iterable[Row]:
    words, tags = [], []
    for number, line in enumerate([*lines, ""], 1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise PruneKitError(f"dataset {path} line {number}: one column; a word and its tag are needed")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield _row(path, number - 1, words, tags)
            words, tags = [], []


def _row(path: Path, number: int, words: list[str], tags: list[str]) -> Row:
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise PruneKitError(f"dataset {path} line {number}: {short(tag)} is no tag; use O, B-TYPE and I-TYPE")
    try:
        " ".join((*words, *tags)).encode()
    except UnicodeEncodeError:  # half a character, which JSON can say and no tokenizer reads
        raise PruneKitError(f"dataset {path} line {number}: has a lone surrogate; mend the row") from None
    return Row(words, tags)


def labels_of(rows: Iterable[Row]) -> dict[int, str]:
    """Names of the labels that these rows need, by number: O, then B and I of each type by its name."""
    types = sorted({tag[2:] for row in rows for tag in row.tags} - {""})
    return dict(enumerate(["O", *(f"{place}-{name}" for name in types for place in "BI")]))


def model_labels(config: dict[str, Any]) -> dict[int, str]:
    """A token classifier's labels by number; PruneKitError if the config is none's."""
    names = config.get("id2label")
    if not str((config.get("architectures") or [""])[0]).endswith(TOKEN_CLASSIFIER):
        raise PruneKitError(
            f"{config.get('architectures')}: no token classifier; train it with ner_run.py --new-head first"
        )
    if not isinstance(names, dict) or names.keys() != {str(number) for number in range(len(names))}:
        raise PruneKitError('config.json: "id2label" does not number the labels from 0; mend it')
    return {number: names[str(number)] for number in range(len(names))}


def check_labels(rows: Iterable[Row], labels: dict[int, str], dataset: str | Path) -> None:
    """PruneKitError if a tag in the rows is none of the model's labels."""
    known = set(labels.values())
    for tag in sorted({tag for row in rows for tag in row.tags}):
        if tag not in known:
            raise PruneKitError(
                f"dataset {dataset}: its tag {tag} is none of the model's labels ({', '.join(sorted(known))}); "
                "rename the tags, or train a new head: ner_run.py --new-head"
            )


def load_tokenizer(folder: Path):
    """The folder's fast tokenizer, which knows the words that sub-words are of."""
    from transformers import AutoTokenizer

    try:  # RoBERTa's kind has to be told that words stand alone; the others take no notice
        tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    except Exception as error:  # of files that aren't as they should be, tokenizers raises that itself
        raise PruneKitError(f"{folder}: its tokenizer can't be loaded ({error})".split("\n")[0]) from None
    if not tokenizer.is_fast:
        raise PruneKitError(f"{folder}: has no tokenizer.json, which says what sub-words belong to what word")
    if tokenizer.pad_token is None:
        raise PruneKitError(f"{folder}: its tokenizer has no padding token; name one in tokenizer_config.json")
    return tokenizer


def encode(
    rows: Iterable[Row], tokenizer, labels: dict[int, str], max_length: int
) -> tuple[list[dict[str, list[int]]], list[list[str]]]:
    """(features, tags): pieces of at most `max_length` sub-words, and each row's tags for `join`.

    A feature has input_ids, attention_mask and labels: the number of a word's tag at its first sub-word, else -100.
    Words of which the tokenizer makes nothing (a lone control character) are left out of both.
    """
    numbers = {name: number for number, name in labels.items()}
    features, truth = [], []
    for row in rows:
        encoded = tokenizer(
            row.words, is_split_into_words=True, truncation=True, max_length=max_length,
            return_overflowing_tokens=True,
        )  # fmt: skip
        seen: list[int] = []
        for piece, ids in enumerate(encoded["input_ids"]):
            targets = []
            for word in encoded.word_ids(piece):
                new = word is not None and (not seen or word > seen[-1])
                targets.append(numbers[row.tags[word]] if new else -100)
                if new:
                    seen.append(word)
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": targets})
        truth.append([row.tags[word] for word in seen])
    return features, truth


def join(predicted: Iterable[int], labels: dict[int, str], truth: list[list[str]]) -> list[list[str]]:
    """Predicted label numbers, a word after the other through all features, as rows of tags like `truth`."""
    names = iter([labels[int(number)] for number in predicted])
    return [[next(names) for _ in row] for row in truth]


def entity_scores(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """precision, recall and f1 over all entities, and by type in `entities` (there with `support`), from 0 to 1."""
    from seqeval.metrics import classification_report

    report = classification_report(truth, predicted, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1"}
    scores = {
        key: {name: float(values[theirs]) for theirs, name in names.items()} | {"support": int(values["support"])}
        for key, values in report.items()
    }
    overall = scores["micro avg"]
    entities = {key: value for key, value in scores.items() if not key.endswith(" avg")}
    return {name: overall[name] for name in names.values()} | {"entities": entities}


def scores_table(scores: dict[str, Any]) -> str:
    """`entity_scores` as text, a line a type."""
    lines = [f"{'':24}{'precision':>10}{'recall':>10}{'F1':>10}{'entities':>10}"]
    for name, row in {**scores["entities"], "all": scores}.items():
        support = row.get("support", sum(each["support"] for each in scores["entities"].values()))
        lines.append(f"{name:24}{row['precision']:>10.4f}{row['recall']:>10.4f}{row['f1']:>10.4f}{support:>10}")
    return "\n".join(lines)


# --- training --------------------------------------------------------------------------------------------------------


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
    all sub-words that aren't padding, CE over those with a label.
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
            functional.log_softmax(out.logits[mask].float() / self.temperature, -1) for out in (student, teacher)
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


def load_classifier(checkpoint: Checkpoint, labels: dict[int, str], new_head: bool = False):
    """The checkpoint as a token classifier in fp32, with a new head for `labels` if so wanted.

    Raises PruneKitError if anything but a new head is missing from its weights.
    """
    import torch
    from transformers import AutoModelForTokenClassification

    check_no_remote_code(checkpoint.path)
    model, info = AutoModelForTokenClassification.from_pretrained(
        checkpoint.path, dtype="float32", id2label=labels, num_labels=len(labels),
        label2id={name: number for number, name in labels.items()},
        ignore_mismatched_sizes=new_head, output_loading_info=True,
    )  # fmt: skip
    inside = tuple(f"{prefix}." for prefix, module in model.named_children() if module is model.base_model)
    missing = {key for key in info["missing_keys"] if not new_head or key.startswith(inside)}
    if missing:
        raise PruneKitError(f"{checkpoint.path}: has no {min(missing)}; copy or download it again")
    if new_head:  # also one that would fit: it is of other labels
        for module in model.children():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)
                torch.nn.init.zeros_(module.bias)
    return model


def setup_wandb(out: Path) -> None:
    """W&B's settings as the launchers have them: project prune-kit, files beside OUT, offline without a key."""
    os.environ.setdefault("WANDB_PROJECT", "prune-kit")
    os.environ.setdefault("WANDB_DIR", str(out.parent))
    host = re.sub(r"^\w+://|[:/].*", "", os.environ.get("WANDB_BASE_URL", "api.wandb.ai"))
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    if not (os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY")) and not (
        netrc.is_file() and host in netrc.read_text(errors="replace")
    ):
        os.environ["WANDB_MODE"] = "offline"
        print(f"W&B: no key found, so runs are kept offline in {os.environ['WANDB_DIR']}/wandb")


def training_arguments(flags: list[str], run: Path, name: str, validate: bool):
    """transformers' TrainingArguments: our defaults, then the user's flags. PruneKitError for flags it doesn't know."""
    from transformers import HfArgumentParser, TrainingArguments

    defaults = {
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
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
    if "--output_dir" in flags:
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
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if unknown:
        raise PruneKitError(f"{unknown[0]}: neither ner_run.py nor transformers' TrainingArguments knows it")
    return arguments


@dataclass(frozen=True)
class Data:
    """Encoded rows: pieces, the rows' tags and the names of the labels, as `encode` makes them."""

    features: list[dict[str, list[int]]]
    truth: list[list[str]]
    labels: dict[int, str]

    def scores(self, predicted: Iterable[int]) -> dict[str, Any]:
        """`entity_scores` of predicted label numbers, a word after the other through all features."""
        return entity_scores(self.truth, join(predicted, self.labels, self.truth))


def train(
    model,
    arguments,
    tokenizer,
    data: Data,
    validation: Data | None = None,
    distillation: Distillation | None = None,
    callbacks: Iterable[Any] = (),
) -> tuple[Path, dict[str, Any]]:
    """Train `model` in place, resuming from the last whole checkpoint in `arguments.output_dir`.

    Returns the checkpoint-N folder to publish, the one of the best F1 if there is `validation`, and its metrics: loss
    and `entity_scores` on the validation rows, or the mean training loss.
    """
    from transformers import DataCollatorForTokenClassification

    from prunekit.training.publish import whole_checkpoints

    run = Path(arguments.output_dir)
    scores: dict[str, Any] = {}

    def compute_metrics(prediction):
        assert validation is not None  # else nobody asks
        scores.update(validation.scores(prediction.predictions[prediction.label_ids != -100]))
        return {key: scores[key] for key in ("f1", "precision", "recall")}

    trainer = _trainer_class()(
        model=model,
        args=arguments,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        train_dataset=data.features,
        eval_dataset=validation and validation.features,
        compute_metrics=validation and compute_metrics,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        callbacks=[_log_callback(run / "logging.jsonl"), *callbacks],
    )
    trainer.distillation = distillation
    if distillation:
        distillation.teacher.to(arguments.device).eval()
    whole = whole_checkpoints(run)
    if whole:
        print(f"resuming from {whole[max(whole)]}")
    result = trainer.train(resume_from_checkpoint=str(whole[max(whole)]) if whole else None)
    best = trainer.state.best_model_checkpoint
    if not validation or not best:
        whole = whole_checkpoints(run)
        return whole[max(whole)], {"train_loss": result.training_loss}
    loss = trainer.evaluate()["eval_loss"]
    return Path(best), {"loss": loss, **scores}


def check_teacher(teacher: Checkpoint, student: Checkpoint, labels: dict[int, str], hidden: bool) -> None:
    """PruneKitError if a student of these labels can't learn from this teacher."""
    if (theirs := model_labels(teacher.config)) != labels:
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


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """`entity_scores` of a served folder (checkpoint, torchao's INT8 or ONNX) on rows whose labels it has."""
    from prunekit.serving.run import load_served, predict_labels

    config = read_config(folder)
    labels, tokenizer = model_labels(config), load_tokenizer(folder)
    data = Data(*encode(rows, tokenizer, labels, min(512, positions(config))), labels)
    return data.scores(predict_labels(load_served(folder), data.features, tokenizer.pad_token_id or 0))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=Path, help=".jsonl, or CoNLL text")
    parser.add_argument("--limit", type=positive_int, help="rows to use (default: all)")
    parser.add_argument("--json", type=new_file, help="also write the scores here")
    parser.add_argument("--figure", type=new_file, metavar="PNG", help="also draw the table of F1 here")
    args = parser.parse_args()

    need_packages("seqeval", extra="encoders")
    rows = read_rows(args.dataset)[: args.limit]
    for folder in args.model:
        check_no_remote_code(folder)
        check_labels(rows, model_labels(read_config(folder)), args.dataset)
        if not (folder / ONNX).is_file() and not any(folder.glob("*.safetensors")):
            raise PruneKitError(f"{folder}: neither *.safetensors nor {ONNX} here; give a checkpoint folder")
    results = []
    for folder in args.model:
        results.append({"model": str(folder), **evaluate(folder, rows)})
        print(f"{folder}  ({len(rows)} rows of {args.dataset})\n{scores_table(results[-1])}", flush=True)
        if args.json:
            write_json(args.json, results)
    if args.figure:
        from prunekit.report import draw_f1

        draw_f1([(Path(result["model"]).name, result) for result in results], args.figure)


if __name__ == "__main__":
    run_script(main)
