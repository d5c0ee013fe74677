"""Rows for reinforcement learning on text: tasks of reasoning-gym, whose own scorers are the reward.

    pip install -e '.[reasoning]'
    python examples/reasoning/reasoning.py --out runs/reasoning --tasks chain_sum spell_backward --rows 2000
    export DATASET=runs/reasoning/train.jsonl VAL_DATASET=runs/reasoning/val.jsonl
    MODEL=checkpoints/merged OUTPUT=checkpoints/rl bash rl_run.sh --external_plugins plugins/reasoning_rewards.py \\
        --reward_funcs reasoning_right reasoning_form --reward_weights 1 0.1

Writes train.jsonl and val.jsonl: messages with an answer in its form, which a reward try-out takes for the truth, and
the columns `solution`, `entry` (the task as JSON, for the scorer) and `skill` (its name). The tasks by turns; no
question of val.jsonl is in train.jsonl. The same --seed makes the same rows.
"""

import json
from pathlib import Path

from prunekit.arguments import Parser, natural, positive_int
from prunekit.checkpoint import new_folder
from prunekit.errors import PruneKitError, need_packages, run_script

# Their scorers compare texts or numbers, and run nothing of what a model writes.
TASKS = (
    "chain_sum", "leg_counting", "letter_counting", "number_sorting", "spell_backward", "gcd", "base_conversion",
    "calendar_arithmetic", "word_sorting", "family_relationships", "number_sequence", "coin_flip",
)  # fmt: skip
PROMPT = "{}\n\nThink it over, then give the answer alone between <answer> and </answer>."


def row_of(entry: dict, task: str) -> dict:
    """A row of one entry of reasoning-gym."""
    answer = str(entry["answer"])
    return {
        "messages": [
            {"role": "user", "content": PROMPT.format(entry["question"])},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ],
        "solution": answer,
        "entry": json.dumps(entry, default=str),
        "skill": task,
    }


def make_rows(tasks: list[str], number: int, seed: int, known: set[str]) -> list[dict]:
    """`number` rows, the tasks by turns; no question that is `known`, which all of these are then.

    Raises PruneKitError where a task has no more questions.
    """
    import reasoning_gym

    drawn = {task: iter(reasoning_gym.create_dataset(task, size=20 * number, seed=seed)) for task in tasks}
    rows = []
    for place in range(number):
        task = tasks[place % len(tasks)]
        entry = next((each for each in drawn[task] if each["answer"] and each["question"] not in known), None)
        if entry is None:
            raise PruneKitError(f"--tasks {task}: it has too few different questions; ask for fewer --rows")
        known.add(entry["question"])
        rows.append(row_of(entry, task))
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), help=f"of reasoning-gym (default: {' '.join(TASKS)})"
    )
    parser.add_argument("--rows", type=positive_int, default=2000, help="of train.jsonl (default: 2000)")
    parser.add_argument("--val-rows", type=positive_int, default=200)
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    need_packages("reasoning_gym", extra="reasoning")
    from reasoning_gym.factory import DATASETS

    if unknown := [task for task in args.tasks if task not in DATASETS]:
        raise PruneKitError(
            f"--tasks {unknown[0]}: reasoning-gym has none such; choose from {', '.join(sorted(DATASETS))}"
        )
    known: set[str] = set()
    sets = {"val": make_rows(args.tasks, args.val_rows, args.seed, known)}
    sets["train"] = make_rows(args.tasks, args.rows, args.seed + 1, known)
    with new_folder(args.out) as folder:
        for name, rows in sets.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}: {args.rows} rows to train on, {args.val_rows} to judge by, of {len(args.tasks)} tasks")


if __name__ == "__main__":
    run_script(main)
