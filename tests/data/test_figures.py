"""Figures of rows, and how sure the difference of two models is."""

import numpy as np
import pytest

from prunekit.data import figures
from prunekit.data.figures import chosen, means, paired_differences

ONES = np.ones(400)


def right(*values):
    return {"exact_match": (np.array(values, float), np.ones(len(values)))}


def test_means_are_of_tokens_not_of_rows():
    assert means({"token_acc": (np.array([1.0, 9.0]), np.array([1.0, 99.0]))}) == {"token_acc": 0.1}


def test_an_error_rate_over_nothing_is_finite():
    assert means({"cer": (np.array([2.0]), np.array([0.0]))}) == {"cer": 2.0}


def test_chosen_rows_come_in_their_order():
    assert chosen(right(1, 2, 3), [2, 0])["exact_match"][0].tolist() == [3, 1]


def test_an_interval_is_as_wide_as_the_paired_standard_error_says():
    generator = np.random.default_rng(1)
    base = (generator.random(400) < 0.9) * 1.0
    cut = base * (generator.random(400) < 0.8)
    difference, low, high = paired_differences(right(*base), right(*cut))["exact_match"]
    error = np.std(cut - base, ddof=1) / 20
    assert difference == pytest.approx((cut - base).mean())
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=0.15 * error)


def test_two_models_that_are_alike_on_every_row_differ_surely_by_nothing():
    values = right(*[0, 1] * 50)
    assert paired_differences(values, values)["exact_match"] == (0, 0, 0)


def test_ratios_are_drawn_with_their_denominators():
    tokens = np.array([1.0, 100.0] * 50)
    base = {"token_acc": (tokens, tokens)}
    cut = {"token_acc": (0.5 * tokens, tokens)}
    assert paired_differences(base, cut)["token_acc"] == pytest.approx((-0.5, -0.5, -0.5))


def test_each_model_has_denominators_of_its_own():
    ones = np.ones(9)
    found = paired_differences({"token_acc": (ones, ones)}, {"token_acc": (ones, 2 * ones)})
    assert found["token_acc"] == pytest.approx((-0.5, -0.5, -0.5))


def test_only_what_both_have_is_compared():
    assert paired_differences(right(1, 0) | {"cer": (ONES[:2], ONES[:2])}, right(1, 0)).keys() == {"exact_match"}


def test_an_interval_is_the_same_again_however_many_draws_fit_into_memory(monkeypatch):
    pair = right(*[1, 1, 0, 1] * 9), right(*[1, 0, 0, 1] * 9)
    found = paired_differences(*pair)
    monkeypatch.setattr(figures, "BLOCK", 777)
    assert paired_differences(*pair) == found
