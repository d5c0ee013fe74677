"""Measure checkpoints on a data set: token_acc and loss as ms-swift counts them, and what is really generated.

    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --dataset data/test.jsonl

token_acc looks good on a model whose generation has collapsed, so both are measured: teacher-forced over every row,
and greedy generation compared with the answer (exact match, character error rate). `--by skill` says it of each group
of rows, too: a mean can hide that a cut has killed one of them.
"""

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, device, finite_float, new_file, positive_int
from prunekit.checkpoint import open_checkpoint, statistics, write_json
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.data.answers import (
    check_columns,
    encode_rows,
    generate,
    load_engine,
    score_answers,
    teacher_forced_by_group,
)
from prunekit.data.groups import groups_of, indices_by_group
from prunekit.data.rows import Rows, read_datasets
from prunekit.data.templates import find_template, load_template
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import check_causal
from prunekit.msswift.extend import load_plugins
from prunekit.msswift.names import check_names, check_rewards


def _reward(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    return name, finite_float(weight) if equals else 1.0


def measure_model(
    model: Path,
    template: str | None,
    datasets: dict[str, Rows],
    rewards: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Scores by data set. What this model can't take leaves `datasets`: the next ones are compared on the same rows.

    With `args.by` the `groups` of a data set have the same scores of their rows, and how many `samples` those are.
    """
    engine = load_engine(model, args.device, args.dtype, args.model_type, template)
    found: dict[str, dict[str, Any]] = {}
    for name, rows in list(datasets.items()):
        encoded = encode_rows(engine, rows)
        rows = Rows(rows.name, (row for row, item in zip(rows, encoded, strict=True) if item))
        if not rows:
            raise PruneKitError(f"{name}: all rows are longer than {model} takes; give shorter ones")
        if too_long := len(encoded) - len(rows):
            print(f"{name}: {too_long} rows are longer than {model} takes, and left out", file=sys.stderr)
            datasets[name] = rows
        groups = indices_by_group(rows, args.by)
        scores, of_groups = teacher_forced_by_group(engine, list(filter(None, encoded)), groups, args.batch_size)
        if not args.no_generate:
            answers, cut = generate(engine, rows, args.batch_size, args.max_new_tokens)
            scores |= score_answers(answers, rows, rewards) | {"n_cut": cut, "cut_share": cut / len(rows)}
            for group, places in groups.items():
                of_groups[group] |= score_answers([answers[i] for i in places], [rows[i] for i in places], rewards)
            if cut:
                print(
                    f"warning: {name}: {cut} of {len(rows)} answers of {model} were cut at {args.max_new_tokens} "
                    "tokens: if right ones are as long, raise --max-new-tokens",
                    file=sys.stderr,
                )
        print(f"{model}  {name} ({len(rows)} rows)  {_said(scores)}", flush=True)
        found[name] = scores
        if args.by:
            found[name] = scores | {"groups": {g: of_groups[g] | {"samples": len(groups[g])} for g in sorted(groups)}}
            for group in sorted(groups):
                print(f"    {group} ({len(groups[group])} rows)  {_said(of_groups[group])}", flush=True)
    return found


def _said(scores: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:{'d' if isinstance(value, int) else '.4f'}}" for key, value in scores.items())


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        help="messages, one file or more: JSONL, or FILE#20 for 20 rows",
    )
    parser.add_argument("--limit", type=positive_int, help="rows of each data set to use (default: all)")
    parser.add_argument("--by", metavar="COLUMN", help="a column of the rows (skill, source): score its groups, too")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced only")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="of a generated answer (default: 64)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="rows (default: 64)")
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--plugins", nargs="*", type=Path, default=[])
    parser.add_argument(
        "--rewards",
        nargs="*",
        type=_reward,
        default=[],
        metavar="NAME[=WEIGHT]",
        help="also the mean of these rewards",
    )
    parser.add_argument("--json", type=new_file, help="also write the results here")
    args = parser.parse_args()
    rewards = dict(args.rewards)
    if rewards and args.no_generate:
        parser.error("--rewards are for what is generated: leave out --no-generate")

    checkpoints = [open_checkpoint(model) for model in args.model]
    for checkpoint in checkpoints:
        check_causal(checkpoint)
        check_no_remote_code(checkpoint.path)
    datasets = read_datasets(args.dataset, args.limit)
    for rows in datasets.values() if args.by else ():
        groups_of(rows, args.by)
    check_rewards(rewards, args.plugins)
    check_names(args.model_type, args.template, args.plugins)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    load_plugins(args.plugins)
    for rows in datasets.values():
        check_columns(rewards, rows)
    templates = [args.template or find_template(checkpoint, args.model_type) for checkpoint in checkpoints]
    for checkpoint, template in zip(checkpoints, templates):
        load_template(checkpoint, None, args.model_type, template)
    results = []
    for model, checkpoint, template in zip(args.model, checkpoints, templates):
        found = measure_model(model, template, datasets, rewards, args)
        gc.collect()  # an engine is a circle: it would stay beside the next one
        results.append({"model": str(model), "parameters": statistics(checkpoint)["parameters"], "datasets": found})
        if args.json:
            write_json(args.json, results)


if __name__ == "__main__":
    run_script(main)
