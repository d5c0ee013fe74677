"""loop.sh: rounds until the targets are reached, gates that fail, kills, folders put in place by hand, bad settings."""

import json
import shutil
import signal

import pytest
from helpers.cuts import cut_width
from helpers.lab import executable, values, wait_for
from helpers.paths import ROOT

from prunekit.checkpoint import history, statistics


@pytest.fixture
def loop(lab):
    """A lab in which scans, evaluations and fits take no time (helpers/stub_measuring.py)."""
    executable(lab.folder / "stubs/sitecustomize.py", "from helpers.stub_measuring import main\n\nmain()\n")
    lab.env |= {
        "PYTHONPATH": f"{lab.folder}/stubs:{ROOT}:{ROOT}/tests:{lab.folder}/packages",
        "GPUS": "",
        "TARGET_PARAMS": "0.75",
        "WANDB_MODE": "disabled",
    }
    return lab


def scores(**by_end):
    return json.dumps({end.replace("_", "/"): value for end, value in by_end.items()})


def state(lab):
    return json.loads((lab.folder / "ckpt/out.loop/loop.json").read_text())


def scripts(lab):
    """What ran, in order: scripts and launchers' stages."""
    lines = [json.loads(line) for line in lab.calls_file.read_text().splitlines()]
    return [
        line["argv"][1] if line["event"] == "python" and line["argv"][0] == "-m" else line["argv"][0].split("/")[-1]
        for line in lines
        if line["event"] in ("python", "start")
    ]


def test_first(loop):
    result = loop.run("loop.sh")
    print(result.stdout, result.stderr)
    print(scripts(loop))
    print(json.dumps(state(loop), indent=1)[:6000])
    assert result.returncode == 0
