"""Gates: what is measured keeps its bounds, or the exit code is 3 and a line says what fell short."""

import argparse
import math

import pytest

from prunekit.errors import PruneKitError
from prunekit.gates import Bound, add_gates, bound, check_bounds, gate

SCORES = {"f1": 0.9, "cut": 0, "entities": {"PER": {"f1": 0.5}}, "model": "x", "zeros": None}


@pytest.mark.parametrize("text", ["f1", "f1>=", ">=1", "f1>1", "f1==1", "f1>=x", "f1>=nan", "f1>=1e400", "f1=>1", ""])
def test_what_is_no_bound_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        bound(text)


def test_a_bound_is_a_name_a_sign_and_a_number():
    assert bound("exact_match>=0.97") == Bound("exact_match", ">=", 0.97)
    assert bound(" batches.32.latency <= 1e-2 ") == Bound("batches.32.latency", "<=", 0.01)


@pytest.mark.parametrize("kept", ["f1>=0.9", "f1<=0.9", "cut<=0", "entities.PER.f1>=0.4"])
def test_bounds_that_are_kept_say_nothing(kept, capsys):
    assert gate([bound(kept)], {"model": SCORES}) == 0
    assert capsys.readouterr() == ("", "")


def test_all_that_falls_short_is_one_line(capsys):
    bounds = [bound("f1>=0.95"), bound("cut<=5"), bound("entities.PER.f1>=0.6")]
    assert gate(bounds, {"a": SCORES, "b": SCORES | {"f1": 1.0}}) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err == (
        "gate: a: f1 is 0.9, not >= 0.95; a: entities.PER.f1 is 0.5, not >= 0.6; "
        "b: entities.PER.f1 is 0.5, not >= 0.6\n"
    )


@pytest.mark.parametrize("sign", [">=", "<="])
def test_what_is_not_a_number_keeps_no_bound(sign):
    assert gate([Bound("f1", sign, 0)], {"a": {"f1": math.nan}}) == 3


@pytest.mark.parametrize("name", ["f2", "model", "zeros", "entities.LOC.f1", "entities"])
def test_a_metric_that_is_not_there_is_a_users_mistake(name):
    with pytest.raises(PruneKitError, match=f"{name}: a has no such number; it has cut, entities.PER.f1, f1"):
        gate([Bound(name, ">=", 0)], {"a": SCORES})


def test_a_metric_that_will_not_be_there_is_refused_before():
    check_bounds([Bound("entities.PER.f1", ">=", 0)], ("f1", "entities"))
    with pytest.raises(PruneKitError, match="f2: no such metric here; there are entities, f1"):
        check_bounds([Bound("f1", ">=", 0), Bound("f2", ">=", 0)], ("f1", "entities"))


def test_min_f1_and_require_are_one_list():
    parser = argparse.ArgumentParser()
    add_gates(parser, min_f1=True)
    assert parser.parse_args([]).require == []
    given = parser.parse_args(["--require", "cer<=0.1", "--min-f1", "0.84", "--require", "f1>=0.2"]).require
    assert given == [Bound("cer", "<=", 0.1), Bound("f1", ">=", 0.84), Bound("f1", ">=", 0.2)]
