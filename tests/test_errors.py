"""The command line that a script leaves in the folder it writes."""

import subprocess
import sys

import pytest
from conftest import ROOT

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


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("kv_cut.py", ["--kv-heads", "1"]),
        ("width_cut.py", ["--neuron-share", "0.5"]),
        ("sparsify.py", ["--sparsity", "0.5"]),
    ],
)
def test_every_surgery_script_leaves_a_card_and_its_command_line(name, arguments, script, tiny, tmp_path):
    done = script(name, "--model", tiny("llama"), "--out", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    place, line = (tmp_path / "out/command.sh").read_text().splitlines()
    assert line == f"python {name} --model {tiny('llama')} --out {tmp_path / 'out'} {' '.join(arguments)}"
    assert place == f"# run in {ROOT}" and (tmp_path / "out/README.md").is_file()
