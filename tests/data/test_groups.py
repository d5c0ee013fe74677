"""Groups of rows: which column makes some, and figures of samples with their errors."""

import numpy as np
import pytest

from prunekit.data.groups import FEW, groups_of, ratio
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError


def rows(*skills):
    return Rows("data.jsonl", ({"messages": []} | ({} if skill is None else {"skill": skill}) for skill in skills))


def test_words_and_whole_numbers_name_groups():
    assert groups_of(rows("read", " add ", 3), "skill") == ["read", "add", "3"]


@pytest.mark.parametrize(
    "skills, said",
    [
        ([None] * 3, "row 1 has no column 'skill'"), (["a", None], "row 2 has no column 'skill'"),
        (["a", ""], "row 2 has no word"), (["a", ["b"]], "row 2 has no word"), (["a", True], "row 2 has no word"),
        (["a", 0.5], "row 2 has no word"), (range(31), "31 values, 30 are the most"),
        (["a"] * FEW + ["b"], "skill 'b' has 1 of the 9 rows"),
    ],
)  # fmt: skip
def test_what_makes_no_groups_is_named_in_one_line(skills, said):
    with pytest.raises(PruneKitError, match="^dataset data.jsonl") as refused:
        groups_of(rows(*skills), "skill", FEW)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_error_of_a_mean_of_ones_and_zeros_is_the_binomials():
    values = np.array([1.0] * 30 + [0.0] * 10)
    mean, error = ratio(values, np.ones(40))
    assert (mean, error) == (0.75, pytest.approx(np.sqrt(0.75 * 0.25 / 39)))


def test_no_sample_has_no_mean_and_one_no_error():
    nothing, one = ratio(np.array([]), np.array([])), ratio(np.ones(1), np.ones(1))
    assert np.isnan(nothing[0]) and (nothing[1], *one) == (np.inf, 1.0, np.inf)
