"""quantise.sh, killed and repeated, with stubs in the places of llm-compressor and ms-swift."""

import signal

import pytest
from helpers.lab import executable

from prunekit.checkpoint import history, open_checkpoint

# Copies the weights as they are; hangs before the config says how they are quantised
LLM_COMPRESSOR = """
import json, os, shutil, time
from pathlib import Path

def model_free_ptq(source, folder, config, device):
    for file in Path(source).glob("*.[js]*"):
        shutil.copy(file, folder)
    if "STUB_HANG_AT" in os.environ:
        with Path(os.environ["STUB_CALLS"]).open("a") as calls:
            calls.write(json.dumps({"event": "hang", "argv": ["quantise"]}) + "\\n")
        time.sleep(600)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
"""
SCHEMES = """
def preset_name_to_scheme(name, targets):
    return type("Scheme", (), {"weights": None})

def QuantizationConfig(config_groups, ignore):
    return {"quant_method": "compressed-tensors", "ignore": ignore}
"""


@pytest.fixture(params=["fp8", "bnb"])
def quantising(lab, request):
    """A lab with METHOD and, for ms-swift's, a GPU."""
    executable(lab.folder / "packages/llmcompressor/__init__.py", LLM_COMPRESSOR)
    executable(lab.folder / "packages/compressed_tensors/__init__.py", "")
    executable(lab.folder / "packages/compressed_tensors/quantization.py", SCHEMES)
    lab.env |= {"METHOD": request.param, "GPUS": "0" if request.param == "bnb" else ""}
    return lab


def whole(lab) -> bool:
    found = open_checkpoint(lab.out, quantised=True)
    return "quantization_config" in found.config and history(lab.out)[-1]["settings"]["method"] == lab.env["METHOD"]


def test_a_check_quantises_nothing(quantising):
    before = sorted(quantising.folder.rglob("*"))
    result = quantising.run("quantise.sh", CHECK=1)
    assert result.returncode == 0, result.stderr
    assert sorted(quantising.folder.rglob("*")) == before


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_nothing_that_counts_and_the_same_command_begins_anew(quantising, sent):
    process = quantising.until_hanging("quantise.sh", STUB_HANG_AT="export")
    process.send_signal(sent)
    process.wait(timeout=30)
    assert process.returncode in (143, -sent) and not quantising.out.exists()
    result = quantising.run("quantise.sh")
    assert result.returncode == 0, result.stderr
    assert whole(quantising) and not quantising.left()
    assert [path.name for path in quantising.out.parent.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.parametrize("quantising", ["bnb"], indirect=True)
def test_killed_after_publishing_it_is_only_cleaned_up(quantising):
    quantising.run("quantise.sh", KEEP_RUN=1)
    (quantising.work / "publishing").write_text("none\n")  # as written before the first publishing
    inode = quantising.out.stat().st_ino
    result = quantising.run("quantise.sh")
    assert result.returncode == 0, result.stderr
    assert len(quantising.calls()) == 1 and quantising.out.stat().st_ino == inode and not quantising.work.exists()
