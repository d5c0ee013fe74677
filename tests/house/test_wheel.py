"""What a built wheel can do by itself, without a checkout beside it."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("prunekit-*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder / "site", wheel], check=True)
    return wheel, folder / "site"


def run(site, cwd, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_wheel_holds_every_plugin(installed):
    held = {name for name in zipfile.ZipFile(installed[0]).namelist() if name.startswith("prunekit/plugins/")}
    assert held == {f"prunekit/plugins/{file.name}" for file in (ROOT / "plugins").glob("*.py")}


@pytest.mark.slow
def test_a_wheel_evaluates_on_messages_from_anywhere(installed, tmp_path):
    _, site = installed
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = run(
        site, tmp_path, "-m", "prunekit.evaluate", "--model", ROOT / "examples/tiny_ocr/model",
        "--dataset", "rows.jsonl", "--json", "scores.json", "--no-generate",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"token_acc"' in (tmp_path / "scores.json").read_text()
    where = run(site, tmp_path, "-c", "import prunekit; print(prunekit.PLUGINS)").stdout.strip()
    assert where == str(site / "prunekit" / "plugins")


@pytest.mark.slow
def test_a_wheels_distillation_trainer_is_where_the_plugin_says(installed, tmp_path):
    _, site = installed
    code = """
import importlib.util, prunekit
from swift.trainers.trainer_factory import TrainerFactory
spec = importlib.util.spec_from_file_location("distillation", prunekit.PLUGINS / "distillation.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(importlib.util.find_spec(TrainerFactory.TRAINER_MAPPING["gkd"].rpartition(".")[0]).origin)
"""
    done = run(site, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(site / "prunekit" / "training" / "distillation_trainer.py")
