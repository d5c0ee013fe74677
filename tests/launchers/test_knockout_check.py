"""Trained knockouts by knockout_check.sh, side by side and on a cluster."""

import sys

import pytest
from helpers.lab import executable, values


@pytest.fixture
def knockouts(lab):
    """knockouts(what, **env): the arguments of a sweep without a scan, or of a scan, neither of which is run."""
    tell = f'printf "%s\\n" "$@" > "{lab.folder}/$2"'
    executable(
        lab.folder / "env/bin/python",
        f'#!/bin/sh\ncase "$2" in\nprunekit.scan | *.sweep) {tell} ;;\n*) exec {sys.executable} "$@" ;;\nesac\n',
    )

    def run(what: str = "prunekit.knockout.sweep", MODE: str = "train", **env: str) -> list[str]:
        result = lab.run("knockout_check.sh", MODE=MODE, **env)
        assert result.returncode == 0, result.stderr
        return (lab.folder / what).read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("here", "of_a_task", "dtype", "deepspeed"),
    [("0,1,2,3", "1", "bfloat16", True), ("", "2", "bfloat16", True), ("0,1", "0", "float32", False)],
)
def test_trainings_on_a_cluster_are_told_of_their_gpus_and_not_of_those_here(
    knockouts, here, of_a_task, dtype, deepspeed
):
    argv = knockouts(GPUS=here, GPUS_PER_TASK=of_a_task, RAY_ADDRESS="10.0.0.1:6379")
    assert values(argv, "--torch_dtype") == [dtype]
    assert ("--deepspeed" in argv) == deepspeed and ("--use_cpu" in argv) != deepspeed
    batch, accumulation = (
        int(values(argv, flag)[0]) for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    )
    assert batch * accumulation * max(1, int(of_a_task)) == 16


@pytest.mark.parametrize("jobs", ["1", "2", "4"])
def test_knockouts_side_by_side_have_the_rows_of_one_alone(knockouts, jobs):
    argv = knockouts(GPUS="0,1,2,3", JOBS=jobs)
    batch, accumulation = (
        int(values(argv, flag)[0]) for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    )
    assert batch * accumulation * (4 // int(jobs)) == 16


def test_a_scan_computes_in_the_dtype_that_is_set(knockouts):
    assert values(knockouts("prunekit.scan", MODE="scan", DTYPE="float32", GPUS=""), "--dtype") == ["float32"]


@pytest.mark.parametrize(("settings", "best"), [({}, []), ({"RACE": "1"}, ["20"]), ({"GENERATE": "9"}, ["20"])])
def test_a_whole_scan_goes_on_whatever_number_of_finalists_is_wanted(knockouts, settings, best):
    argv = knockouts("prunekit.scan", MODE="scan", GPUS="", FINALISTS="20", **settings)
    assert ("--best" in argv and values(argv, "--best") or []) == best


def test_a_restart_removes_no_folder_that_holds_more_than_a_sweep(lab):
    mine = lab.folder / "runs/recovered/model.safetensors"
    for folder in (mine.parent, lab.folder / "runs/scan"):
        folder.mkdir(parents=True)
    mine.write_text("mine")
    result = lab.run("knockout_check.sh", OUTPUT="runs", RESTART="1", GPUS="")
    assert (result.returncode, "no sweep of knockouts" in result.stderr) == (2, True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("mode", "holds", "said"),
    [
        ("train", ["scan"], "holds a scan, whose finalists MODE=all trains"),
        ("train", ["scan", "trained"], "holds a scan, whose finalists MODE=all trains"),
        ("all", ["trained"], "holds trainings that its ranking would lose"),
        ("scan", ["trained"], "holds trainings that its ranking would lose"),
        ("scan", ["scan", "trained"], "holds trainings that its ranking would lose"),
    ],
)
def test_a_mode_does_not_go_on_where_another_has_been(lab, mode, holds, said):
    """A sweep trains a scan's finalists only, whatever MODE says, and writes its ranking of what it trained."""
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    for name in holds:
        (lab.out / name).mkdir(parents=True)
        (lab.out / name / "settings.json").touch()
    result = lab.run("knockout_check.sh", MODE=mode, GPUS="")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"MODE={mode}: ckpt/out {said}" in result.stderr


@pytest.mark.parametrize(("mode", "holds"), [("train", "trained"), ("scan", "scan"), ("all", "scan")])
def test_a_mode_goes_on_where_it_has_been(lab, mode, holds):
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    (lab.out / holds).mkdir(parents=True)
    (lab.out / holds / "settings.json").touch()
    assert lab.run("knockout_check.sh", MODE=mode, GPUS="").returncode == 9


def test_an_empty_folder_for_trainings_is_none(lab):
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    for name in ("scan", "trained/runs"):
        (lab.out / name).mkdir(parents=True)
    assert lab.run("knockout_check.sh", MODE="scan", GPUS="").returncode == 9
