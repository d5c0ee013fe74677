"""The command line that a script leaves in the folder it writes."""

import subprocess
import sys

import pytest

from prunekit.errors import quoted


@pytest.mark.parametrize(
    "words, line",
    [
        (["a b.py", "--text", "3 4"], "'a b.py' --text '3 4'"),
        (["--hub_token", "hf_x", "--out", "o"], "--hub_token '***' --out o"),
        (["--api-key=x", "y"], "--api-key='***' y"),
        (["--max-new-tokens", "3", "--teacher", "t"], "--max-new-tokens 3 --teacher t"),
    ],
)
def test_a_command_line_is_quoted_and_keeps_no_secrets(words, line):
    assert quoted(words) == line


def test_only_a_script_has_a_command():
    code = (
        "from prunekit import errors; print(errors.command); errors.run_script(lambda: print(errors.command))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    before, *after = done.stdout.splitlines()
    assert before == "None" and after[0].startswith("# run in ") and after[1].startswith("python -c ")
