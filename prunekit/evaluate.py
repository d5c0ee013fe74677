"""Measure checkpoints on a data set: token_acc and loss as ms-swift counts them, and what is really generated.

    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --dataset data/test.jsonl
    python -m prunekit.evaluate --model checkpoints/recovered --dataset data/test.jsonl --require 'exact_match>=0.97'
    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --tasks arc_easy hellaswag
    python -m prunekit.evaluate --model checkpoints/base checkpoints/recovered --benchmarks ocr_bench mmmu --limit 200

token_acc looks good on a model whose generation has collapsed, so both are measured: teacher-forced over every row,
and greedy generation compared with the answer (exact match, character error rate). `--by skill` says it of each group
of rows, too: a mean can hide that a cut has killed one of them. Of plain texts, rows {"text": ...}, it says perplexity.
`--tasks` are lm-eval's, for text, `--benchmarks` EvalScope's, for pictures, too (pip install -e '.[eval]'; most fetch
their rows): they land in the same table. `--require` is a gate: exit code 3 if the last model falls short on any data
set; 'groups.reading.exact_match>=0.9' is of a group.
"""

import argparse
import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, check_beside, device, finite_float, new_file, positive_int
from prunekit.checkpoint import Checkpoint, finite, open_checkpoint, statistics, write_json
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.data.answers import MAX_LENGTH, Judged, check_columns, judge, load_engine
from prunekit.data.groups import groups_of
from prunekit.data.rows import Rows, is_text, read_datasets
from prunekit.data.tasks import Tasks, check_tasks, json_object, run_tasks
from prunekit.data.templates import find_template, load_template
from prunekit.data.tokens import same_tokenizer, tokens_of
from prunekit.errors import PruneKitError, run_script
from prunekit.gates import add_gates, check_bounds, gate
from prunekit.model.load import check_causal, check_unpackable
from prunekit.msswift.extend import load_plugins
from prunekit.msswift.names import check_names, check_rewards

BESIDE = {  # flags that are of no use without another
    "dataset": ("by", "no_generate", "max_length", "rewards"),
    "tasks": ("apply_chat_template", "metadata"),
    "benchmarks": ("dataset_args",),
}


