"""What a user may wish of zeros: patterns, and numbers within their ranges."""

import math

import pytest

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery.zeros import plan_zeros
from prunekit.surgery.zeros_wish import Wish, parse_pattern


@pytest.mark.parametrize(("text", "read"), [("2:4", (2, 4)), ("1:4", (3, 4)), ("6:8", (2, 8))])
def test_a_pattern_says_how_many_of_a_group_stay(text, read):
    assert parse_pattern(text) == read


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:4:8", "2-4", "a:b", ""])
def test_a_pattern_that_leaves_all_or_nothing_is_refused(text):
    with pytest.raises(PruneKitError, match=f"--pattern {text}: write it N:M"):
        parse_pattern(text)


@pytest.mark.parametrize(
    "wish",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"threshold": 0.0}, {"threshold": math.inf},
     {"sparsity": 0.5, "maximum": 0.0},
     {"sparsity": 0.5, "power": math.inf}],
)  # fmt: skip
def test_wishes_at_the_ends_of_their_ranges_are_refused(wish, tiny):
    with pytest.raises(PruneKitError, match="^--"):
        plan_zeros(open_checkpoint(tiny("llama")), Wish(**wish))
