"""Rewards for reasoning-gym's tasks, each by the task's own scorer. examples/reasoning/reasoning.py makes the rows.

    swift rlhf --rlhf_type grpo --external_plugins plugins/reasoning_rewards.py \\
        --reward_funcs reasoning_right reasoning_form --reward_weights 1 0.1

    name             range   best  says
    reasoning_right  0 .. 1  1     what the scorer gives the text between <answer> and </answer>
    reasoning_form   0 or 1  1     there is one such text, and nothing but white space behind it

The column `entry` has the task as JSON: question, answer, metadata. What is scored is what stands in the last pair of
tags; without one it is 0. Scorers of some tasks evaluate what a model writes as a formula: the tasks that the example
takes if none are named only compare.
"""

import json
import re

from swift.rewards import ORM, orms

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_right(completion: str, entry: str) -> float:
    """The task's own score of the last answer, in [0, 1]; entry: the task as JSON."""
    from reasoning_gym import get_score_answer_fn

    found = ANSWER.findall(completion)
    task = json.loads(entry)
    return float(get_score_answer_fn(task["metadata"]["source_dataset"])(found[-1].strip(), task)) if found else 0.0


def reasoning_form(completion: str, entry: str) -> float:
    """1 for one answer in tags, at the end; else 0."""
    found = list(ANSWER.finditer(completion))
    return float(len(found) == 1 and not completion[found[0].end() :].strip())


class EntryReward(ORM):
    """Scores each completion against the `entry` of its own row."""

    def __call__(self, completions: list[str], entry: list[str], **columns) -> list[float]:
        return [self.score(*pair) for pair in zip(completions, entry, strict=True)]


REWARDS = (reasoning_right, reasoning_form)

orms.update({f.__name__: type(f.__name__, (EntryReward,), {"score": staticmethod(f)}) for f in REWARDS})
