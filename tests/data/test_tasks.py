"""What lm-eval finds, as scores of our table."""

import pytest

from prunekit.data.tasks import Tasks, json_object, scores_of


def test_metrics_are_numbers_by_their_makers_names():
    values = {
        "alias": "niah", "768,none": 0.5, "768_stderr,none": "N/A", "4096,none": -1, "4096_stderr,none": "N/A",
        "acc,strict-match": 0.25, "acc_stderr,strict-match": 0.1, "sample_len": 4,
    }  # fmt: skip
    found = scores_of({"niah": values, "group": {"acc,none": 1}}, {"niah": {"original": 500, "effective": 4}})
    assert found == {
        "niah": {"768": 0.5, "acc,strict-match": 0.25, "acc_stderr,strict-match": 0.1, "samples": 4},
        "group": {"acc": 1.0},
    }


def test_a_json_argument_is_an_object():
    assert json_object('{"a": [1]}') == {"a": [1]}
    for text in ("[1]", "1", "{"):
        with pytest.raises(ValueError):
            json_object(text)


def test_nothing_asked_for_is_no_task():
    assert not Tasks(limit=3) and Tasks(("a",)) and Tasks(evalscope=("b",))