def _reward(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    return name, finite_float(weight) if equals else 1.0


def judge_model(
    model: Path, template: str | None, datasets: dict[str, Rows], rewards: dict[str, float], args: argparse.Namespace
) -> dict[str, Judged]:
    """What it makes of each data set. Rows that it can't take leave `datasets`: the next are judged on the same."""
    engine = load_engine(model, args.device, args.dtype, args.model_type, template)
    return judge_by(engine, model, datasets, rewards, args)


def judge_by(
    engine: Any, model: Path, datasets: dict[str, Rows], rewards: dict[str, float], args: argparse.Namespace
) -> dict[str, Judged]:
    """`judge_model`, of one that is loaded."""
    found: dict[str, Judged] = {}
    for name, rows in list(datasets.items()):
        tokens = None if args.no_generate else args.max_new_tokens
        found[name] = judged = judge(engine, rows, rewards, args.batch_size, tokens, args.max_length)
        long = "shorter than two tokens" if is_text(rows[0]) else f"longer than {model} takes"
        if not judged.rows:
            raise PruneKitError(f"{name}: all rows are {long}; give others")
        if left_out := len(rows) - len(judged.rows):
            print(f"{name}: {left_out} rows are {long}, and left out", file=sys.stderr)
            datasets[name] = judged.rows
        if cut := sum(judged.cut):
            print(
                f"warning: {name}: {cut} of {len(judged.rows)} answers of {model} were cut at "
                f"{args.max_new_tokens} tokens: if right ones are as long, raise --max-new-tokens",
                file=sys.stderr,
            )
    return found


def measure_model(
    checkpoint: Checkpoint,
    model: Path,
    template: str | None,
    datasets: dict[str, Rows],
    tasks: Tasks,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Scores by data set and task, said as they are found. Rows leave `datasets` as in `judge_model`."""
    found = {}
    engine = load_engine(model, args.device, args.dtype, args.model_type, template)
    for name, judged in judge_by(engine, model, datasets, dict(args.rewards), args).items():
        found[name] = scores = judged.scores(args.by)
        print(f"{model}  {name} ({len(judged.rows)} rows)  {_said(scores)}", flush=True)
        for group, of_group in scores.get("groups", {}).items():
            print(f"    {group} ({of_group['samples']} rows)  {_said(of_group)}", flush=True)
    for name, scores in run_tasks(engine, checkpoint.path, checkpoint.config, tasks).items():
        found[name] = scores
        print(f"{model}  {name} ({scores.get('samples', '?')} rows)  {_said(scores)}", flush=True)
    return found


def _said(scores: dict[str, Any]) -> str:
    shown = {key: value for key, value in scores.items() if key not in ("groups", "samples", "tokens")}
    return "  ".join(f"{key} {value:{'d' if isinstance(value, int) else '.4f'}}" for key, value in shown.items())


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """How models are judged: what this command and others take of a user."""
    parser.add_argument("--limit", type=positive_int, help="rows of each data set to use (default: all)")
    parser.add_argument("--by", metavar="COLUMN", help="a column of the rows (skill, source): score its groups, too")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced only")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="of a generated answer (default: 64)")
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=MAX_LENGTH,
        help=f"tokens of a window of a text, at most the model's positions (default: {MAX_LENGTH})",
    )
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


def warn_of_other_tokens(checkpoints: list[Checkpoint]) -> None:
    """Say of which models figures that are of a token can't be compared with the first one's."""
    first, *others = checkpoints
    for other in others:
        if same_tokenizer(first.path, other.path):
            continue
        with contextlib.suppress(PruneKitError):  # who loads it says what is wrong with it
            known, own = tokens_of(first.path), tokens_of(other.path)
            if known and own and known != own:
                print(
                    f"warning: {other.path} has other tokens than {first.path}: token_acc, loss and perplexity, which "
                    "are of a token, can't be compared; exact_match, cer and rewards can",
                    file=sys.stderr,
                )


def prepare(
    checkpoints: list[Checkpoint], args: argparse.Namespace, tasks: Tasks | None = None
) -> tuple[dict[str, Rows], list[str | None]]:
    """Data sets by name, and each checkpoint's template; plugins are loaded. PruneKitError for all that can't be."""
    rewards = dict(args.rewards)
    if rewards and args.no_generate:
        raise PruneKitError("--rewards are for what is generated: leave out --no-generate (see --help)")
    for checkpoint in checkpoints:
        check_causal(checkpoint)
        check_unpackable(checkpoint)
        check_no_remote_code(checkpoint.path)
    datasets = read_datasets(args.dataset, args.limit)
    if not datasets and not tasks:
        return {}, []
    names = [*datasets, *(tasks or Tasks()).lm_eval, *(tasks or Tasks()).evalscope]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PruneKitError(f"{twice[0]}: two of this name are asked for, and scores have one place by it: ask for one")
    if len({is_text(rows[0]) for rows in datasets.values()}) > 1:
        raise PruneKitError('--dataset: some have rows {"text": ...}, some messages: evaluate one kind at a time')
    texts = {is_text(rows[0]) for rows in datasets.values()} == {True}
    if datasets:
        warn_of_other_tokens(checkpoints)
    if texts and rewards:
        raise PruneKitError('--rewards are for what is generated, and rows {"text": ...} ask nothing: leave them out')
    args.no_generate = args.no_generate or texts
    for rows in datasets.values() if args.by else ():
        groups_of(rows, args.by)
    check_rewards(rewards, args.plugins)
    check_names(args.model_type, args.template, args.plugins)
    if tasks:
        check_tasks(tasks)  # they may fetch their rows
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own, which says much at every load
    load_plugins(args.plugins)
    for rows in datasets.values() if rewards else ():
        check_columns(rewards, rows)
    templates = [args.template or find_template(each, args.model_type, chat=not texts) for each in checkpoints]
    for checkpoint, template in zip(checkpoints, templates):
        load_template(checkpoint, None, args.model_type, template)
    return datasets, templates


def metric_names(args: argparse.Namespace, datasets: dict[str, Rows]) -> set[str]:
    """What the scores of a model on what `prepare` has read will have."""
    names = {"token_acc", "loss"} | ({"groups"} if args.by else set())
    names |= {"perplexity"} if any(is_text(rows[0]) for rows in datasets.values()) else set()
    generated = {"exact_match", "cer", "n_cut", "cut_share"} | ({"reward"} if args.rewards else set())
    return names if args.no_generate else names | generated


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path)
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        help='messages or {"text": ...}, one file or more: JSONL, or FILE#20 for 20 rows',
    )
    add_arguments(parser)
    parser.add_argument("--json", type=new_file, help="also write the results here (null: NaN or infinite)")
    add_gates(parser)
    field = parser.add_argument_group("tasks of the field")
    field.add_argument("--tasks", nargs="+", default=[], help="of lm-eval, for text (lm-eval ls tasks)")
    field.add_argument("--benchmarks", nargs="+", default=[], help="of EvalScope (evalscope benchmark-info --list)")
    field.add_argument("--apply-chat-template", action="store_true", help="to lm-eval's prompts")
    field.add_argument("--metadata", type=json_object, default={}, metavar="JSON", help="lm-eval's of this name")
    field.add_argument("--dataset-args", type=json_object, default={}, metavar="JSON", help="EvalScope's of this name")
    args = parser.parse_args()
    tasks = Tasks(
        tuple(args.tasks), tuple(args.benchmarks), args.limit, args.batch_size, args.max_new_tokens,
        args.apply_chat_template, args.metadata, args.dataset_args,
    )  # fmt: skip
    if not args.dataset and not tasks:
        parser.error("--dataset, --tasks or --benchmarks: name something to measure on")
    for needed, names in BESIDE.items():
        check_beside(parser, args, needed, names)
    checkpoints = [open_checkpoint(model, quantised=True) for model in args.model]
    datasets, templates = prepare(checkpoints, args, tasks)
    if datasets and not tasks:  # what a task measures is known when it has
        check_bounds(args.require, metric_names(args, datasets))
    results = []
    for model, checkpoint, template in zip(args.model, checkpoints, templates):
        found = measure_model(checkpoint, model, template, datasets, tasks, args)
        gc.collect()  # an engine is a circle: it would stay beside the next one
        results.append({"model": str(model), "parameters": statistics(checkpoint)["parameters"], "datasets": found})
        if args.json:
            write_json(args.json, finite(results))
    return gate(args.require, {f"{args.model[-1]} {name}": scores for name, scores in found.items()})


if __name__ == "__main__":
    run_script(main)
