"""Answers of a model without some layers."""

import json

from helpers.paths import EMBEDDED

from prunekit.knockout.generation import answer_without, score_generation
from prunekit.knockout.removal import Removal
from prunekit.knockout.scanner import Job


def test_shares_of_the_rows_answered_by_several_are_those_of_all(answers):
    job = Job(str(EMBEDDED), str(answers), device="cpu")
    gone = (Removal("text", 3),)
    whole = score_generation(job, 7, 3, [answer_without((job, gone, 7, 3, 0, 1))])
    shares = [answer_without((job, gone, 7, 3, n, 3)) for n in range(3)]
    assert [len(part) for part, _ in shares] == [3, 2, 2]
    assert score_generation(job, 7, 3, shares) == whole


def test_a_question_that_is_too_long_to_be_scored_is_answered(tmp_path):
    rows = [[{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}] for n in (90, 1, 2, 3, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    answers, _ = answer_without((Job(str(EMBEDDED), str(tmp_path / "rows.jsonl"), max_length=40), (), 2, 1, 0, 1))
    assert len(answers) == 2
