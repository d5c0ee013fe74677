"""The script manual_select.py: what it says, records and refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import load

from prunekit.checkpoint import history, read_json, statistics


def test_script_cuts_prints_sizes_and_records_history(tiny, tmp_path, script):
    model, out = tiny("qwen3_vl"), tmp_path / "out"
    done = script(
        "manual_select.py",
        "--model",
        model,
        "--out",
        out,
        "--text",
        "1,3-4",
        "--vision",
        "3",
        "--drop-taps",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert "tap 1: moves from block 3 to block 2" in done.stdout and "KV bytes/token" in done.stdout
    (entry,) = history(out)
    assert entry["removed"] == {"text": [1, 3, 4], "vision": [3], "taps": [[1, 1], [3, 2], [4, None]]}
    assert entry["parameters_before"] == statistics(model)["parameters"]
    assert entry["parameters"] == statistics(out)["parameters"] == load(out).num_parameters()


def test_the_only_mixture_of_experts_can_go(tiny, tmp_path, script):
    out = tmp_path / "out"
    done = script("manual_select.py", "--model", tiny("qwen3_moe"), "--out", out, "--text", "3")
    assert done.returncode == 0, done.stderr
    [row] = (line.split() for line in done.stdout.splitlines() if line.startswith("experts "))
    assert row == ["experts", "4", "0", "-100.0%"]
    assert statistics(out)["parameters"] == load(out).num_parameters()


def test_script_refuses_a_second_run_and_keeps_the_first(tiny, tmp_path, script):
    arguments = ("--model", tiny("llama"), "--out", tmp_path / "out", "--text")
    assert script("manual_select.py", *arguments, "1").returncode == 0
    again = script("manual_select.py", *arguments, "2")
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {tmp_path}/out: exists; choose another OUT or pass --overwrite\n",
    )
    assert history(tmp_path / "out")[0]["removed"] == {"text": [1]}


def test_script_overwrites_when_told(tiny, tmp_path, script):
    arguments = ("--model", tiny("llama"), "--out", tmp_path / "out", "--overwrite", "--text")
    assert [script("manual_select.py", *arguments, n).returncode for n in "12"] == [0, 0]
    assert history(tmp_path / "out")[0]["removed"] == {"text": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_script_writes_nothing_on_a_dry_run(tiny, tmp_path, script):
    done = script("manual_select.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--text", "1", "--dry-run")
    assert done.returncode == 0 and "nothing written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_script_ends_with_one_line_and_writes_nothing_on_bad_input(tiny, tmp_path, script):
    done = script("manual_select.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--text", "9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --text 9: the model has text layers 0 to 4; number them as in the input\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["--keep-above 0.9", "--max-layers 2", "--max-fraction 0.1", "--independent"])
def test_what_says_how_much_of_a_ranking_is_taken_is_refused_without_one(flags, tiny, tmp_path, script):
    line = ("--model", tiny("llama"), "--out", tmp_path / "out", "--text", "1", *flags.split())
    done = script("manual_select.py", *line)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {flags.split()[0]}: is for --from-ranking; leave it out\n"
    assert list(tmp_path.iterdir()) == []


def test_surgery_does_not_import_torch():
    code = "import sys, manual_select; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_script_warns_in_the_terminal_and_in_the_history(script, tmp_path):
    done = script("manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--text", "1-5")
    assert done.returncode == 0 and done.stderr.startswith("warning: 5 of 8 text layers at once")
    assert history(tmp_path / "out")[-1]["warnings"] == [done.stderr.removeprefix("warning: ").strip()]


def test_its_command_can_be_repeated_from_the_folder(script, tmp_path):
    script("manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "one two", "--text", "3")
    command = tmp_path / "command.sh"
    (tmp_path / "one two" / "command.sh").rename(command)
    shutil.move(tmp_path / "one two", tmp_path / "first")
    subprocess.run(
        ["bash", command],
        cwd=ROOT,
        check=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    first, again = (read_json(tmp_path / name / "config.json") for name in ("first", "one two"))
    assert first == again and (tmp_path / "one two/command.sh").read_text() == command.read_text()
