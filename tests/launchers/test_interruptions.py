"""Publishing and resuming: what is left by a launcher that ends early, and what the same command makes of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.lab import TRAINERS, executable, values
from helpers.paths import ROOT

from prunekit.checkpoint import history, open_checkpoint

# --- publishing and resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["full_run.sh", "distil.sh", "rl_run.sh", "export_lora.sh"])
def test_a_finished_stage_is_a_clean_checkpoint_with_its_history(lab, launcher):
    result = lab.run(launcher, GPUS="", STUB_DRAWS=1)
    assert result.returncode == 0, result.stderr
    stage = launcher.removesuffix(".sh")
    assert open_checkpoint(lab.out).tensors.keys() == open_checkpoint(lab.env["MODEL"]).tensors.keys()
    assert [entry["stage"] for entry in history(lab.out)] == [stage]
    names = {file.name for file in lab.out.iterdir()}
    assert not names & {"optimizer.pt", "trainer_state.json"}
    assert names >= {"README.md", "command.sh"}
    assert (lab.out / "command.sh").read_text().startswith(f"# {stage}, run in {lab.folder}\nswift ")
    if launcher != "export_lora.sh":
        assert names >= {"logging.jsonl", "curves.png"}
    assert not lab.work.exists()
    assert lab.left() == []
    assert f"{stage}: wrote ckpt/out\n" in result.stdout


def test_a_lora_is_published_as_an_adapter(lab):
    assert lab.run("lora.sh", GPUS="", STUB_DRAWS=1).returncode == 0
    names = {file.name for file in lab.out.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "command.sh", "curves.png"}
    assert "\nlibrary_name: peft\n" in (lab.out / "README.md").read_text()
    assert not lab.work.exists()


@pytest.mark.parametrize(
    ("before", "after", "deepspeed"), [("0,1", "0", "zero2"), ("0", "0,1,2", "zero2"), ("0,1", "0", "mine.json")]
)
def test_deepspeed_resumes_with_as_many_gpus_only_and_it_is_said(lab, before, after, deepspeed):
    (lab.folder / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
    lab.run("full_run.sh", *flags, GPUS=before, DEEPSPEED=deepspeed, STUB_FAIL_AT=3)
    other = lab.run("full_run.sh", *flags, GPUS=after, DEEPSPEED=deepspeed)
    assert other.returncode == 2
    assert f"a run of {len(before.split(','))} processes" in other.stderr and "RESTART=1" in other.stderr
    again = lab.run("full_run.sh", *flags, GPUS=before, DEEPSPEED=deepspeed)
    assert again.returncode == 0, again.stderr


def test_the_saved_command_is_the_one_that_ran(lab):
    lab.run("full_run.sh", "--system", "it's $HOME", GPUS="", KEEP_RUN=1)
    executable(lab.folder / "bin/swift", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    env = {"PATH": f"{lab.folder}/bin:/usr/bin:/bin"}
    again = subprocess.run(["bash", lab.out / "command.sh"], env=env, capture_output=True, text=True)
    [call] = lab.calls()
    assert again.stdout.splitlines() == call["argv"]
    assert (lab.work / "checkpoint-4/optimizer.pt").exists()


@pytest.mark.parametrize("how", ["setting", "flag"])
def test_overwrite_replaces_a_finished_checkpoint(lab, tiny, how):
    shutil.copytree(tiny("qwen3_vl"), lab.out)
    inode = lab.out.stat().st_ino
    result = lab.run(
        "full_run.sh",
        *["--overwrite"] * (how == "flag"),
        GPUS="",
        **{"OVERWRITE": "1"} if how == "setting" else {},
    )
    assert result.returncode == 0, result.stderr
    assert lab.out.stat().st_ino != inode
    assert history(lab.out)


def test_a_run_whose_name_has_brackets_is_known_as_one_and_goes_on(lab):
    for fails in ({"STUB_FAIL_AT": 3}, {}):
        result = lab.run("full_run.sh", GPUS="", OUTPUT="ckpt/[1] it's", **fails)
    assert result.returncode == 0, result.stderr
    assert "--resume_from_checkpoint" in lab.calls()[-1]["argv"]


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_a_trailing_slash_of_output_is_no_matter(slashes, lab):
    result = lab.run("full_run.sh", GPUS="", OUTPUT=f"ckpt/out{slashes}")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in lab.out.parent.iterdir()) == ["out"]


def test_a_variable_of_the_users_own_named_work_is_not_the_folder_that_is_deleted(lab):
    precious = lab.folder / "precious"
    precious.mkdir()
    assert lab.run("full_run.sh", GPUS="", WORK=str(precious), RESTART=1).returncode == 0
    assert precious.exists()
    assert lab.out.exists()


def test_a_folder_in_the_way_of_the_run_is_refused(lab):
    lab.work.mkdir(parents=True)
    (lab.work / "thesis.tex").touch()
    result = lab.run("full_run.sh", GPUS="")
    assert result.returncode == 2
    assert "in the way" in result.stderr
    assert [file.name for file in lab.work.iterdir()] == ["thesis.tex"]


def test_a_failing_trainer_leaves_no_output_and_the_same_command_resumes(lab):
    result = lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    assert result.returncode == 1
    assert "CUDA out of memory" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: full_run failed (exit code 3)")
    assert "the same command goes on from its last checkpoint" in result.stderr
    assert not lab.out.exists()
    half = lab.work / "checkpoint-3"  # killed while saving: no trainer_state.json yet
    shutil.copytree(lab.work / "checkpoint-2", half)
    (half / "trainer_state.json").unlink()

    other = lab.run("full_run.sh", "--learning_rate", "1", GPUS="")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert "RESTART=1" in other.stderr

    shutil.rmtree(half)
    assert lab.run("full_run.sh", GPUS="").returncode == 0
    assert values(lab.calls()[-1]["argv"], "--resume_from_checkpoint") == ["ckpt/out.run/checkpoint-2"]
    assert not lab.work.exists()


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_stage_killed_before_publishing_takes_no_other_step(checkpoint, lab):
    """The trainer would take one more before it sees that it has taken all."""
    lab.run("full_run.sh", GPUS="", KEEP_RUN=1, CHECKPOINT=checkpoint)
    shutil.rmtree(lab.out)
    result = lab.run("full_run.sh", GPUS="", CHECKPOINT=checkpoint)
    assert result.returncode == 0, result.stderr
    assert len(lab.calls()) == 1 and lab.out.exists() and not lab.work.exists()


def test_a_half_written_checkpoint_is_not_resumed_from(lab):
    lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=4)
    (lab.work / "checkpoint-4/trainer_state.json").write_text('{"global_step": 4, "log_his')
    lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    assert values(lab.calls()[-1]["argv"], "--resume_from_checkpoint") == ["ckpt/out.run/checkpoint-2"]


def test_restart_forgets_the_interrupted_run(lab):
    lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    result = lab.run("full_run.sh", "--learning_rate", "1", GPUS="", RESTART=1)
    assert result.returncode == 0, result.stderr
    assert "--resume_from_checkpoint" not in lab.calls()[-1]["argv"]
    steps = [json.loads(line).get("global_step/max_steps") for line in (lab.out / "logging.jsonl").open()]
    assert steps == ["1/4", "2/4", "3/4", "4/4", None]


def test_rewards_are_tried_where_a_run_is_forgotten_too(lab):
    lab.run("rl_run.sh", GPUS="", STUB_FAIL_AT=3)
    faulty = f'#!/bin/sh\ncase "$*" in *prunekit.tryout*) exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    executable(lab.folder / "env/bin/python", faulty)
    result = lab.run("rl_run.sh", GPUS="", TRYOUT=1, RESTART=1)
    assert result.returncode == 2 and "the rewards have faults" in result.stderr
    assert (lab.work / "checkpoint-2").exists()


def test_a_stage_killed_after_publishing_is_only_cleaned_up(lab):
    lab.run("full_run.sh", GPUS="", KEEP_RUN=1)
    (lab.work / "publishing").write_text("none\n")  # as written before the first publishing
    other = lab.run("full_run.sh", "--learning_rate", "1", GPUS="")
    assert other.returncode == 2
    assert "exists" in other.stderr
    again = lab.run("full_run.sh", GPUS="")
    assert again.returncode == 0, again.stderr
    assert len(lab.calls()) == 1
    assert not lab.work.exists()


RM = """#!/bin/sh
[ -n "$STUB_RM_DIES" ] || exec /bin/rm "$@"
shift
find "$@" -maxdepth 1 -type f -delete
exit 1
"""  # it begins with what is small


def test_a_stage_killed_while_its_folder_is_removed_is_only_cleaned_up(lab):
    executable(lab.folder / "env/bin/rm", RM)
    assert lab.run("full_run.sh", GPUS="", STUB_RM_DIES=1).returncode == 1
    assert lab.out.exists() and lab.work.exists()
    again = lab.run("full_run.sh", GPUS="")
    assert again.returncode == 0, again.stderr
    assert len(lab.calls()) == 1 and not lab.work.exists()


def test_a_stage_killed_within_the_last_of_its_folder_is_done(lab):
    """Half of what says whose the folder was is gone."""
    rm = '#!/bin/sh\n[ -n "$STUB_RM_DIES" ] && [ -e "$2/lock-0" ] && /bin/rm "$2/lock-0" && exit 1\nexec /bin/rm "$@"\n'
    executable(lab.folder / "env/bin/rm", rm)
    assert lab.run("full_run.sh", GPUS="", STUB_RM_DIES=1).returncode == 1
    result = lab.run("full_run.sh", GPUS="")
    assert result.returncode == 2 and "exists; choose another OUT" in result.stderr, result.stderr
    assert lab.run("full_run.sh", "--overwrite", GPUS="").returncode == 0
    assert [path.name for path in lab.out.parent.iterdir()] == ["out"]


def test_a_restart_killed_while_it_forgets_is_not_taken_for_a_run_of_its_settings(lab):
    lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    executable(lab.folder / "env/bin/rm", RM)
    assert lab.run("full_run.sh", "--learning_rate", "1", GPUS="", RESTART=1, STUB_RM_DIES=1).returncode == 1
    again = lab.run("full_run.sh", "--learning_rate", "1", GPUS="")
    assert again.returncode == 2 and "other settings" in again.stderr


def test_other_settings_with_overwrite_after_publishing_train_anew(lab):
    lab.run("full_run.sh", GPUS="", KEEP_RUN=1)
    (lab.work / "publishing").write_text("none\n")
    assert lab.run("full_run.sh", "--learning_rate", "1", "--overwrite", GPUS="").returncode == 0
    assert "--resume_from_checkpoint" not in lab.calls()[-1]["argv"]
    assert "learning_rate 1 " in (lab.out / "command.sh").read_text()


# --- killing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", TRAINERS)
def test_after_kill_9_the_same_command_ends_the_orphan_and_finishes(lab, launcher):
    process = lab.until_hanging(launcher, GPUS="", STUB_HANG_AT=3)
    process.kill()
    process.wait()
    orphans = lab.left()
    assert len(orphans) == 3, "wrapper, trainer and its child live on"
    result = lab.run(launcher, GPUS="")
    assert result.returncode == 0, result.stderr
    assert lab.left() == []
    assert values(lab.calls()[-1]["argv"], "--resume_from_checkpoint") == ["ckpt/out.run/checkpoint-2"]
    assert lab.out.exists()
    assert not lab.work.exists()


def test_the_orphan_is_found_when_its_wrapper_died_too(lab):
    process = lab.until_hanging("full_run.sh", GPUS="", STUB_HANG_AT=3, STUB_STUBBORN=1)
    [wrapper] = [pid for pid in lab.left() if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(process.pid)]
    for pid in (process.pid, wrapper):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    result = lab.run("full_run.sh", GPUS="")
    assert result.returncode == 0, result.stderr
    assert lab.left() == []


def test_what_has_ended_is_not_ended_again(lab):
    """By then its number may be another process's."""
    script = f'source "{ROOT}/lib/common.sh"; RUN_MARK=A=b; run_to_end true; end_group() {{ echo "ends $1"; }}'
    command = ["bash", "-c", script, "full_run.sh"]
    done = subprocess.run(command, cwd=lab.folder, env=lab.env | {"GPUS": ""}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("launcher", ["full_run.sh", "distil.sh"])
def test_a_second_launcher_of_the_same_output_is_refused(lab, launcher):
    first = lab.until_hanging(launcher, GPUS="", STUB_HANG_AT=1)
    second = lab.run("full_run.sh", GPUS="")
    assert second.returncode == 2
    assert re.fullmatch(rf"error: ckpt/out is being made by process {first.pid} on \S+: .*\n", second.stderr)
    assert first.poll() is None
    assert len(lab.calls()) == 1
    first.terminate()
    first.communicate(timeout=60)


@pytest.mark.parametrize(
    ("sent", "env", "code"),
    [
        (signal.SIGTERM, {}, 143),
        (signal.SIGHUP, {}, 143),
        (signal.SIGINT, {}, 130),
        (signal.SIGTERM, {"STUB_STUBBORN": "1"}, 143),
    ],
    ids=["TERM", "HUP", "INT", "TERM-ignored"],
)
def test_a_signal_to_the_launcher_ends_the_trainer_and_its_children(lab, sent, env, code):
    process = lab.until_hanging("full_run.sh", GPUS="", STUB_HANG_AT=1, **env)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert lab.left() == []
    assert not lab.out.exists()
