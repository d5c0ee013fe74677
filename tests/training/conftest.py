"""The check of a launcher's line."""

import subprocess
import sys

import pytest


@pytest.fixture
def preflight(tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "prunekit.training.preflight", "--out", tmp_path / "out", *arguments]
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)

    return run
