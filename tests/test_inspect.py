"""What a checkpoint is, said by its folder."""

import json

from helpers.checkpoints import copy_whole

from prunekit.checkpoint import statistics


def test_inspect_prints_numbers_and_history(tiny, tmp_path, script):
    out = copy_whole(tiny("qwen3_vl"), tmp_path / "out")
    shown = script("prunekit.inspect", out)
    assert shown.returncode == 0 and "vision blocks" in shown.stdout and "copy" in shown.stdout
    told = json.loads(script("prunekit.inspect", out, "--json").stdout)
    assert told["parameters"] == statistics(out)["parameters"] and told["history"][0]["stage"] == "copy"


def test_inspect_ends_with_one_line_on_bad_input(tmp_path, script):
    done = script("prunekit.inspect", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
