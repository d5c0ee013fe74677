"""Try rewards before a run: on the truth, on mistakes, on hostile completions, and on what a model really says.

    python -m prunekit.tryout --rewards ocr_cer ocr_perfect --plugins plugins/ocr_rewards.py --data data/rl.jsonl
    python -m prunekit.tryout --rewards accuracy format --answer '<think>…</think><answer>{}</answer>' \\
        --data data/rl.jsonl --model checkpoints/merged --figure tryout.png

A reward is at fault that fails, is always the same, isn't a function of its own row (a batch scored against its
first row, chance, the order), or goes up with mistakes; the sum is, where something hostile earns what the truth does.
With --model: spread and correlations on its answers, and how many rows teach nothing since all answers to them are
worth the same. Exit code 3 if there is a fault. rl_run.sh begins with this (TRYOUT=0 leaves it out).
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.arguments import Parser, device, finite_float, new_file, positive_int, split_arguments
from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.data.rewards import columns_for, failure, shown
from prunekit.data.rows import Rows, check_messages, question_of, text_of
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import check_causal
from prunekit.msswift.extend import load_plugins
from prunekit.msswift.line import parse
from prunekit.msswift.names import check_names, check_rewards
from prunekit.training.reward_tryout import Tryout, completions_of, try_rewards


def truth_of(row: dict[str, Any], column: str, answer: str) -> str | None:
    """What a model should say: the assistant's message, or, of `column`, text or a number written into `answer`."""
    last = row["messages"][-1]
    if last["role"] == "assistant" and isinstance(last["content"], str):
        return last["content"]
    value = row.get(column)
    return answer.replace("{}", str(value)) if type(value) in (str, int, float) else None


def read_rows(name: str, limit: int, column: str, answer: str) -> tuple[Rows, list[str]]:
    """The first rows that have a truth, and their truths."""
    rows, truths = Rows(name), []
    for row in Rows(name).read(check_messages, 4 * limit):
        if (truth := truth_of(row, column, answer)) is not None and len(rows) < limit:
            rows.append(row)
            truths.append(truth)
    if not rows:
        raise PruneKitError(
            f"dataset {name}: no row has a truth to try rewards on: no assistant's message, nor text or a number in "
            f"column {column!r}; name one by --truth"
        )
    return rows, truths


def answers_of(args: argparse.Namespace, rows: Rows) -> list[str]:
    """What the model says, `args.generations` answers to each row, at temperature 1."""
    import torch

    from prunekit.data.answers import encode_rows, generate, load_engine

    torch.manual_seed(args.seed)
    engine = load_engine(args.model, args.device, None, args.model_type, args.template)
    answer = {"role": "assistant", "content": ""}
    asked = Rows(rows.name, ({**row, "messages": [*question_of(row["messages"]), answer]} for row in rows))
    for number, encoded in enumerate(encode_rows(engine, asked), 1):
        if not encoded:
            raise PruneKitError(f"dataset {rows.name}: row {number} is longer than {args.model} takes; leave it out")
    repeated = [row for row in asked for _ in range(args.generations)]
    answers, _ = generate(engine, repeated, args.batch_size, args.max_new_tokens, temperature=1.0)
    return answers


def table(found: Tryout) -> str:
    """Mean of each reward (columns) and of their sum, over the rows, for each kind of completion."""
    names = list(found.weights)
    widths = [max(9, len(name) + 2) for name in names]
    lines = [f"{'mean reward':14}" + "".join(f"{n:>{w}}" for n, w in zip(names, widths)) + f"{'total':>9}"]
    for kind in found.kinds:
        line = f"{kind:14}"
        for name, width in zip(names, widths):
            mean = found.mean(name, kind)
            line += f"{'none':>{width}}" if math.isnan(mean) else f"{mean:>{width}.3f}"
        lines.append(line + f"{found.totals(kind).mean():>9.3f}")
    return "\n".join(lines)


