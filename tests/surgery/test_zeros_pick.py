"""Which weights go: exactly so many, the lowest."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.surgery.zeros_pick import find_cuts, sort_keys


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e-30, 3e38]), min_size=1, max_size=9), min_size=1),
    st.floats(0, 1),
)
def test_a_cut_takes_exactly_so_many_and_never_a_higher_score_than_it_leaves(values, share):
    parts = [torch.tensor(part) for part in values]
    keys = [(str(number), sort_keys(part, part)) for number, part in enumerate(parts)]
    count = math.floor(share * sum(map(len, parts)))
    cuts = find_cuts(lambda: keys, count)
    masks = [cuts[name].mask(key) for name, key in keys]
    taken, left = (
        torch.cat([p[m] for p, m in zip(parts, masks)]),
        torch.cat([p[~m] for p, m in zip(parts, masks)]),
    )
    assert len(taken) == count == sum(cut.count for cut in cuts.values())
    assert not len(taken) or not len(left) or taken.max() <= left.min()
