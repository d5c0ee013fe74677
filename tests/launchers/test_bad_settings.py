"""What launchers refuse, in one line and before anything runs."""

import os
import re
import socket
import time
from pathlib import Path

import pytest
from helpers.lab import LAUNCHERS, TRAINERS, Lab, executable
from helpers.paths import ROOT


def refused(lab: Lab, launcher: str, message: str, *arguments: object, **env: str) -> None:
    """One line on standard error that has the message, exit code 2, and nothing written or started."""
    before = sorted(lab.folder.rglob("*"))
    result = lab.run(launcher, *arguments, **{"GPUS": ""} | env)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: [^\n]*\n", result.stderr), result.stderr
    assert message in result.stderr
    assert lab.calls() == []
    assert sorted(lab.folder.rglob("*")) == before


EVERY = [*LAUNCHERS, "knockout_check.sh", "progressive_run.sh", "sparse_run.sh", "loop.sh", "quantise.sh"]
BAD_SETTINGS = [
    *(({name: value}, "full_run.sh") for name, value in {
        "CPU_PROCESSES": "abc", "NNODES": "many", "NODE_RANK": "1", "MASTER_PORT": "70000", "DTYPE": "fp16",
        "PLAIN": "yes", "REUSE": "yes",
        "RESTART": "yes", "KEEP_RUN": "-", "OVERWRITE": "true", "CHECKPOINT": "first", "GLOBAL_BATCH": "0",
        "DEFAULT_BATCH": "PLUGINS[$(touch pwned)]", "DEEPSPEED": "zero9",
    }.items()),
    *(({"GPUS": gpus}, "full_run.sh") for gpus in ("abc", "99", "0,0", "-1", "0,", "0 1")),
    ({"NNODES": "2"}, "full_run.sh"),
    *(({name: value}, "progressive_run.sh") for name, value in {
        "STEPS1": "0", "STEPS2": "-1", "STEPS3": "a b", "ACCUMULATE": "a[$(touch pwned)]", "TRAIN1": "all",
        "HEADS1": "0",
    }.items()),
    *(({name: value}, "knockout_check.sh") for name, value in {
        "JOBS": "x", "GREEDY": "-5", "GENERATE": "-1", "GENERATE_TOKENS": "0", "HEAL": "yes", "RACE": "2",
        "GPUS_PER_TASK": "x", "TARGET_PARAMS": "2",
        "TEXT_LAYERS": "a", "VISION_BLOCKS": "1..3", "EXPERTS": "half", "FINALISTS": "-1", "MODE": "x",
    }.items()),
    *(({name: value}, "sparse_run.sh") for name, value in {
        "REFIT": "yes", "CYCLES": "-1", "SPARSITY": "1", "START": "x", "WORSE": "nan", "SCHEDULE": "x", "SCORE": "x",
        "REUSE": "1",
    }.items()),
    *(({name: value}, "loop.sh") for name, value in {
        "TARGET_PARAMS": "1.5", "TARGET_BYTES": "5GB", "TARGET_KV": "0", "KEEP": "97", "METRIC": "bleu",
        "CUTS": "towers", "MAX_ROUNDS": "0", "ROUND_SHARE": "1", "KEEP_ROUNDS": "some", "RECOVER_STEPS": "0",
        "DISTIL_STEPS": "x", "LONGER_STEPS": "0", "CALIB_TOKENS": "-1", "HEAL": "yes", "DRY_RUN": "2",
        "TARGET_SPEED": "fast", "SPEED_OF": "loading", "END": "kv kv", "END_KV": "0", "END_STEPS": "x",
        "RAY_ADDRESS": "a:1",
    }.items()),
    ({"END": "lora"}, "loop.sh"),
    ({"END": "rl"}, "loop.sh"),
    ({"CHECK": "yes"}, "full_run.sh"),
    *(({"GPUS": "0,1", name: value}, "distil.sh") for name, value in {
        "ROLLOUT_GPUS": "x", "ROLLOUT_PORT": "65536", "ROLLOUT_DEADLINE": "soon",
    }.items()),
    *(({"MASTER_ADDR": "a", "NNODES": "2"}, name)
      for name in ("export_lora.sh", "knockout_check.sh", "loop.sh", "sparse_run.sh", "quantise.sh")),
    *(({"METHOD": method}, "quantise.sh") for method in ("awq", "fp8 ", "bnb", "block-fp8")),
    ({"GPUS": "0,1,2", "JOBS": "2"}, "knockout_check.sh"),
    ({"BY": "skill", "GATE": "best"}, "knockout_check.sh"),
    *(({"MODE": "train", name: value}, "knockout_check.sh") for name, value in {
        "RACE": "1", "GREEDY": "8", "TARGET_PARAMS": "0.7", "HEAL": "1", "EXPERTS": "all", "GENERATE": "9",
    }.items()),
    ({"GATE": "worst"}, "knockout_check.sh"),
    ({"HEAL": "1"}, "knockout_check.sh"),
    ({"BY": "skill", "RACE": "1", "GATE": "worst"}, "knockout_check.sh"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "launcher"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused_by_the_shell_alone(lab, env, launcher):
    """In one line that names them, before Python, which takes seconds, is called or anything is written."""
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    refused(lab, launcher, f"{list(env)[-1]}=", STUB_GPUS="4", **env)


@pytest.mark.parametrize("launcher", ["loop.sh", "sparse_run.sh", "knockout_check.sh"])
@pytest.mark.parametrize("flags", [["--dataset", "train.jsonl"], ["--val-dataset=val.jsonl"]], ids=" ".join)
def test_data_that_only_trainings_would_see_are_refused_as_flags(lab, launcher, flags):
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    name = flags[0].partition("=")[0].removeprefix("--").replace("-", "_")
    refused(lab, launcher, f"--{name}: set {name.upper()}=", *flags, TARGET_PARAMS="0.9")


def test_cycles_without_keep_zeros_are_refused(lab):
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    refused(lab, "sparse_run.sh", "--callbacks lisa: name keep_zeros, too", "--callbacks", "lisa")


def test_the_check_of_cycles_knows_their_plan(lab):
    refused(lab, "sparse_run.sh", "0 < start <= sparsity < 1", CHECK="1", START="0.9")


def test_another_folder_for_a_run_is_refused(lab):
    refused(lab, "full_run.sh", "--add_version: leave it out", "--add_version", "true")


@pytest.mark.parametrize("launcher", EVERY)
def test_a_setting_is_never_run_as_a_command(lab, launcher):
    source = (ROOT / launcher).read_text()
    if launcher == "full_run.sh":
        source += (ROOT / "lib/common.sh").read_text()
    names = set(re.findall(r"^([A-Z_0-9]+)=\$\{\1", source, re.MULTILINE))
    assert len(names) > 2
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    for name in names | {"NNODES", "NODE_RANK", "MASTER_PORT"}:
        lab.run(launcher, **{"GPUS": "0,1"} | {name: "a[$(touch pwned)]"})
    assert not (lab.folder / "pwned").exists()


def test_gpus_of_a_machine_without_any_are_refused(lab):
    (lab.folder / "env/bin/nvidia-smi").unlink()
    if list(Path("/dev").glob("nvidia*")):
        pytest.skip("there are GPUs")
    refused(lab, "full_run.sh", "GPUS=0: there is no GPU here", GPUS="0")


def test_a_flag_that_launchers_would_not_see_is_refused(lab):
    refused(lab, "full_run.sh", "the flag's whole name, --per_device_train_batch_size", "--per_device_train_b", 2)


def test_what_is_refused_late_leaves_nothing_either(lab):
    """The plan of a cycle's sparsity is refused when the run's folder is there already."""
    folder = lab.out.with_name("out.cycles")
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"model": "another"}')
    refused(lab, "sparse_run.sh", "holds cycles with other settings")


def test_a_refusal_leaves_an_interrupted_run_alone(lab):
    lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    before = sorted(lab.work.rglob("*"))
    assert lab.run("full_run.sh", "--max_steps", 9, GPUS="").returncode == 2
    assert sorted(lab.work.rglob("*")) == before
    assert lab.run("full_run.sh", GPUS="").returncode == 0


@pytest.mark.parametrize("deepspeed", ["zero2_offload", "mine.json"])
def test_a_build_that_was_killed_does_not_hold_up_the_next(lab, deepspeed):
    (lab.folder / "mine.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    lock = lab.folder / ".cache/torch_extensions/py311_cu130/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    for age, left in ((60, True), (3600, False)):
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        lab.run("full_run.sh", GPUS="0", DEEPSPEED=deepspeed, STUB_FAIL_AT=1, RESTART=1)
        assert lock.exists() == left, "one that is being built must stay"


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "quantise.sh"])
def test_a_missing_model_and_a_used_output_are_refused(lab, launcher):
    refused(lab, launcher, "absent", MODEL="absent")
    refused(lab, launcher, "exists; choose another OUT or pass --overwrite", OUTPUT="env")