def samples_said(found: Tryout, rows: int) -> str:
    """The best and the worst that the model says, and the spread of each reward."""
    said, totals = found.kinds["model"], found.totals("model")
    best, worst = int(totals.argmax()), int(totals.argmin())
    generations = len(said) // rows
    lines = [
        f"best   {totals[best]:6.3f}  {shown(said[best])} to row {best // generations + 1}",
        f"worst  {totals[worst]:6.3f}  {shown(said[worst])} to row {worst // generations + 1}",
    ]
    for name in found.weights:
        numbers = [value for value in found.values[name]["model"] if value is not None]
        low, middle, high = np.quantile(numbers or [float("nan")], (0.1, 0.5, 0.9))
        lines.append(f"{name}: 10% {low:.3f}, median {middle:.3f}, 90% {high:.3f}, none for {len(said) - len(numbers)}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", metavar="FILE", help="rows as rl_run.sh's DATASET: JSONL of messages")
    parser.add_argument("--rewards", nargs="+", metavar="NAME")
    parser.add_argument(
        "--weights", nargs="+", type=finite_float, help="of the rewards in their order (default: all 1)"
    )
    parser.add_argument("--plugins", nargs="*", type=Path, default=[])
    parser.add_argument(
        "--truth",
        metavar="COLUMN",
        default="solution",
        help="of rows without an assistant's message (default: solution)",
    )
    parser.add_argument(
        "--answer", default="{}", help="how a truth of a column is to be said, as '<answer>{}</answer>'"
    )
    parser.add_argument("--limit", type=positive_int, default=32, help="rows (default: 32)")
    parser.add_argument("--model", type=Path, help="a checkpoint whose answers are scored, too")
    parser.add_argument("--generations", type=positive_int, default=8, help="answers to a row (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="answers at once (default: 64)")
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, help="also write all values and findings here")
    parser.add_argument("--figure", type=new_file, metavar="PNG", help="also draw the table here")
    parser.add_argument(
        "--swift", action="store_true", help="take data, rewards, plugins of the swift rlhf line after --"
    )
    own, line = split_arguments()
    args = parser.parse_args(own)
    swift = parse("rlhf", line)
    if args.swift:
        if not swift.dataset or not swift.reward_funcs:
            return argparse.Namespace(rewards=[])
        args.data, args.rewards, args.weights = swift.dataset[0], swift.reward_funcs, swift.reward_weights
        args.plugins = [Path(plugin) for plugin in swift.external_plugins]
    if not args.data or not args.rewards:
        parser.error("--data and --rewards are needed")
    if twice := [name for name in args.rewards if args.rewards.count(name) > 1]:
        parser.error(f"--rewards {twice[0]}: is named twice")
    models = len(swift.reward_model or ())  # ms-swift's list has their weights, too, behind those of the rewards
    if args.weights and len(args.weights) - models != len(args.rewards):
        parser.error(f"--weights gives {len(args.weights)} for {len(args.rewards)} rewards")
    if "{}" not in args.answer:
        parser.error(f"--answer {args.answer}: has no {{}}, where the truth goes")
    args.swift_args = swift
    return args


def main() -> int:
    args = arguments()
    if not args.rewards:  # a line without any: distillation, a reward model
        return 0
    if args.model:
        check_causal(open_checkpoint(args.model))
    try:
        rows, truths = read_rows(args.data, args.limit, args.truth, args.answer)
    except PruneKitError as error:
        if not args.swift:
            raise
        print(f"the rewards are not tried: {error}")  # a hub's data set, or one without truths
        return 0
    check_rewards(args.rewards, args.plugins)
    check_names(args.model_type, args.template, args.plugins)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    load_plugins(args.plugins)
    from swift.rewards import orms

    swift = args.swift_args
    for name in ("soft_max_length", "cosine_max_len"):  # as ms-swift fills them in
        if getattr(swift, name, 0) is None:
            setattr(swift, name, swift.max_completion_length)
    rewards = {}
    for name in args.rewards:
        try:
            rewards[name] = orms[name](args=swift)
        except Exception as error:
            raise PruneKitError(f"reward {name} can't be made: it {failure(error)}") from None
    kinds = completions_of(truths, [text_of(question_of(row["messages"])) for row in rows], args.seed)
    samples = {"model": answers_of(args, rows)} if args.model else None
    weights = (args.weights or [1.0] * len(rewards))[: len(rewards)]
    found = try_rewards(rewards, weights, columns_for(rows), kinds, samples, args.generations)
    print(table(found))
    if samples:
        print(samples_said(found, len(rows)))
    for finding in sorted(found.findings, key=lambda each: not each.fault):
        print(f"{'fault' if finding.fault else 'note'}: {finding.reward} {finding.text}")
    notes = len(found.findings) - len(found.faults)
    print(f"{len(found.faults)} faults, {notes} notes: {len(rewards)} rewards on {len(rows)} rows of {args.data}")
    if args.json:
        findings = [vars(finding) for finding in found.findings]
        write_json(args.json, {"values": found.values, "completions": found.kinds, "findings": findings})
    if args.figure:
        from prunekit.report.rewards import draw_tryout

        draw_tryout(found, args.figure)
    return 3 if found.faults else 0


if __name__ == "__main__":
    run_script(main)
