"""How a script ends, and the command line that it leaves in the folder it writes."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT

from prunekit.errors import PruneKitError, quoted, run_script


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
    code = "from prunekit import errors; print(errors.command); errors.run_script(lambda: print(errors.command))"
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


def ended(main, capsys) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code, capsys.readouterr().err.splitlines()


def failing(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS])
def test_an_error_of_a_named_file_is_one_line(code, capsys):
    ending = ended(failing(OSError(code, os.strerror(code), "data/x")), capsys)
    assert ending == (2, [f"error: data/x: {os.strerror(code)}"])


def test_a_full_disk_is_one_line_though_no_file_is_named(capsys):
    code, lines = ended(failing(OSError(errno.ENOSPC, "No space left on device")), capsys)
    assert (code, len(lines)) == (2, 1) and "the disk is full; make room" in lines[0]


def test_a_name_that_is_not_utf8_is_one_line(capsys):
    def main():
        os.fsdecode(b"caf\xe9").encode()

    assert ended(main, capsys) == (2, ["error: 'caf\\udce9': not UTF-8; write or name it so"])


def test_a_name_of_several_lines_is_one_line(capsys):
    code, lines = ended(failing(PruneKitError("a\nb\x1b[31m\u2028c: no such folder")), capsys)
    assert (code, lines) == (2, ["error: a b [31m c: no such folder"])


def test_brackets_in_brackets_are_one_line_where_json_is_read(capsys):
    code, lines = ended(lambda: json.loads("[" * 100_000), capsys)
    assert (code, len(lines)) == (2, 1)


def test_a_full_gpu_is_one_line_that_says_what_to_lower(capsys):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB. Of these ..."
    code, lines = ended(failing(torch.OutOfMemoryError(said)), capsys)
    assert (code, len(lines)) == (2, 1)
    assert "Tried to allocate 2.00 GiB" in lines[0] and "lower --batch-size" in lines[0]


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), OSError("no name"), RecursionError("ours"), UnicodeEncodeError("ascii", "é", 0, 1, "x")],
)
def test_a_fault_of_ours_is_a_traceback_and_asks_for_a_report(error, capsys):
    code, lines = ended(failing(error), capsys)
    assert code == 1 and lines[0].startswith("Traceback") and "please report it" in lines[-1]


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from prunekit.errors import run_script; run_script(lambda: print('x\\n' * 100_000))"
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, code],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x\n", "", 141)
