"""Token classifiers (named entities), however they are served: scored on held-out rows, tagging texts, and watched.

    python -m prunekit.ner evaluate --model checkpoints/dense serve/int8 --dataset data/test.jsonl --min-f1 0.84
    python -m prunekit.ner tag --model serve/int8 "Ana lives in Nice"
    python -m prunekit.ner tag --model serve/int8 --file texts.txt --log tagged.log > tagged.jsonl
    python -m prunekit.ner watch tagged.log --max-psi 0.2

What each takes: python -m prunekit.ner tag --help. Without a word in front, --model ... is evaluated.
"""

import sys
import time
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, device, new_file, positive_float, positive_int
from prunekit.checkpoint import read_config, write_json
from prunekit.errors import PruneKitError, need_packages, run_script
from prunekit.families import positions
from prunekit.gates import Bound, add_gates, check_bounds, gate
from prunekit.serving import watch
from prunekit.serving.run import in_batches, load_served, predict_labels
from prunekit.serving.tag import Tagger, Text, check_tagger, check_text, log_line, read_texts
from prunekit.tagger.rows import Row, check_labels, encode, load_tokenizer, model_labels, read_rows
from prunekit.tagger.scores import METRICS, Data, scores_table

EVALUATE = """Scores of token classifiers on held-out rows, side by side.

    python -m prunekit.ner evaluate --model checkpoints/dense checkpoints/student serve/int8 --dataset data/test.jsonl

Data are JSONL, {"tokens": ["Ana", ...], "ner_tags": ["B-PER", ...]}, or CoNLL text (a word and, in the last column, its
tag on each line, an empty line between sentences). A word's label is learned and predicted at its first sub-word; rows
longer than the model's positions go on in a further piece, so that no word is lost. Precision, recall and F1 are
seqeval's (https://github.com/chakki-works/seqeval): an entity counts if its type and both its ends are right.
"""
TAG = """The entities of texts, as a line of JSON each: label, text, start and end (characters), score (0 to 1).

    python -m prunekit.ner tag --model serve/int8 "Ana lives in Nice" "And Bo in Rome"
    python -m prunekit.ner tag --model serve/int8 --file texts.txt --log tagged.log > tagged.jsonl

A file has a text a line, or is JSONL with rows {"text": "Ana ..."} or {"tokens": ["Ana", ...]}.
"""
WATCH = """What a log of tagged texts says: how sure the model is, how fast, how far its labels are from training's.

    python -m prunekit.ner watch tagged.log --last 10000 --max-psi 0.2 --require 'latency.p95<=0.1'

Of the latest model in the log. Shares are compared with those of its training rows, which ner_run.py notes in the
model's folder, or with --reference: the population stability index (PSI), by type (B-PER and I-PER are PER).
"""
WINDOW = 16  # batches of texts that are sorted by length


def evaluate(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """`entity_scores` of a served folder (checkpoint, torchao's INT8 or ONNX) on rows whose labels it has."""
    config = read_config(folder)
    labels, tokenizer = model_labels(config), load_tokenizer(folder)
    data = Data(*encode(rows, tokenizer, labels, min(512, positions(config))), labels)
    return data.scores(predict_labels(load_served(folder), data.features, tokenizer.pad_token_id or 0))


def evaluate_command(words: list[str]) -> int:
    parser = Parser(description=EVALUATE, prog="python -m prunekit.ner evaluate")
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=Path, help=".jsonl, or CoNLL text")
    parser.add_argument("--limit", type=positive_int, help="rows to use (default: all)")
    parser.add_argument("--json", type=new_file, help="also write the scores here")
    parser.add_argument("--figure", type=new_file, metavar="PNG", help="also draw the table of F1 here")
    add_gates(parser, min_f1=True)
    args = parser.parse_args(words)

    need_packages("seqeval", extra="encoders")
    rows = read_rows(args.dataset)[: args.limit]
    for folder in args.model:
        check_labels(rows, check_tagger(folder), args.dataset)
    check_bounds(args.require, METRICS)
    results = []
    for folder in args.model:
        results.append({"model": str(folder), **evaluate(folder, rows)})
        print(f"{folder}  ({len(rows)} rows of {args.dataset})\n{scores_table(results[-1])}", flush=True)
        if args.json:
            write_json(args.json, results)
    if args.figure:
        from prunekit.report import draw_f1

        draw_f1([(Path(result["model"]).name, result) for result in results], args.figure)
    return gate(args.require, {str(args.model[-1]): results[-1]})


