"""A reward under guard: what it says is what it said, and what it fails on goes without it and is counted."""

import asyncio
from types import SimpleNamespace

import pytest

from prunekit.data.rewards import BadValues, call_reward, columns_for, guard
from prunekit.errors import PruneKitError

SAID = ["a", "bb", "", "dddd"]
TRUTHS = ["a", "b", "c", "dddd"]
BEGUN = SimpleNamespace(global_step=3)


def length(completions, **columns):
    return [float(len(completion)) for completion in completions]


def inverse(completions, solution, **columns):
    return [
        1 / len(completion) + (completion == truth) for completion, truth in zip(completions, solution, strict=True)
    ]


def fewer(completions, **columns):
    return [1.0] * (len(completions) - 1) if len(completions) > 1 else [float(len(completions[0]))]


def infinite(completions, **columns):
    return [float("inf") if completion == "bb" else 1.0 for completion in completions]


def huge(completions, **columns):
    return [1e39 if completion == "bb" else 1.0 for completion in completions]  # infinite in fp32


def never(completions, **columns):
    raise KeyError("label")


def test_a_sound_reward_says_what_it_says_without_a_guard():
    assert guard(length, "length")(SAID, solution=TRUTHS) == length(SAID)


@pytest.mark.parametrize(
    ("reward", "values"),
    [
        (inverse, [2.0, 0.5, None, 1.25]),
        (infinite, [1.0, None, 1.0, 1.0]),
        (huge, [1.0, None, 1.0, 1.0]),
        (fewer, [1.0, 2.0, 0.0, 4.0]),
    ],
    ids=["raises", "infinite", "huge", "too few"],
)
def test_only_rows_that_fail_alone_go_without_it(reward, values):
    guarded = guard(reward, "mine")
    assert guarded(SAID, solution=TRUTHS) == values
    assert guarded.take_failed() == values.count(None)


def test_failures_are_counted_until_they_are_taken():
    guarded = guard(inverse, "mine")
    for _ in range(3):
        guarded(SAID, solution=TRUTHS)
    assert (guarded.take_failed(), guarded.take_failed()) == (3, 0)


def test_it_is_said_once_which_completion_failed_and_why(capsys):
    guarded = guard(inverse, "mine")
    for _ in range(3):
        guarded(SAID, solution=TRUTHS)
    (line,) = capsys.readouterr().err.splitlines()
    assert "reward mine raises ZeroDivisionError" in line and "for ''" in line


def test_a_reward_that_can_score_nothing_ends_the_run_before_its_first_step():
    with pytest.raises(PruneKitError, match="reward mine raises KeyError"):
        guard(never, "mine")(SAID)


def test_a_reward_that_fails_later_doesnt_end_the_run():
    assert guard(never, "mine")(SAID, trainer_state=BEGUN) == [None] * 4


def test_an_async_reward_stays_one_and_is_guarded():
    async def waits(completions, **columns):
        await asyncio.sleep(0)
        return inverse(completions, **columns)

    guarded = guard(waits, "waits")
    assert asyncio.iscoroutinefunction(guarded.__call__)
    assert asyncio.run(guarded(SAID, solution=TRUTHS)) == [2.0, 0.5, None, 1.25]


@pytest.mark.parametrize(("found", "words"), [(5, "one number"), (["x"], "one number"), ([1, 2], "2 values for 1")])
def test_what_is_no_list_of_numbers_is_named(found, words):
    with pytest.raises(BadValues, match=words):
        call_reward(lambda completions: found, ["a"], {})


def test_images_are_given_to_rewards_as_ms_swift_gives_them():
    from swift.dataset import RowPreprocessor

    messages = [{"role": "user", "content": "<image>?"}]
    for images in ("a.png", ["a.png", "b.png"], {"path": "a.png"}, [{"path": "a.png"}]):
        row = {"messages": messages, "images": images}
        given = columns_for([row])(["x"], [0])["images"]
        theirs = {"images": images.copy() if isinstance(images, list) else images}
        RowPreprocessor._cast_mm_data(theirs)
        # a column of its data set has both keys for all
        assert given == [[{"bytes": None} | image for image in theirs["images"]]] and row["images"] == images


def test_a_gyms_reward_is_one_more_name_without_a_function(monkeypatch):
    from prunekit.training.reinforcement_trainer import GRPOTrainer, GuardedGRPOTrainer

    def prepare(trainer):
        trainer.reward_funcs, trainer.reward_func_names = [length], ["length", "gym_reward"]

    monkeypatch.setattr(GRPOTrainer, "_prepare_rewards", prepare)
    trainer = GuardedGRPOTrainer.__new__(GuardedGRPOTrainer)
    trainer._prepare_rewards()
    assert [each.name for each in trainer.reward_funcs] == ["length"]
