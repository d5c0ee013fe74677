"""Scores of token classifiers (named entities) on held-out rows, however they are served.

    python -m prunekit.ner --model checkpoints/dense checkpoints/student deploy/int8 --dataset data/test.jsonl

Data are JSONL, {"tokens": ["Ana", ...], "ner_tags": ["B-PER", ...]}, or CoNLL text (a word and, in the last column, its
tag on each line, an empty line between sentences). A word's label is learned and predicted at its first sub-word; rows
longer than the model's positions go on in a further piece, so that no word is lost. Precision, recall and F1 are
seqeval's (https://github.com/chakki-works/seqeval): an entity counts if its type and both its ends are right.
"""

from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, new_file, positive_int
from prunekit.checkpoint import read_config, write_json
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, need_packages, run_script
from prunekit.families import positions
from prunekit.serving.run import ONNX, load_served, predict_labels
from prunekit.tagger.rows import Row, check_labels, encode, load_tokenizer, model_labels, read_rows
from prunekit.tagger.scores import Data, scores_table


def evaluate(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """`entity_scores` of a served folder (checkpoint, torchao's INT8 or ONNX) on rows whose labels it has."""
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
