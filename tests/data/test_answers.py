"""Answers scored by rewards, without a model."""

from types import SimpleNamespace

import pytest
from swift.rewards import orms

from prunekit.data.answers import check_columns, generate, score_answers
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError

ROWS = [
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": truth}], "solution": truth}
    for truth in ("one", "two", "three")
]


class Right:
    """1 for the truth."""

    def __call__(self, completions, solution, **kwargs):
        return [float(said == truth) for said, truth in zip(completions, solution, strict=True)]


class RightAfterAWhile(Right):
    async def __call__(self, completions, solution, **kwargs):
        return super().__call__(completions, solution)


class RightOrFails(Right):
    def __call__(self, completions, solution, **kwargs):
        if "bad" in completions:
            raise ZeroDivisionError("no digit")
        return super().__call__(completions, solution)


class TokensOfAnAnswer:
    """Reads what only a trainer gives."""

    def __call__(self, completions, response_token_ids, trainer_state, **kwargs):
        assert trainer_state.global_step == 0
        return [float(len(ids)) for ids in response_token_ids]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for reward in (Right, RightAfterAWhile, RightOrFails, TokensOfAnAnswer):
        monkeypatch.setitem(orms, reward.__name__, reward)


@pytest.mark.parametrize("name", ["Right", "RightAfterAWhile"])
def test_a_reward_is_the_mean_over_the_rows_times_its_weight(name):
    assert score_answers(["one", "2", "three"], ROWS, {name: 3.0})["reward"] == pytest.approx(2.0)


def test_a_row_that_a_reward_fails_on_counts_zero_and_is_said(capsys):
    assert score_answers(["one", "bad", "three"], ROWS, {"RightOrFails": 3.0})["reward"] == pytest.approx(2.0)
    assert "reward RightOrFails raises ZeroDivisionError (no digit) for 'bad'" in capsys.readouterr().err


def test_rewards_get_what_a_trainer_gives_them():
    assert score_answers(["one", "2", "three"], ROWS, {"TokensOfAnAnswer": 1.0})["reward"] == pytest.approx(3.0)


def test_an_accent_may_be_a_character_of_its_own():
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "cafe\u0301"}]}
    assert score_answers(["caf\u00e9"], [row], {}) == {"exact_match": 1.0, "cer": 0.0}


def test_a_reward_that_lacks_a_column_is_named_before_anything_is_generated():
    rows = Rows("data.jsonl", [{"messages": ROWS[0]["messages"]}])
    with pytest.raises(PruneKitError, match=r"--rewards Right: can't score dataset data.jsonl: .*'solution'"):
        check_columns(["Right"], rows)


def test_a_model_is_asked_with_all_that_a_row_gives_it_but_the_answer():
    asked = []
    engine = SimpleNamespace(
        template=SimpleNamespace(set_mode=lambda mode: None),
        tokenizer=SimpleNamespace(eos_token_id=0),
        generation_config=SimpleNamespace(eos_token_id=0),
        infer=lambda requests, *_, **__: asked.extend(requests) or [],
    )
    generate(engine, [ROWS[0] | {"tools": '[{"name": "f"}]', "videos": ["a.mp4"], "images": None}])
    (request,) = asked
    assert request.messages == ROWS[0]["messages"][:1]
    assert (request.tools, request.videos, request.images) == ([{"name": "f"}], ["a.mp4"], [])
