"""Jobs for Slurm, with a `srun` and a `scontrol` in their places: what each node gets, and a job that is requeued."""

import shutil
import signal
import subprocess

import pytest
from helpers.lab import executable, wait_for
from helpers.paths import ROOT

SRUN = """#!/bin/bash
echo "$@" >> "$SLURM_FAKE/srun"
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for rank in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_STEP_NUM_NODES=$SLURM_NNODES SLURM_NODEID=$rank "$@" &
done
code=0
for child in $(jobs -p); do wait "$child" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_FAKE/scontrol"
[ "$1" != show ] || printf 'first\\nsecond\\n'
"""


@pytest.fixture
def slurm(lab):
    """slurm(job, *arguments, nodes, **env): a job started as Slurm would, on its first node."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        executable(lab.folder / "env/bin" / name, text)
    settings = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(lab.folder)}
    lab.env |= settings | {"SLURM_FAKE": str(lab.folder), "PRUNEKIT": str(ROOT), "GPUS": ""}

    def start(job, *arguments, nodes=1, **env):
        return lab.start(f"examples/slurm/{job}", *arguments, SLURM_NNODES=nodes, **env)

    return start


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def test_each_node_of_a_training_knows_its_place_and_the_first_one_publishes(slurm, lab):
    finish(slurm("nodes.sbatch", "full_run.sh", "--max_steps", 7, nodes=2, STUB_MEET=1))
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    places = {tuple(call["env"][name] for name in names) for call in lab.calls("sft")}
    assert places == {("2", "0", "first", "21234"), ("2", "1", "first", "21234")}
    assert all("--max_steps 7" in " ".join(call["argv"]) for call in lab.calls("sft"))
    assert lab.out.exists() and "--ntasks-per-node=1" in (lab.folder / "srun").read_text()


def test_jobs_ask_for_cpus_and_what_they_start_on_nodes_has_them(slurm, lab):
    jobs = [job.read_text() for job in (ROOT / "examples/slurm").glob("*.sbatch")]
    assert len(jobs) == 3 and all("\n#SBATCH --cpus-per-task=" in job for job in jobs)
    finish(slurm("nodes.sbatch", "full_run.sh", nodes=2, STUB_MEET=1, SLURM_CPUS_PER_TASK=64))
    assert {call["env"]["SRUN_CPUS_PER_TASK"] for call in lab.calls("sft")} == {"64"}


def test_a_job_whose_time_is_up_is_requeued_and_goes_on(slurm, lab):
    process = slurm("train.sbatch", "full_run.sh", STUB_HANG_AT=3)
    wait_for(lambda: lab.calls(event="hang"))
    process.send_signal(signal.SIGUSR1)
    finish(process)
    assert (lab.folder / "scontrol").read_text() == "requeue 41234\n" and not lab.out.exists()
    wait_for(lambda: not lab.left())
    finish(slurm("train.sbatch", "full_run.sh"))
    assert "--resume_from_checkpoint" in lab.calls("sft")[1]["argv"] and lab.out.exists()
    again = slurm("train.sbatch", "full_run.sh", SLURM_RESTART_COUNT="1")
    assert "is there already" in finish(again), "a turn too many does no harm"
    assert len(lab.calls("sft")) == 2
    finish(slurm("train.sbatch", "full_run.sh", "--overwrite"))
    assert len(lab.calls("sft")) == 3, "a first turn is told what to do"


def test_what_a_job_is_to_overwrite_is_not_taken_for_its_result(slurm, lab):
    lab.run("full_run.sh", GPUS="")
    process = slurm("train.sbatch", "full_run.sh", "--overwrite", STUB_HANG_AT=3)
    wait_for(lambda: lab.calls(event="hang"))
    process.send_signal(signal.SIGUSR1)
    finish(process)
    wait_for(lambda: not lab.left())
    shutil.rmtree(lab.work)  # as if it had been ended before it began to train
    turns = [finish(slurm("train.sbatch", "full_run.sh", "--overwrite", SLURM_RESTART_COUNT=n)) for n in (1, 2)]
    assert ["is there already" in said for said in turns] == [False, True]
    assert not list(lab.out.parent.glob("*.before-*"))


def test_a_job_that_was_to_restart_does_so_in_its_first_turn_only(slurm, lab):
    lab.run("full_run.sh", "--learning_rate", 1, GPUS="", STUB_FAIL_AT=3)
    for turn, env in enumerate(({"STUB_FAIL_AT": "3"}, {})):
        slurm("train.sbatch", "full_run.sh", RESTART="1", SLURM_RESTART_COUNT=turn, **env).communicate(timeout=120)
    assert ["--resume_from_checkpoint" in call["argv"] for call in lab.calls("sft")] == [False, False, True]


def test_a_job_that_goes_on_in_its_output_is_not_taken_for_done(slurm, lab):
    """knockout_check.sh writes there from the beginning."""
    (lab.out / "scan").mkdir(parents=True)
    lab.work.mkdir()
    said = finish(slurm("train.sbatch", "knockout_check.sh", OUTPUT="ckpt/out/", CHECK="1", SLURM_RESTART_COUNT="1"))
    assert "is there already" not in said and "rows a step" in said


def test_a_loop_on_several_nodes_trains_on_all_cuts_on_the_first_and_scans_on_a_cluster(slurm):
    settings = {"TARGET_PARAMS": "0.75", "CUTS": "layers", "DISTIL_STEPS": "9", "CARD": ""}
    settings |= {"RAY_ADDRESS": "first:6379", "HEAL": "0"}
    printed = finish(slurm("loop.sbatch", "--dry-run", nodes=2, **settings))
    lines = [line for line in printed.splitlines() if line.startswith("+ ")]
    trainings = [line for line in lines if "full_run.sh" in line or "distil.sh" in line]
    assert len(trainings) == 3 and all("srun" in line and "slurm/node.sh bash" in line for line in trainings)
    assert not [line for line in lines if "srun" in line and line not in trainings]
    [scan] = [line for line in lines if "prunekit.scan" in line]
    assert "--gpus-per-task 0" in scan and "--processes" not in scan and "--heal" not in scan
