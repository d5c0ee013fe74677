"""Locks that killed compilations left are removed, and no others."""

import os

from prunekit.training.stale_locks import remove_stale_locks


def test_a_lock_that_a_killed_compilation_left_is_removed(tmp_path):
    lock = tmp_path / "py311_cu130/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    remove_stale_locks(tmp_path)
    assert not lock.exists()


def test_the_lock_of_a_running_compilation_stays(tmp_path):
    lock = tmp_path / "py311_cu130/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    remove_stale_locks(tmp_path)
    os.close(descriptor)
    assert lock.exists()


def test_a_young_lock_stays_where_another_machine_may_hold_it(tmp_path):
    lock = tmp_path / "py311_cu130/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    remove_stale_locks(tmp_path, older=60)
    assert lock.exists()
