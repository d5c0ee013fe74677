"""What lm-eval finds, as scores of our table."""

from pathlib import Path

import pytest
import requests

from prunekit.data import tasks as module
from prunekit.data.tasks import Tasks, json_object, run_tasks, scores_of
from prunekit.errors import PruneKitError


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


@pytest.mark.parametrize("way", ["lm_eval", "evalscope"])
def test_a_network_that_is_not_there_is_a_users_error_and_nothing_else_is(monkeypatch, way):
    def unreached(*_):
        try:
            raise requests.exceptions.ProxyError("no route\nto the hub")
        except requests.exceptions.ProxyError:
            raise ValueError("couldn't load it") from None

    monkeypatch.setattr(module, f"_by_{way}", unreached)
    with pytest.raises(PruneKitError, match=r"^--\w+ a b: rows that aren't here can't be fetched \(couldn't load it\)"):
        run_tasks(None, Path(), {}, Tasks(**{way: ("a", "b")}))
    monkeypatch.setattr(module, f"_by_{way}", lambda *_: {}[0])
    with pytest.raises(KeyError):
        run_tasks(None, Path(), {}, Tasks(**{way: ("a", "b")}))
