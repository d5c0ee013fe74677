"""Real answers of a model without some layers, scored."""

import copy
from collections.abc import Sequence
from typing import Any

from prunekit.data.answers import generate, score_answers
from prunekit.data.groups import group_of

from .removal import Removal
from .scanner import Job, encoder_for, load_scanner, rounded, rows_of


def answer_without(item: tuple[Job, tuple[Removal, ...], int, int, int, int]) -> tuple[list[str], list[bool]]:
    """Greedy answers to some of the data set's first rows without some layers, and which of them were cut.

    Item: job, layers, rows, tokens of an answer at most, and which of how many equal shares of the rows.
    """
    from swift import TransformersEngine

    job, gone, rows, tokens, share_, shares = item
    scanner, mine = load_scanner(job), rows_of(job)[:rows][share_::shares]
    if not mine:
        return [], []
    template = copy.copy(encoder_for(job).template)
    template.max_length = None  # which rows are scored goes by it; of these all are answered
    with scanner.without(gone):
        engine = TransformersEngine(scanner.model, template=template)
        return generate(engine, mine, max_new_tokens=tokens)


def score_generation(job: Job, rows: int, tokens: int, parts: Sequence[tuple[list[str], list[bool]]]) -> dict[str, Any]:
    """Exact match and character error rate of what `answer_without` gave for all shares of the rows, in their order."""
    samples = rows_of(job)[:rows]
    answers = [""] * len(samples)
    for share_, (part, _) in enumerate(parts):
        answers[share_ :: len(parts)] = part

    def scored(group: str | None = None) -> dict[str, Any]:
        mine = [i for i, row in enumerate(samples) if group is None or group_of(row, str(job.by)) == group]
        found = score_answers([answers[i] for i in mine], [samples[i] for i in mine], {})
        return {key: rounded(value) for key, value in found.items()} | {"samples": len(mine)}

    groups = sorted({group_of(row, job.by) for row in samples}) if job.by else []
    cut = sum(sum(part) for _, part in parts)
    by_group = {"groups": {group: scored(group) for group in groups}} if groups else {}
    return scored() | {"n_cut": cut, "max_new_tokens": tokens} | by_group
