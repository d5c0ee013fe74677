"""What a round cuts: within its budget, no further than the target, cheapest first; what is kept of the base."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit import plan
from prunekit.errors import PruneKitError
from prunekit.loop.choice import (
    DEAR,
    KINDS,
    LITTLE,
    SIZES,
    Candidate,
    absolute_targets,
    affordable,
    choose,
    gain,
    kept_share,
    missing,
    round_share,
    table,
    total,
    useful_share,
)


def candidate(kind, cost, params, kv=0.0, name=""):
    return Candidate(kind, name or f"{kind} {params}", cost, {"params": params, "bytes": 2 * params, "kv": kv}, ())


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.sampled_from(KINDS),
        st.floats(-0.1, 3),
        st.integers(1, 40).map(float),
        st.integers(0, 8).map(float),
    ),
    max_size=8,
)
WANTED = st.fixed_dictionaries({"params": st.floats(1, 60)}, optional={"kv": st.floats(1, 8)})


@given(CANDIDATES, WANTED, st.floats(0, 60))
def test_a_choice_fits_its_budget_and_takes_one_of_a_kind_in_order(candidates, wanted, most):
    chosen = choose(candidates, wanted, most)
    kinds = [each.kind for each in chosen]
    assert total(chosen)["params"] <= most
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert all(each in candidates for each in chosen)


@given(CANDIDATES, WANTED, st.floats(0, 60))
def test_a_choice_ends_only_where_the_target_is_reached_or_nothing_more_fits_or_is_worth_it(candidates, wanted, most):
    chosen = choose(candidates, wanted, most)
    now, cost = gain(total(chosen), wanted), sum(each.cost for each in chosen)
    if now < len(wanted) - 1e-6:
        for each in candidates:
            others = [c for c in chosen if c.kind != each.kind]
            saved, more = total([*others, each]), gain(total([*others, each]), wanted) - now
            added = sum(c.cost for c in others) + each.cost - cost
            dear = chosen and more > 0 and added / more > 0.99 * DEAR * max(LITTLE, cost / now)
            assert saved["params"] > most or more <= 1e-6 or dear


@given(CANDIDATES, WANTED, st.floats(0, 60), st.randoms())
def test_a_choice_does_not_hang_on_the_order_of_what_there_is(candidates, wanted, most, random):
    named = [Candidate(c.kind, f"{i}", c.cost, c.saved, ()) for i, c in enumerate(candidates)]
    shuffled = random.sample(named, len(named))
    assert choose(named, wanted, most) == choose(shuffled, wanted, most)


def test_the_cheapest_kind_a_unit_goes_first_and_others_fill_the_budget():
    layers = [candidate("layers", 0.01, 10), candidate("layers", 0.10, 20)]
    others = [candidate("neurons", 0.03, 10), candidate("heads", 0.2, 10)]
    assert choose([*layers, *others], {"params": 100}, 10) == [layers[0]]
    assert choose([*layers, *others], {"params": 100}, 20) == [layers[0], others[0]]
    assert choose([*layers, *others], {"params": 100}, 30) == [layers[1], others[0]], "a larger cut of the same kind"


def test_a_budget_is_not_spent_on_what_is_far_dearer_than_the_rest():
    cheap, ruinous = candidate("neurons", 0.03, 20), candidate("heads", 1.2, 5)
    assert choose([cheap, ruinous], {"params": 30}, 25) == [cheap]
    assert choose([ruinous], {"params": 30}, 25) == [ruinous], "there is nothing else"


@given(CANDIDATES, WANTED, st.floats(0, 60), st.floats(0, 3))
def test_a_choice_costs_no_more_than_it_may_but_where_everything_does(candidates, wanted, most, loss):
    chosen = choose(candidates, wanted, most, most_loss=loss)
    if sum(each.cost for each in chosen) > loss:
        fitting = [each for each in candidates if each.saved["params"] <= most and gain(each.saved, wanted) > 1e-9]
        assert [each.cost for each in chosen] == [min(each.cost for each in fitting)]


def test_a_choice_ends_where_more_would_cost_too_much_and_tries_the_least_where_everything_does():
    layers, neurons = candidate("layers", 0.1, 10), candidate("neurons", 0.15, 20)
    for loss, chosen in ((0.05, [layers]), (0.12, [layers]), (0.2, [neurons]), (0.25, [layers, neurons])):
        assert choose([layers, neurons], {"params": 30}, 40, most_loss=loss) == chosen


@given(CANDIDATES, WANTED, st.floats(0, 60), st.floats(0, 3), st.floats(0, 3))
def test_what_costs_as_much_as_what_failed_is_not_tried_again(candidates, wanted, most, loss, failed):
    chosen = choose(candidates, wanted, most, most_loss=loss, failed=failed)
    assert not chosen or sum(each.cost for each in chosen) < failed


def test_what_a_round_may_cost_goes_by_what_those_before_it_lost_of_theirs():
    assert affordable([(0.04, 0.01), (0.26, 0.05)], 0.02) == pytest.approx(0.1)
    assert affordable([], 0.02) == affordable([(0.04, -0.01)], 0.02) == math.inf, (
        "nothing says that a cut loses anything"
    )


def test_what_goes_beyond_the_target_is_no_gain():
    small, large = candidate("layers", 0.02, 5), candidate("neurons", 0.03, 20)
    assert choose([small, large], {"params": 5}, 25) == [small]
    assert choose([small, large], {"params": 20}, 25) == [large]


def test_a_target_of_the_kv_cache_takes_what_saves_it():
    neurons, heads = candidate("neurons", 0.001, 20), candidate("kv", 0.2, 1, kv=4)
    assert choose([neurons, heads], {"kv": 4}, 25) == [heads]
    heads = candidate("kv", 0.02, 1, kv=4)
    assert choose([neurons, heads], {"kv": 4, "params": 20}, 25) == [neurons, heads]


def test_a_speed_takes_what_saves_seconds():
    slow = Candidate("layers", "a", 0.02, {"params": 10, "bytes": 20, "kv": 0, "speed": 0.2}, ())
    large = Candidate("neurons", "b", 0.01, {"params": 20, "bytes": 40, "kv": 0, "speed": 0.01}, ())
    assert choose([slow, large], {"speed": 0.2}, 25) == [slow]


def test_where_nothing_fits_nothing_is_chosen():
    assert choose([candidate("layers", 0.1, 30)], {"params": 10}, 20) == []
    assert choose([], {"params": 10}, 20) == []


@pytest.mark.parametrize(
    ("metric", "base", "now", "share"),
    [("token_acc", 0.8, 0.6, 0.75), ("reward", 0.5, 0.6, 1.2), ("cer", 0.1, 0.19, 0.9), ("loss", 1.0, 1.0, 1.0),
     ("loss", 1.0, 1.1, math.exp(-0.1)), ("loss", 0.0, -1e9, math.exp(700))],
)  # fmt: skip
def test_the_share_that_is_kept(metric, base, now, share):
    assert kept_share(metric, base, now) == pytest.approx(share)


@pytest.mark.parametrize(("metric", "base"), [("exact_match", 0.0), ("reward", -0.2), ("cer", 1.5)])
def test_a_base_that_has_nothing_to_keep_is_refused(metric, base):
    with pytest.raises(PruneKitError, match=f"METRIC={metric}: the base has .*of that no share can be kept"):
        kept_share(metric, base, 0.5)


@given(st.floats(0.01, 1), st.floats(0.5, 1.2), st.floats(0.5, 1), st.integers(0, 3))
def test_a_rounds_share_shrinks_toward_the_gate_and_by_half_with_each_failure(most, kept, keep, failed):
    share = round_share(most, kept, keep, failed)
    assert 0 < share <= most
    assert round_share(most, kept, keep, failed + 1) == pytest.approx(share / 2)
    assert round_share(most, min(kept, keep), keep, failed) <= share


def test_a_rounds_share_goes_from_a_quarter_to_a_tenth():
    assert round_share(0.25, 1.0, 0.97, 0) == pytest.approx(0.25)
    assert round_share(0.25, 0.97, 0.97, 0) == pytest.approx(0.1)
    assert round_share(0.25, 1.0, 1.0, 0) == pytest.approx(0.1)


def test_targets_are_shares_of_the_base_or_bytes():
    base = {"params": 100.0, "bytes": 200.0, "kv": 8.0}
    targets = absolute_targets(base, 0.6, 150.0, 0.5)
    assert targets == {"params": 60.0, "bytes": 150.0, "kv": 4.0}
    assert missing(targets, {"params": 80.0, "bytes": 150.0, "kv": 2.0}) == {"params": 20.0}
    assert absolute_targets(base, None, None, None, 2.0) == {"speed": 0.5}
    with pytest.raises(PruneKitError, match="no target"):
        absolute_targets(base, None, None, None)


def test_layers_are_scanned_no_farther_than_is_of_use():
    now = {"params": 100.0, "bytes": 200.0, "kv": 8.0}
    assert useful_share(25, {"params": 10.0}, now) == pytest.approx(0.1)
    assert useful_share(25, {"params": 10.0, "bytes": 60.0}, now) == pytest.approx(0.25)
    assert useful_share(25, {"params": 10.0, "kv": 1.0}, now) == pytest.approx(0.25)
    assert useful_share(25, {"speed": 0.1}, now) == pytest.approx(0.25)


def test_the_table_shows_all_and_marks_what_is_chosen():
    cuts = [candidate("layers", 0.2, 10), candidate("neurons", 0.03, 10), candidate("kv", 0.1, 0, kv=2)]
    lines = table(cuts, cuts[1:2], {"params": 10.0}).splitlines()
    assert [line[0] for line in lines[1:]] == ["*", " ", " "] and lines[1].endswith("neurons 10")
    assert list(SIZES) == ["params", "bytes", "kv"]


def test_a_choice_that_could_not_be_written_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "--model", "no/model", "--json", "no/folder/x.json"])
    with pytest.raises(PruneKitError, match="--json: no/folder is no folder that you may write to"):
        plan.main()
