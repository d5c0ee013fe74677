"""lib/setup.sh on machines that aren't here: nvidia-smi is a stub, and so is .venv's Python, which installs nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

# pip is the real one, with the flags that setup gives it, for a package that is here already
PYTHON = f"""#!/bin/sh
case "$*" in
  *"pip --version") ;;
  *pip*install*) words="$*"; echo "$words" >> pip.log
    exec {sys.executable} ${{words%%off *}}off --dry-run --no-index --find-links file:///nowhere --upgrade pip ;;
  -) cat > /dev/null ;;
  *sysconfig*) pwd ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def setup(folder: Path, driver: str, capability: str = "9.0", venv: bool = True, **env: str):
    """lib/setup.sh in a repository at `folder` with nothing else in it, on a machine with such a GPU."""
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    programs = {"bin/nvidia-smi": f"#!/bin/sh\necho 'NVIDIA X, {driver}, {capability}'\n"}
    if venv:
        programs[".venv/bin/python"] = PYTHON
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHON": sys.executable} | env
    return subprocess.run(["bash", "lib/setup.sh"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def without_cuda(tmp_path_factory):
    """A setup for a GPU whose CUDA doesn't work, as the user asked for: its folder and how it ended."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, setup(folder, "535.183.01", DEVICE="gpu")


@pytest.mark.parametrize("driver, capability", [("535.183.01", "9.0"), ("580.65.06", "7.0")])
def test_what_cuda_13_cant_use_is_refused_in_one_line(tmp_path, driver, capability):
    done = setup(tmp_path, driver, capability, venv=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert driver in line and "580" in line and "DEVICE=cpu" in line


def test_an_old_driver_is_refused_before_anything_is_made(tmp_path):
    setup(tmp_path, "535.183.01", venv=False)
    assert not (tmp_path / ".venv").exists()


def test_an_old_driver_is_tried_where_the_user_says_so(without_cuda):
    assert ".[gpu,test]" in (without_cuda[0] / "pip.log").read_text()


def test_cuda_that_doesnt_work_is_an_error_that_names_the_driver(without_cuda):
    done = without_cuda[1]
    assert done.returncode == 2 and "needs an NVIDIA driver of 580" in done.stderr.splitlines()[-1]


def test_cuda_that_doesnt_work_is_looked_at_again_by_the_next_setup(without_cuda):
    assert not list(without_cuda[0].glob(".venv/.complete-*"))


def test_pip_says_nothing_of_locations_that_it_ignores(tmp_path):
    done = setup(tmp_path, "", DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def ci(tmp_path):
    """ci(setup, rehearsal, test): .ci/run, whose three steps end with these codes; what ran, and the exit code."""

    def run(*codes: int) -> tuple[list[str], int]:
        shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
        for name, code in zip(["lib/setup.sh", "lib/rehearsal.sh", "test.sh"], codes, strict=True):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*"\nexit {code}\n')
            (tmp_path / name).chmod(0o755)
        done = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True)
        return done.stdout.splitlines(), done.returncode

    return run


def test_ci_runs_the_readmes_command_with_what_that_leaves_out(ci):
    ran, code = ci(0, 0, 0)
    assert ran[0].strip() == "lib/setup.sh" and code == 0
    assert {line.strip() for line in ran[1:]} == {"lib/rehearsal.sh", "test.sh -m"}


@pytest.mark.parametrize("codes", [(1, 0, 0), (0, 2, 0), (0, 0, 1)])
def test_ci_fails_where_any_of_its_parts_does(ci, codes):
    assert ci(*codes)[1] != 0


def test_the_readmes_command_leaves_the_clients_out():
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/launchers/test_clients.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5 and "deselected" in done.stdout  # 5: nothing to run