@pytest.mark.parametrize("launcher", TRAINERS)
def test_missing_data_is_refused(lab, launcher):
    refused(lab, launcher, "absent.jsonl is not there", DATASET="absent.jsonl")
    if launcher != "rl_run.sh":
        refused(lab, launcher, "absent.jsonl is not there", VAL_DATASET="absent.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [{"role": "user", "content": ""}]}\nhello\n', "line 2 is not JSON"),
        ('{"query": "a", "response": "b"}\n', 'line 1 has no list "messages"'),
        (
            '{"messages": [{"role": "user", "content": ""}], "images": ["gone.png"]}\n',
            "line 1 names an image that is not there: 'gone.png'",
        ),
    ],
    ids=["no JSONL", "no messages", "no image"],
)
def test_bad_data_is_refused_and_its_line_named(lab, content, message):
    (lab.folder / "bad.jsonl").write_text(content)
    refused(lab, "full_run.sh", message, DATASET="bad.jsonl")


@pytest.mark.parametrize(
    ("launcher", "env", "arguments", "message"),
    [
        ("full_run.sh", {"MODEL": "adapter"}, [], "adapter: a LoRA adapter, not a checkpoint"),
        ("full_run.sh", {"MODEL": "env"}, [], "env: no config.json here"),
        ("full_run.sh", {"OUTPUT": "train.jsonl/out"}, [], "no folder that you may write to"),
        ("distil.sh", {"TEACHER": "absent"}, [], "absent"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_GPUS": "0,1"}, [], "leaves no GPU"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_PORT": "many"}, [], "ROLLOUT_PORT=many: give a whole number"),
        ("distil.sh", {"GPUS": "0,1"}, ["--vllm_mode", "colocate"], "--vllm_mode colocate: set ROLLOUT_GPUS= (empty)"),
        ("distil.sh", {"GPUS": "0,1"}, ["--vllm-server-port=8000"], "--vllm-server-port: the server is"),
        ("export_lora.sh", {"ADAPTER": "env"}, [], "env holds no adapter"),
        (
            "rl_run.sh",
            {"GPUS": "0", "STUB_GPUS": "1", "STUB_MEMORY": "1"},
            ["--max_length", "32", "--max_completion_length", "32"],
            "of 0 GiB is 0.0: give it more memory",
        ),
        ("rl_run.sh", {"ALGORITHM": "PPO"}, [], "unknown ALGORITHM PPO: GSPO, GDPO, CHORD"),
        ("rl_run.sh", {"ALGORITHM": "CHORD", "CHORD_DATASET": "absent.jsonl"}, [], "absent.jsonl is not"),
        (
            "rl_run.sh",
            {},
            ["--reward_funcs", "ocr_wer", "--reward_weights", "1"],
            "unknown reward ocr_wer: choose from accuracy, cosine",
        ),
        ("rl_run.sh", {}, ["--external_plugins", "absent.py"], "plugin absent.py is not there"),
    ],
)
def test_bad_settings_are_refused(lab, launcher, env, arguments, message):
    refused(lab, launcher, message, *arguments, **env)


def test_rl_without_the_truth_in_its_rows_is_refused(lab):
    (lab.folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": ""}]}\n')
    refused(lab, "rl_run.sh", 'line 1 has no column "solution"', DATASET="bad.jsonl")


def test_a_used_port_is_refused(lab):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        refused(lab, "distil.sh", f"port {port} is in use", GPUS="0,1", ROLLOUT_PORT=port)
