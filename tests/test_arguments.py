"""Command lines: numbers that are none, devices that aren't there, files that can't be written."""

import subprocess
import sys

import pytest
from helpers.paths import ROOT

from prunekit import arguments
from prunekit.arguments import Parser
from prunekit.errors import PruneKitError


def parse(kind, value):
    parser = Parser(description="test")
    parser.add_argument("--flag", type=getattr(arguments, kind))
    return parser.parse_args([f"--flag={value}"]).flag


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("positive_int", "1", 1), ("natural", "0", 0), ("finite_float", "-1e3", -1000.0),
        ("positive_float", "0.5", 0.5),
        ("share", "1", 1.0), ("device", "cpu", "cpu"),
    ],
)  # fmt: skip
def test_what_a_flag_takes_is_taken(kind, value, expected):
    assert parse(kind, value) == expected


@pytest.mark.parametrize(
    "kind, value",
    [
        *(("positive_int", v) for v in ("0", "-1", "x", "", "1.5", "1e3", "nan", "9" * 5000, "9" * 30)),
        *(("natural", v) for v in ("-1", "x", "0.0", "9" * 30)),
        *(("finite_float", v) for v in ("nan", "inf", "-inf", "1e400", "x", "")),
        *(("positive_float", v) for v in ("0", "-0.5", "nan")),
        *(("share", v) for v in ("0", "-0.1", "1.01", "nan", "1e400")),
        *(("device", v) for v in ("", "gpu", "cuda:99", "cpu:x", "meta")),
        *(("new_file", v) for v in ("/nowhere/at/all.json", "/")),
    ],
)
def test_what_it_doesn_t_take_is_refused_in_one_line_that_names_the_flag(kind, value):
    with pytest.raises(PruneKitError) as refused:
        parse(kind, value)
    assert str(refused.value).startswith("argument --flag: ") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_bad_command_line_is_one_line_without_the_usage(script_here):
    done = script_here("prunekit.scan", "--modle", "x")
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")


def test_a_file_can_be_written_where_its_folder_is(tmp_path):
    assert parse("new_file", tmp_path / "new.json") == tmp_path / "new.json"


@pytest.mark.parametrize("words", [["-m", "prunekit.inspect"], ["-m", "prunekit.loop"], ["kv_cut.py"]])
def test_help_names_a_command_as_it_is_called(words):
    shown = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.startswith(f"usage: {'' if words[0] != '-m' else 'python '}{' '.join(words)} ")
