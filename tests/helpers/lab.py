"""Launchers as a user runs them, with a stub in ms-swift's place (stub_swift.py)."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from helpers.paths import ROOT
from PIL import Image
from safetensors.numpy import save_file

TRAINERS = ["full_run.sh", "distil.sh", "lora.sh", "rl_run.sh"]
LAUNCHERS = [*TRAINERS, "export_lora.sh"]
STUB = ROOT / "tests/helpers/stub_swift.py"
# What nvidia-smi says on a machine without a working driver goes to its standard output.
NVIDIA_SMI = """#!/bin/sh
[ -n "$STUB_GPUS" ] || { echo "NVIDIA-SMI has failed because it couldn't communicate with the driver"; exit 9; }
for gpu in $(seq 0 $((STUB_GPUS - 1))); do echo "$gpu, ${STUB_MEMORY:-81559}"; done
"""
# Pictures are half of what a launcher takes here: a lab draws them where STUB_DRAWS is set.
PYTHON = f"""#!/bin/sh
[ "$2" != prunekit.report ] || [ -n "$STUB_DRAWS" ] || exit 0
exec {sys.executable} "$@"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition, seconds: float = 60):
    """The first true value of condition()."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def values(argv: list[str], flag: str) -> list[str]:
    """The values of the last occurrence of a flag, which is the one that counts."""
    begin = len(argv) - argv[::-1].index(flag)
    end = next((i for i in range(begin, len(argv)) if argv[i].startswith("--")), len(argv))
    return argv[begin:end]


def processes_with(setting: str) -> list[int]:
    """Every running process with this NAME=VALUE in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if setting.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


class Lab:
    """A folder with data and an environment whose `swift` is the stub; runs launchers there."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.calls_file = folder, folder / "calls.jsonl"
        self.out, self.work = folder / "ckpt" / "out", folder / "ckpt" / "out.run"
        executable(folder / "env/bin/swift", f'#!/bin/sh\nexec {sys.executable} -SE {STUB} "$@"\n')
        executable(folder / "env/bin/nvidia-smi", NVIDIA_SMI)
        executable(folder / "env/bin/python", PYTHON)
        Image.new("RGB", (56, 28)).save(folder / "image.png")
        row = {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}],
            "images": ["image.png"],
            "solution": "a",
        }
        for name in ("train", "val"):
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        for package in ("deepspeed", "vllm", "liger_kernel"):  # as on a machine with GPUs: the stub uses none
            (folder / "packages" / package).mkdir(parents=True)
        (folder / "adapter").mkdir()
        (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
        save_file({"x": np.zeros(1, np.float32)}, folder / "adapter/adapter_model.safetensors")
        self.env = {
            "PATH": f"{folder}/env/bin:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": f"{ROOT}:{folder}/packages",  # this checkout's prunekit, wherever the installed one is
            "VIRTUAL_ENV": f"{folder}/env",
            "OMP_NUM_THREADS": "1",
            "STUB_CALLS": str(self.calls_file),
            "MODEL": str(model),
            "TEACHER": str(model),
            "ADAPTER": "adapter",
            "DATASET": "train.jsonl",
            "CHORD_DATASET": "train.jsonl",
            "VAL_DATASET": "val.jsonl",
            "OUTPUT": "ckpt/out",
            "TRYOUT": "0",  # of rewards, which takes seconds
            "MEMORY": "0",  # of the training, which does, too
        }

    def start(self, launcher: str, *arguments: object, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / launcher, *map(str, arguments)],
            cwd=self.folder,
            env=self.env | {k: str(v) for k, v in env.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest is in background
        )

    def run(self, launcher: str, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        process = self.start(launcher, *arguments, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def until_hanging(self, launcher: str, *arguments: object, times: int = 1, **env: str) -> subprocess.Popen:
        """Start a launcher and return when its trainer (or server) hangs at the step asked for."""
        process = self.start(launcher, *arguments, **env)
        wait_for(lambda: process.poll() is not None or len(self.calls(event="hang")) == times)
        assert process.poll() is None, process.communicate()
        return process

    def calls(self, kind: str | None = None, event: str = "start") -> list[dict]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        calls = [json.loads(line) for line in lines]
        return [c for c in calls if c["event"] == event and kind in (None, c["argv"][0])]

    def left(self) -> list[int]:
        """Every process that a launcher of this lab started and that is still running."""
        return processes_with(f"STUB_CALLS={self.calls_file}")


def check_flags(parser, argv: list[str]) -> None:
    """Every flag is a field by its full name, and every value has its type and is one of its choices."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    assert not [flag for flag in flags if flag not in parser._option_string_actions]
    _, rest = parser.parse_known_args(argv)
    assert not rest
