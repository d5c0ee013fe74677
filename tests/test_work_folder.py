"""Folders of work in progress: one at a time, of one set of settings, and nobody else's."""

import fcntl
import json

import pytest

from prunekit.errors import PruneKitError
from prunekit.work_folder import claim_folder


def test_a_claim_makes_the_folder_and_writes_its_settings(tmp_path):
    claim_folder(tmp_path / "a" / "b", {"x": 1}, "scan").close()
    assert json.loads((tmp_path / "a" / "b" / "settings.json").read_text()) == {"x": 1}


def test_the_same_settings_claim_it_again(tmp_path):
    claim_folder(tmp_path / "a", {"x": [1, None]}, "scan").close()
    claim_folder(tmp_path / "a", {"x": [1, None]}, "scan").close()


def test_other_settings_are_refused_and_change_nothing(tmp_path):
    claim_folder(tmp_path / "a", {"x": 1}, "scan").close()
    with pytest.raises(PruneKitError, match="other settings"):
        claim_folder(tmp_path / "a", {"x": 2}, "scan")
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"x": 1}


def test_two_at_a_time_are_refused(tmp_path):
    with claim_folder(tmp_path / "a", {}, "scan"), pytest.raises(PruneKitError, match="another scan"):
        claim_folder(tmp_path / "a", {}, "scan")


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PruneKitError, match="in use"):
        claim_folder(tmp_path, {}, "scan")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(PruneKitError, match="in use"):
        claim_folder(tmp_path / "a", {}, "scan")


def test_what_a_claim_killed_at_its_start_left_is_taken_over(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    (tmp_path / ".settings.json.new").write_text("{")
    claim_folder(tmp_path, {"x": 1}, "scan").close()
    assert json.loads((tmp_path / "settings.json").read_text()) == {"x": 1}
