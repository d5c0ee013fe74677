"""Rewards as ms-swift's GRPO trainer calls them, and under a guard that lets none of them end a run."""

import asyncio
import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from prunekit.errors import CONTROLS, PruneKitError

from .rows import images_of, question_of

Reward = Callable[..., Any]
SHOWN = 60  # characters of a completion in a message
LARGEST = 2.0**127  # ms-swift keeps rewards in fp32


class BadValues(Exception):
    """What a reward returned is not one number, or None, for each completion."""


def call_reward(reward: Reward, completions: list[str], columns: dict[str, Any]) -> list[float | None]:
    """A reward's value for each completion, None where it says "not applicable"; an AsyncORM is waited for.

    columns: the data set's, one item a completion each, and what else ms-swift gives (trainer_state). Raises BadValues,
    and whatever the reward raises.
    """
    found = reward(completions, **columns)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    try:
        found = list(found)
        values = [None if value is None else float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise BadValues(f"returns {shown(found)}, where one number for each completion is wanted") from error
    if len(values) != len(completions):
        raise BadValues(f"returns {len(values)} values for {len(completions)} completions")
    if wrong := [value for value in values if value is not None and not abs(value) <= LARGEST]:
        raise BadValues(f"returns {wrong[0]}")
    return values


def columns_for(rows: Sequence[dict[str, Any]]) -> Callable[[list[str], list[int]], dict[str, Any]]:
    """columns(completions, row numbers): what ms-swift 4.6 gives its rewards beside the completions."""
    from transformers import TrainerState

    names = list(dict.fromkeys(name for row in rows for name in row if name != "messages"))
    state = TrainerState()

    def columns(completions: list[str], numbers: list[int]) -> dict[str, Any]:
        made = []
        for place, (completion, number) in enumerate(zip(completions, numbers, strict=True)):
            row = copy.deepcopy(rows[number])
            if row.get("images"):
                images = (image if isinstance(image, dict) else {"path": image} for image in images_of(row))
                row["images"] = [{"bytes": None} | image for image in images]
            row["messages"] = [*question_of(row["messages"]), {"role": "assistant", "content": completion}]
            # A model's tokens are not known here: characters are about as many.
            tokens = {"response_token_ids": [ord(letter) for letter in completion]}
            row |= {"prompt_id": str(number), "request_id": f"{number}-{place}", "finish_reason": "stop"}
            made.append(row | tokens | {"is_truncated": False, "rollout_infos": {}})
        given = [*names, *(name for name in made[0] if name not in names)]
        return {"trainer_state": state} | {name: [row.get(name) for row in made] for name in given}

    return columns


def row_of(columns: dict[str, Any], number: int, count: int) -> dict[str, Any]:
    """The columns of one row out of `count`; what isn't a column (trainer_state) stays."""
    return {
        name: value[number : number + 1] if isinstance(value, list) and len(value) == count else value
        for name, value in columns.items()
    }


def shown(value: object) -> str:
    """A value in a message of one line."""
    text = CONTROLS.sub(" ", value if isinstance(value, str) else repr(value))
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def failure(error: Exception) -> str:
    """What a reward did wrong, in words."""
    if isinstance(error, BadValues):
        return str(error)
    return f"raises {type(error).__name__} ({CONTROLS.sub(' ', str(error))[:200]})"


class GuardedReward:
    """A reward for which a row that it fails on is "not applicable" (None), and counted.

    Where it fails on a batch (an exception, NaN, too few values), its rows are scored one by one. One that can't score
    a single row of its first batch, before the first step, raises PruneKitError: nothing is lost yet.
    """

    def __init__(self, reward: Reward, name: str):
        self.reward, self.name = reward, name
        self.failed = 0  # rows since `take_failed`
        self._began = self._warned = False

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        try:
            values = call_reward(self.reward, completions, columns)
        except Exception:
            values, problems = [], {}
            for number, completion in enumerate(completions):
                one = row_of(columns, number, len(completions))
                try:
                    values += call_reward(self.reward, [completion], one)
                except Exception as error:
                    values.append(None)
                    problems[number] = failure(error)
            self.failed += len(problems)
            self._tell(problems, completions, getattr(columns.get("trainer_state"), "global_step", 0))
        self._began = True
        return values

    def _tell(self, problems: dict[int, str], completions: list[str], step: int) -> None:
        if not problems or self._warned:
            return
        number, problem = next(iter(problems.items()))
        what = f"reward {self.name} {problem}"
        if len(problems) == len(completions) and not self._began and step == 0:
            raise PruneKitError(
                f"{what}, as for all of the first {len(problems)} completions: mend it, or leave it out"
            )
        print(
            f"warning: {what} for {shown(completions[number])}: such rows go without it, and are counted ('failed')",
            file=sys.stderr,
            flush=True,
        )
        self._warned = True

    def take_failed(self) -> int:
        """How many rows it has failed on since the last call."""
        failed, self.failed = self.failed, 0
        return failed


class GuardedAsyncReward(GuardedReward):
    """The same of an AsyncORM: in a thread, so that several wait at once."""

    async def __call__(  # type: ignore[override]
        self, completions: list[str], **columns: Any
    ) -> list[float | None]:
        return await asyncio.to_thread(super().__call__, completions, **columns)


def guard(reward: Reward, name: str) -> GuardedReward:
    """The reward under a guard; `name` is what messages and metrics call it."""
    waits = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    return (GuardedAsyncReward if waits else GuardedReward)(reward, name)
