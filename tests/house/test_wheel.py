"""What a built wheel can do by itself: from another folder, with no file of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import EMBEDDED, ROOT

# Every process of a test: an own prunekit, and none that opens a file of the checkout
WATCH = f"""
import sys

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith({f"{ROOT}/"!r}) and "/.venv/" not in str(arguments[0]):
        raise RuntimeError(f"{{arguments[0]}} is of the checkout")

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("prunekit-*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder / "site", wheel], check=True)
    (folder / "site/sitecustomize.py").write_text(WATCH)
    return wheel, folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """run(*arguments): Python with the wheel alone, in a folder with a model, a script and rows of messages."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    shutil.copy(ROOT / "kv_cut.py", tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"ab{n}"}]} for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed[1])}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_wheel_holds_every_plugin(installed):
    held = {name for name in zipfile.ZipFile(installed[0]).namelist() if name.startswith("prunekit/plugins/")}
    assert held == {f"prunekit/plugins/{file.name}" for file in (ROOT / "plugins").glob("*.py")}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("-m prunekit.evaluate --model model --dataset rows.jsonl --json out --max-new-tokens 3", "out"),
        ("-m prunekit.scan --model model --dataset rows.jsonl --out out --vision none --generate 2", "out/scan.json"),
        ("kv_cut.py --model model --calib rows.jsonl --kv-heads 1 --out out", "out/model.safetensors"),
    ],
    ids=["evaluate", "scan", "kv_cut"],
)
def test_a_wheel_works_on_messages_from_anywhere(run, tmp_path, line, written):
    run(*line.split())
    assert (tmp_path / written).is_file()


@pytest.mark.slow
@pytest.mark.ci
def test_a_wheel_trains_without_a_layer(run, tmp_path):
    line = (
        "-m prunekit.knockout.sweep --model model --out out --text 3 --vision none -- --use_cpu true --tuner_type full"
    )
    line += " --torch_dtype float32 --fp16 false --bf16 false --gradient_checkpointing false --report_to none"
    line += " --dataset rows.jsonl --val_dataset rows.jsonl --max_steps 2 --eval_steps 2 --add_version false"
    line += " --dataloader_num_workers 0"
    run(*line.split())
    record = json.loads((tmp_path / "out/trained/runs/text-03.json").read_text())
    assert record["error"] is None and record["curve"]


@pytest.mark.ci
def test_a_wheels_plugins_register_what_is_in_it(installed, run):
    folder = installed[1] / "prunekit" / "plugins"
    code = f"""
import importlib.util, sys
from swift.callbacks import callbacks_map
from swift.trainers.trainer_factory import TrainerFactory
from prunekit.msswift.extend import load_plugins
load_plugins(["{folder}/distillation.py", "{folder}/knockout_layers.py"])
trainer = TrainerFactory.TRAINER_MAPPING["gkd"].rpartition(".")[0]
for name in (trainer, callbacks_map["knockout_layers"].__module__):
    print(importlib.util.find_spec(name).origin)
"""
    site = installed[1] / "prunekit"
    expected = [str(site / "training/distillation_trainer.py"), str(site / "knockout/callback.py")]
    assert run("-c", code).splitlines()[-2:] == expected