def tag_command(words: list[str]) -> None:
    parser = Parser(description=TAG, prog="python -m prunekit.ner tag")
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, or a folder of deploy.py's")
    parser.add_argument("--file", type=Path, help="texts, a line each, or .jsonl")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="texts (default: 32)")
    parser.add_argument("--log", type=new_file, help="append a line for each text, for prunekit.ner watch")
    parser.add_argument("--threads", type=positive_int, help="(default: all cores)")
    parser.add_argument("--device", type=device, default="cpu", help="of what torch runs (default: cpu)")
    args = parser.parse_args(words)
    if bool(args.texts) == bool(args.file):
        parser.error("give texts, or --file")
    for text in args.texts:
        check_text(text, ascii(text[:80]))
    texts = read_texts(args.file) if args.file else [Text.of(text) for text in args.texts]
    tagger = Tagger(args.model, args.threads, args.device)

    from tqdm import tqdm

    with tqdm(total=len(texts), desc="tag", leave=False, disable=None) as bar:
        for start in range(0, len(texts), WINDOW * args.batch_size):
            window = texts[start : start + WINDOW * args.batch_size]
            rows, lines = [""] * len(window), [""] * len(window)
            for batch in in_batches([text.words for text in window], args.batch_size):
                began = time.perf_counter()
                found = tagger.tag([window[number] for number in batch], args.batch_size)
                seconds = time.perf_counter() - began
                for number, tagged in zip(batch, found):
                    rows[number] = tagged.line()
                    lines[number] = log_line(args.model, tagged, seconds, len(batch))
                bar.update(len(batch))
            sys.stdout.write("".join(rows))
            if args.log:
                with args.log.open("a", encoding="utf-8") as log:
                    log.write("".join(lines))


def watch_command(words: list[str]) -> int:
    parser = Parser(description=WATCH, prog="python -m prunekit.ner watch")
    parser.add_argument("log", type=Path, help="of prunekit.ner tag --log, or of the service in examples/")
    parser.add_argument("--reference", type=Path, help="labelled rows, or a model's folder (default: the log's model)")
    parser.add_argument("--last", type=positive_int, metavar="N", help="only the last texts (default: all)")
    parser.add_argument("--json", type=new_file, help="also write the numbers here")
    add_gates(parser, of="of the log")
    parser.add_argument(
        "--max-psi", type=lambda text: Bound("psi", "<=", positive_float(text)), action="append", dest="require",
        metavar="X", help="the same as --require 'psi<=X'; 0.25 is usual",
    )  # fmt: skip
    args = parser.parse_args(words)
    check_bounds(args.require, watch.METRICS)
    records = watch.read_log(args.log, args.last)
    asked = args.reference or any(bound.name.startswith("psi") for bound in args.require)
    reference = None
    try:
        reference = watch.reference_of(args.reference or Path(records[-1]["model"]))
    except PruneKitError as error:
        if asked:
            raise
        print(f"no reference: {error}", file=sys.stderr)
    found = watch.summary(records, reference)
    print(watch.table(found))
    if args.json:
        write_json(args.json, found)
    return gate(args.require, {str(args.log): found})


COMMANDS = {"evaluate": evaluate_command, "tag": tag_command, "watch": watch_command}


def main() -> int | None:
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return None
    return evaluate_command(words)


if __name__ == "__main__":
    run_script(main)
