"""The script sparsify.py: what it writes, draws and refuses."""

import json
import runpy

import pytest
from helpers.cuts import sparsify
from helpers.paths import ROOT
from helpers.tiny_models import load

from prunekit.checkpoint import history

BY_RANKING = ("--layer-importance", "knockout", "--ranking", "absent")


def test_the_script_writes_a_checkpoint_and_its_story(script_here, tiny, tmp_path):
    done = script_here("sparsify.py", "--model", tiny("camembert"), "--out", tmp_path / "out", "--sparsity", 0.15)
    assert done.returncode == 0, done.stderr
    assert "15.00%" in done.stdout and "save neither space nor time" in done.stdout
    [entry] = history(tmp_path / "out")
    assert entry["settings"]["sparsity"] == 0.15 and entry["removed"]["weights"] == entry["sparsity"]["zeros"]
    assert load(tmp_path / "out").num_parameters() == entry["parameters"]


def test_a_dry_run_writes_nothing(script_here, tiny, tmp_path):
    done = script_here(
        "sparsify.py", "--model", tiny("llama"), "--out", tmp_path / "out", "--pattern", "2:4", "--dry-run"
    )
    assert done.returncode == 0 and "50.00%" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --sparsity, --threshold and --pattern"),
        (["--sparsity", "0.5", "--threshold", "1"], "one of --sparsity, --threshold and --pattern"),
        (["--sparsity", "1.5"], "--sparsity 1.5: a share"),
        (["--sparsity", "nan"], "--sparsity: 'nan' is no number"),
        (["--threshold", "-1"], "--threshold -1.0: a positive number"),
        (["--pattern", "4:2"], "--pattern 4:2: write it N:M"),
        (["--pattern", "3:5"], "don't divide into groups of 5"),
        (["--sparsity", "0.5", "--modules", "nothing"], "--modules 'nothing': matches no weight"),
        (["--sparsity", "0.5", "--modules", "("], "not a regular expression"),
        (["--sparsity", "0.5", "--score", "wanda"], "needs data: --calib"),
        (["--sparsity", "0.5", "--calib", "x.jsonl"], "need no data; leave it out"),
        (["--sparsity", "0.5", "--layer-importance", "knockout"], "need each other"),
        (["--sparsity", "0.5", "--layer-importance", "knockout", "--ranking", "absent"], "absent: no such file"),
        (["--threshold", "1", "--scope", "row"], "--scope says how a --sparsity is shared out"),
        (
            ["--sparsity", "0.5", "--scope", "global", "--layer-importance", "gradient", "--calib", "x"],
            "--scope layer",
        ),
        (["--sparsity", "0.5", "--score", "wanda", "--calib", "absent.jsonl"], "absent.jsonl is not there"),
        (["--sparsity", "0.5", "--power", "0", *BY_RANKING], "--power 0.0: a positive number"),
        (["--sparsity", "0.5", "--max-sparsity", "2", *BY_RANKING], "--max-sparsity 2.0: a share"),
        (["--sparsity", "0.5", "--power", "2"], "--power, --max-sparsity: say how --layer-importance shares out"),
        (["--sparsity", "0.5", "--max-sparsity", "0.8"], "--layer-importance shares out; give it, too"),
    ],
)
def test_bad_wishes_are_one_line_and_exit_2(arguments, message, tiny, tmp_path, monkeypatch, capsys):
    command = ["sparsify.py", "--model", str(tiny("llama")), "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "sparsify.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_less_than_what_is_zero_already_is_refused(script_here, tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "one", sparsity=0.5)
    done = script_here("sparsify.py", "--model", tmp_path / "one", "--out", tmp_path / "two", "--sparsity", 0.4)
    assert done.returncode == 2 and "50.00% are zero already" in done.stderr and not (tmp_path / "two").exists()


def test_pictures_of_zeros_are_drawn_from_the_history(script_here, tiny, tmp_path):
    sparsify(tiny("qwen3_vl"), tmp_path / "out", sparsity=0.5)
    events = [{"sparsity": s, "before": 2.0, "after": 3.0, "retrained": 2.2} for s in (0.3, 0.6)]
    (tmp_path / "out/sparsity.json").write_text(json.dumps({"metric": "loss", "events": events}))
    done = script_here("prunekit.report.__main__", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name in ("sparsity.png", "quality.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
