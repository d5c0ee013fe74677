"""Folders of work in progress: one at a time, of one set of settings, and nobody else's."""

import errno
import fcntl
import json

import pytest

from prunekit.checkpoint.work_folder import claim_folder
from prunekit.errors import PruneKitError


def test_a_claim_makes_the_folder_and_writes_its_settings(tmp_path):
    with claim_folder(tmp_path / "a" / "b", {"x": 1}, "scan"):
        pass
    assert json.loads((tmp_path / "a" / "b" / "settings.json").read_text()) == {"x": 1}


def test_the_same_settings_claim_it_again(tmp_path):
    with claim_folder(tmp_path / "a", {"x": [1, None]}, "scan"):
        pass
    with claim_folder(tmp_path / "a", {"x": [1, None]}, "scan"):
        pass


def test_other_settings_are_refused_and_change_nothing(tmp_path):
    with claim_folder(tmp_path / "a", {"x": 1}, "scan"):
        pass
    with pytest.raises(PruneKitError, match="other settings"), claim_folder(tmp_path / "a", {"x": 2}, "scan"):
        pass
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"x": 1}


def test_two_at_a_time_are_refused(tmp_path):
    with (
        claim_folder(tmp_path / "a", {}, "scan"),
        pytest.raises(PruneKitError, match="another scan"),
        claim_folder(tmp_path / "a", {}, "scan"),
    ):
        pass
    assert (tmp_path / "a" / "settings.json").exists()


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(PruneKitError, match="no file can be locked there"), claim_folder(tmp_path / "a", {}, "scan"):
        pass


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PruneKitError, match="in use"), claim_folder(tmp_path, {}, "scan"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(PruneKitError, match="in use"), claim_folder(tmp_path / "a", {}, "scan"):
        pass


@pytest.mark.parametrize("draft", [".settings.json.new", ".settings.json.4711.new"])
def test_what_a_claim_killed_at_its_start_left_is_taken_over(draft, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    (tmp_path / draft).write_text("{")
    with claim_folder(tmp_path, {"x": 1}, "scan"):
        pass
    assert json.loads((tmp_path / "settings.json").read_text()) == {"x": 1}


def test_a_refusal_within_leaves_no_folder_that_the_claim_made(tmp_path):
    with pytest.raises(PruneKitError, match="no such row"), claim_folder(tmp_path / "a" / "b", {}, "scan"):
        raise PruneKitError("no such row")
    assert not list(tmp_path.iterdir())


def test_a_refusal_within_leaves_an_empty_folder_of_the_user_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(PruneKitError), claim_folder(tmp_path / "mine", {}, "scan"):
        raise PruneKitError("no such row")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_a_refusal_after_work_was_done_keeps_it_for_the_same_settings(tmp_path):
    for _ in range(2):
        with pytest.raises(PruneKitError), claim_folder(tmp_path / "a", {"x": 1}, "scan"):
            (tmp_path / "a" / "records").write_text("1")
            raise PruneKitError("row 7 is bad")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"lock", "settings.json", "records"}


def test_a_refused_claim_of_another_run_s_folder_adds_nothing_to_it(tmp_path):
    (tmp_path / "settings.json").write_text('{"x": 1}')
    with pytest.raises(PruneKitError), claim_folder(tmp_path, {"x": 2}, "scan"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
