"""Shared fixtures: tiny real models, one per family, saved once a session."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1"
)

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bad_input import Tries, link
from helpers.bad_input import run as run_here
from helpers.lab import Lab
from helpers.paths import ROOT
from helpers.tiny_models import save
from helpers.tiny_taggers import save_tagger, save_tokenizer

from prunekit.checkpoint import open_checkpoint
from prunekit.model.light import light_transformers
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers

# Started with nohup or in the background, these are ignored, and what the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)
transformers = light_transformers()
transformers.utils.logging.disable_progress_bar()
# Loading formats the whole config for a line of a log that nobody reads: of a tiny vision model a third of the time
transformers.PreTrainedConfig.__repr__ = object.__repr__


def pytest_collection_modifyitems(items):
    """Files that take minutes come first: begun last, one would be waited for by one process of two.

    The longest before all; then those of slow tests; of them last what needs packages that CI fetches meanwhile.
    """
    marks: dict[Path, set[str]] = {}
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker("slow")  # so that -m 'not slow' leaves it out
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())

    def place(item) -> int:
        mine = marks[item.path]
        if item.path.name == "test_pipeline.py":
            return 0
        if mine & {"clients", "rehearsal"}:
            return 2
        return 1 if "slow" in mine else 3

    items.sort(key=place)


@pytest.fixture(autouse=True)
def one_thread():
    """What sets more threads for the tests behind it makes two cores spin: a test of 2 seconds took 318."""
    yield
    torch.set_num_threads(1)  # what measures models sets its own number
    assert os.environ.get("OMP_NUM_THREADS") == "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family): the folder of that family's model, made on first use. Read only."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def folder(family: str, **kwargs) -> Path:
        key = family + "-".join(map(str, kwargs.values()))
        if key not in made:
            made[key] = save(family, root / key, **kwargs)
        return made[key]

    return folder


@pytest.fixture
def own(tiny, tmp_path):
    """own(family): a private copy of that folder, to be damaged."""

    def copy(family: str, **kwargs) -> Path:
        return Path(shutil.copytree(tiny(family, **kwargs), tmp_path / f"own-{family}"))

    return copy


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Forty rows of text that the embedded model can be scored on."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"word {i * 7919 % 1000} and {'ab' * (i % 9)}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """Questions and answers."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (n % 3 + 1)}]
        for n in range(1, 13)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def linked(tiny, tmp_path):
    """linked(family): a folder of that family's files as hard links, to be changed by helpers.bad_input.put."""
    return lambda family: link(tiny(family), tmp_path / "model")


@pytest.fixture
def pruned(tiny, tmp_path):
    """A vision model that was cut, with its history."""
    plan = plan_layers(open_checkpoint(tiny("qwen3_vl")), text=[3], vision=[2])
    write_cut(cut_layers(plan), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tries(tmp_path, monkeypatch):
    """Command lines with something wrong, in an empty folder; figures are drawn, not rendered: that takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.touch())
    return Tries(tmp_path)


@pytest.fixture(scope="session")
def tagger(tmp_path_factory):
    """tagger(family): the folder of a tiny token classifier, made on first use. Read only."""
    root, made = tmp_path_factory.mktemp("taggers"), {}

    def folder(family: str):
        if family not in made:
            made[family] = save_tagger(family, root / family)
        return made[family]

    return folder


@pytest.fixture
def plain_trainer(monkeypatch):
    """transformers' own Trainer: ms-swift, once imported, gives every Trainer of the process callbacks of its own."""
    from transformers import trainer, trainer_callback

    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [trainer_callback.DefaultFlowCallback])
    monkeypatch.setattr(trainer, "DEFAULT_PROGRESS_CALLBACK", trainer_callback.ProgressCallback)
    monkeypatch.setattr(trainer, "PrinterCallback", trainer_callback.PrinterCallback)


@pytest.fixture
def speaking(tiny, tmp_path):
    """A GPT-2 of 64 positions with a tokenizer of letters."""
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "gpt2")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def opens():
    """opens(file): what says how often this process has opened the file since."""
    watched: list[tuple[str, list]] = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            for name, times in watched:
                if str(arguments[0]) == name:
                    times.append(event)

    def watch(file: Path):
        times: list[str] = []
        watched.append((str(file), times))
        return lambda: len(times)

    sys.addaudithook(hook)
    yield watch
    watched.clear()  # a hook stays as long as its process


@pytest.fixture
def script():
    """script(name, *args): run a script of the repository as a user does; the finished process."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, name] if name.endswith(".py") else [sys.executable, "-m", name]
        return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def script_here(monkeypatch):
    """As `script`, in this process: where another's start, which takes seconds, is no part of the property."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        code, out, err = run_here(name, *arguments, within=contextlib.nullcontext)
        return subprocess.CompletedProcess([name, *arguments], code, out, err)

    return run


@pytest.fixture
def lab(tmp_path, tmp_path_factory, tiny):
    lab = Lab(tmp_path, tiny("qwen3_vl"))
    lab.env["MPLCONFIGDIR"] = str(tmp_path_factory.getbasetemp() / "matplotlib")  # its list of fonts takes seconds
    yield lab
    for pid in lab.left():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def clients():
    """The programs of an environment with vLLM and mergekit, which is made on first use (minutes)."""
    done = subprocess.run(["bash", "lib/rehearsal.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(" ".join(done.stderr.splitlines()[-2:]))
    assert done.returncode == 0, done.stderr
    return ROOT / ".venv-rehearsal/bin"
