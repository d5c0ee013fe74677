"""The launchers, as a user runs them, with a stub in ms-swift's place (stub_swift.py).

Their flags are held against the argument classes of the installed ms-swift, so that a renamed one fails here.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prunekit.checkpoint import history, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "tests" / "stub_swift.py"
TRAINERS = ["full_run.sh", "distil.sh", "lora.sh", "rl_run.sh"]
LAUNCHERS = [*TRAINERS, "export_lora.sh"]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.sh"), *ROOT.glob("lib/*.sh")))
# What nvidia-smi says on a machine without a working driver goes to its standard output.
NVIDIA_SMI = """#!/bin/sh
[ -n "$STUB_GPUS" ] || { echo "NVIDIA-SMI has failed because it couldn't communicate with the driver"; exit 9; }
seq 0 $((STUB_GPUS - 1))
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


class Lab:
    """A folder with data and an environment whose `swift` is the stub; runs launchers there."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.calls_file = folder, folder / "calls.jsonl"
        self.out, self.work = folder / "ckpt" / "out", folder / "ckpt" / "out.run"
        executable(folder / "env/bin/swift", f'#!/bin/sh\nexec {sys.executable} -SE {STUB} "$@"\n')
        executable(folder / "env/bin/nvidia-smi", NVIDIA_SMI)
        (folder / "image.png").write_bytes(b"png")
        row = {
            "messages": [{"role": "user", "content": "<image>?"}],
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
        }

    def start(self, launcher: str, *arguments: object, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / launcher, *map(str, arguments)],
            cwd=self.folder,
            env=self.env | {k: str(v) for k, v in env.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where pytest is in background
        )

    def run(self, launcher: str, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        process = self.start(launcher, *arguments, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def until_hanging(
        self, launcher: str, *arguments: object, times: int = 1, **env: str
    ) -> subprocess.Popen:
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
        mark, left = f"STUB_CALLS={self.calls_file}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    left.append(int(folder.name))
            except OSError:
                continue
        return left


@pytest.fixture
def lab(tmp_path, tmp_path_factory, tiny):
    lab = Lab(tmp_path, tiny("qwen3_vl"))
    lab.env["MPLCONFIGDIR"] = str(
        tmp_path_factory.getbasetemp() / "matplotlib"
    )  # its list of fonts takes seconds
    yield lab
    for pid in lab.left():
        os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def values(argv: list[str], flag: str) -> list[str]:
    """The values of the last occurrence of a flag, which is the one that counts."""
    begin = len(argv) - argv[::-1].index(flag)
    end = next((i for i in range(begin, len(argv)) if argv[i].startswith("--")), len(argv))
    return argv[begin:end]


# --- flags ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def parsers():
    from swift import ExportArguments, RLHFArguments, RolloutArguments, SftArguments
    from swift.utils.utils import _patch_get_type_hints
    from transformers import HfArgumentParser

    classes = {
        "sft": SftArguments,
        "rlhf": RLHFArguments,
        "export": ExportArguments,
        "rollout": RolloutArguments,
    }
    with _patch_get_type_hints():
        return {kind: HfArgumentParser([cls]) for kind, cls in classes.items()}


def check_flags(parser, argv: list[str]) -> None:
    """Every flag is a field by its full name, and every value has its type and is one of its choices."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    assert not [flag for flag in flags if flag not in parser._option_string_actions]
    _, rest = parser.parse_known_args(argv)
    assert not rest


CASES = [
    (launcher, {"GPUS": gpus} | settings)
    for launcher, variants in {
        "full_run.sh": [{}],
        "knockout_check.sh": [{"MODE": "train", "TEXT_LAYERS": "1", "VISION_BLOCKS": "none"}],
        "lora.sh": [{}],
        "export_lora.sh": [{}],
        "distil.sh": [{}],
        "rl_run.sh": [{"ALGORITHM": name} for name in ("GSPO", "GDPO", "CHORD")],
    }.items()
    for settings in variants
    for gpus in ("", "0", "0,1,2,3")
    if launcher != "knockout_check.sh" or gpus == "0"  # on a CPU it trains in forks of its own
]


@pytest.mark.parametrize(
    ("launcher", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.values())
)
def test_installed_swift_accepts_every_flag(lab, parsers, launcher, settings):
    result = lab.run(launcher, STUB_FAIL_AT=1, ROLLOUT_PORT=free_port(), **settings)
    assert lab.calls(), result.stderr
    for call in lab.calls():
        check_flags(parsers[call["argv"][0]], call["argv"][1:])


@pytest.mark.parametrize(
    "flags",
    [["--max_completion_len", "5"], ["--train_type", "full"], ["--vllm_mode", "serve"], ["--max_steps", "x"]],
)
def test_the_flag_check_sees_renamed_flags_and_values(parsers, flags):
    with pytest.raises((AssertionError, SystemExit)):
        check_flags(parsers["rlhf"], flags)


def test_swift_knows_every_causal_family_by_our_name():
    from swift.model import MODEL_MAPPING

    from prunekit.families import FAMILIES

    unknown = {name for name, family in FAMILIES.items() if family.causal and name not in MODEL_MAPPING}
    assert unknown == {"gpt2"}


@pytest.mark.parametrize("launcher", TRAINERS)
def test_flags_of_the_command_line_come_after_the_launchers_own(lab, launcher):
    lab.run(launcher, "--max_steps", 7, "--learning_rate", "3e-3", GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--max_steps") == ["7"]
    assert values(call["argv"], "--learning_rate") == ["3e-3"]
    assert values(call["argv"], "--output_dir") == ["ckpt/out.run"]


@pytest.mark.parametrize("launcher", ["full_run.sh", "export_lora.sh"])
@pytest.mark.parametrize("flag", ["--model", "--output_dir", "--output-dir=x"])
def test_flags_that_the_launcher_must_know_are_refused_with_the_setting_to_use(lab, launcher, flag):
    result = lab.run(launcher, flag, "x")
    assert result.returncode == 2
    assert re.fullmatch(r"error: --\w+: set (MODEL|OUTPUT)=.*\n", result.stderr)


@pytest.mark.parametrize(
    "settings, said",
    [({"MODE": "quick"}, "MODE=quick"), ({"FINALISTS": "some"}, "FINALISTS=some"),
     ({"JOBS": "9", "GPUS": "0"}, "JOBS=9"), ({"TEXT_LAYERS": "99"}, "--text 99")],
)  # fmt: skip
def test_settings_of_knockouts_that_make_no_sense_are_refused(lab, settings, said):
    result = lab.run("knockout_check.sh", **settings)
    assert (result.returncode, said in result.stderr) == (2, True), result.stderr
    assert not lab.calls()


def test_knockouts_leave_a_folder_that_is_no_sweep_alone(lab):
    lab.out.mkdir(parents=True)
    (lab.out / "thesis.txt").write_text("mine")
    for more in ({}, {"RESTART": "1"}):
        result = lab.run("knockout_check.sh", **more)
        assert (result.returncode, "no sweep" in result.stderr) == (2, True), result.stderr
    assert [path.name for path in lab.out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "knockout_check.sh"])
def test_help_prints_the_header_and_runs_nothing(lab, launcher):
    before = sorted(lab.folder.rglob("*"))
    result = lab.run(launcher, "--max_steps", "3", "--help")
    assert result.returncode == 0
    for word in ("In:", "Out:", "$MODEL", "$OUTPUT", f"bash {launcher}"):
        assert word in result.stdout
    assert "source" not in result.stdout
    assert sorted(lab.folder.rglob("*")) == before


def test_settings_of_the_environment_reach_the_command(lab):
    env = {
        "MODEL_TYPE": "qwen3_vl_emb",
        "TEMPLATE": "qwen3_vl",
        "RUN_NAME": "my run",
        "WANDB_PROJECT": "p",
        "WANDB_RUN_GROUP": "g",
    }
    lab.run("distil.sh", GPUS="", LMBDA="0.5", BETA="0", STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    for flag, value in {
        "--model": lab.env["MODEL"],
        "--model_type": "qwen3_vl_emb",
        "--template": "qwen3_vl",
        "--run_name": "my run",
        "--teacher_model": lab.env["TEACHER"],
        "--dataset": "train.jsonl",
        "--val_dataset": "val.jsonl",
        "--lmbda": "0.5",
        "--beta": "0",
    }.items():
        assert values(call["argv"], flag) == [value]
    assert call["env"]["WANDB_PROJECT"] == "p"
    assert call["env"]["WANDB_RUN_GROUP"] == "g"


@pytest.mark.parametrize(
    "family, flags, length",
    [
        ("gpt2", [], "64"),
        ("gpt2", ["--max_length", "32"], "32"),
        ("gpt2", ["--max_length=9000"], "64"),
        ("qwen3_vl", ["--max_length", "9000"], "9000"),
    ],
)
def test_rows_are_kept_within_learned_positions(family, flags, length, lab, tiny):
    lab.run("full_run.sh", *flags, GPUS="", MODEL=str(tiny(family)), STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--max_length") == [length]


def test_what_a_library_prints_in_preflight_is_no_answer(lab):
    (lab.folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'prunekit.preflight' in sys.orig_argv:\n"
        "    print('[INFO:library] found a device\\nMODEL_TYPE of the cache: none\\n\\n')\n"
    )
    lab.run("full_run.sh", GPUS="", PYTHONPATH=f"{lab.folder}:{ROOT}", TEMPLATE="qwen3_vl", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--model_type") == ["qwen3_vl"]
    assert values(call["argv"], "--template") == ["qwen3_vl"]


def test_the_teacher_keeps_its_own_architecture(lab, tiny):
    lab.run("distil.sh", GPUS="", TEACHER=str(tiny("qwen3_vl_moe")), STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--model_type") == ["qwen3_vl"]
    assert values(call["argv"], "--teacher_model_type") == ["qwen3_vl_moe"]


def test_data_and_rewards_of_the_command_line_are_checked_in_place_of_the_settings(lab):
    shutil.copy(lab.folder / "train.jsonl", lab.folder / "more.jsonl")
    data = ["--dataset", "more.jsonl", "more.jsonl#1"]
    rewards = ["--reward_funcs", "ocr_length", "format", "--reward_weights", "1", "1"]
    lab.run("rl_run.sh", *data, *rewards, DATASET="absent.jsonl", GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--dataset") == ["more.jsonl", "more.jsonl#1"]
    assert values(call["argv"], "--reward_funcs") == ["ocr_length", "format"]


# --- devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "visible", "processes"),
    [
        ({}, "", None),
        ({"GPUS": "", "STUB_GPUS": "4"}, "", None),
        ({"STUB_GPUS": "1"}, "0", None),
        ({"STUB_GPUS": "4"}, "0,1,2,3", "4"),
        ({"STUB_GPUS": "4", "GPUS": "2,3"}, "2,3", "2"),
        ({"STUB_GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,3"}, "1,3", "2"),
        ({"CPU_PROCESSES": "2"}, "", "2"),
        ({"GPUS": "0", "NPROC_PER_NODE": "8"}, "0", None),
        ({"GPUS": "0", "NNODES": "2"}, "0", "1"),
    ],
    ids=str,
)
def test_devices_decide_processes_and_flags(lab, env, visible, processes):
    lab.run("full_run.sh", STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == visible
    assert call["env"].get("NPROC_PER_NODE") == processes
    assert ("--deepspeed" in call["argv"]) == bool(visible and processes)
    assert ("--use_cpu" in call["argv"]) == (not visible)
    assert ("--ddp_backend" in call["argv"]) == bool(not visible and processes)
    assert values(call["argv"], "--torch_dtype") == ["bfloat16" if visible else "float32"]


def test_an_active_environment_without_swift_gives_way_to_the_projects_own(tmp_path):
    if not (ROOT / ".venv/bin/swift").exists():
        pytest.skip("the project has no environment of its own here")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VIRTUAL_ENV": str(tmp_path)}
    command = ["bash", "-c", f'source "{ROOT}/lib/common.sh"; command -v swift']
    found = subprocess.run(command, env=env, capture_output=True, text=True)
    assert found.stdout.strip() == f"{ROOT}/.venv/bin/swift"


def test_a_node_that_is_not_the_main_one_trains_beside_it_and_publishes_nothing(lab):
    nodes = {"NNODES": "2", "GPUS": "0", "MASTER_ADDR": "127.0.0.1"}
    main = lab.until_hanging("full_run.sh", NODE_RANK=0, STUB_HANG_AT=1, **nodes)
    other = lab.run("full_run.sh", NODE_RANK=1, **nodes)
    assert other.returncode == 0, other.stderr
    assert not lab.out.exists()
    assert main.poll() is None
    main.terminate()
    main.communicate(timeout=60)


# --- publishing and resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["full_run.sh", "distil.sh", "rl_run.sh", "export_lora.sh"])
def test_a_finished_stage_is_a_clean_checkpoint_with_its_history(lab, launcher):
    result = lab.run(launcher, GPUS="")
    assert result.returncode == 0, result.stderr
    stage = launcher.removesuffix(".sh")
    assert open_checkpoint(lab.out).tensors.keys() == open_checkpoint(lab.env["MODEL"]).tensors.keys()
    assert [entry["stage"] for entry in history(lab.out)] == [stage]
    names = {file.name for file in lab.out.iterdir()}
    assert not names & {"optimizer.pt", "trainer_state.json"}
    if launcher != "export_lora.sh":
        assert names >= {"logging.jsonl", "command.sh", "curves.png"}
    assert not lab.work.exists()
    assert lab.left() == []
    assert f"{stage}: wrote ckpt/out\n" in result.stdout


def test_a_lora_is_published_as_an_adapter(lab):
    assert lab.run("lora.sh", GPUS="").returncode == 0
    assert {"adapter_config.json", "adapter_model.safetensors"} < {file.name for file in lab.out.iterdir()}
    assert not lab.work.exists()


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


def test_a_trailing_slash_of_output_is_no_matter(lab):
    result = lab.run("full_run.sh", GPUS="", OUTPUT="ckpt/out/")
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
    [wrapper] = [
        pid for pid in lab.left() if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(process.pid)
    ]
    for pid in (process.pid, wrapper):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    result = lab.run("full_run.sh", GPUS="")
    assert result.returncode == 0, result.stderr
    assert lab.left() == []


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


# --- distil.sh and its server ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "rollout", "training"),
    [("0,1", "1", "0"), ("0,1,2,10", "10", "0,1,2"), ("0,1,2,3", "0,1", "2,3")],
)
def test_a_rollout_server_takes_some_gpus_and_training_the_others(lab, gpus, rollout, training):
    port = free_port()
    proxy = {
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "intranet",
    }  # a cluster's proxy is not for local servers
    result = lab.run("distil.sh", GPUS=gpus, ROLLOUT_GPUS=rollout, ROLLOUT_PORT=port, **proxy)
    assert result.returncode == 0, result.stderr
    [server], [trainer] = lab.calls("rollout"), lab.calls("rlhf")
    assert server["env"]["CUDA_VISIBLE_DEVICES"] == rollout
    assert "NPROC_PER_NODE" not in server["env"]
    assert values(server["argv"], "--port") == [str(port)]
    assert values(server["argv"], "--vllm_data_parallel_size") == [str(len(rollout.split(",")))]
    assert trainer["env"]["CUDA_VISIBLE_DEVICES"] == training
    assert trainer["env"].get("NPROC_PER_NODE") == (
        str(len(training.split(","))) if "," in training else None
    )
    assert values(trainer["argv"], "--vllm_mode") == ["server"]
    assert values(trainer["argv"], "--vllm_server_port") == [str(port)]
    assert trainer["env"]["no_proxy"] == "127.0.0.1,intranet"
    assert lab.left() == []
    assert lab.out.exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STUB_FAIL_AT": "1"}, "distil failed (exit code 3)"),
        ({"STUB_SERVER": "dead"}, "the server ended before it answered"),
        ({"STUB_SERVER": "silent", "ROLLOUT_DEADLINE": "3"}, "/health/ within 3 s"),
    ],
    ids=["trainer fails", "server dies", "server is silent"],
)
def test_no_server_is_left_after_a_failure(lab, env, message):
    result = lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=free_port(), **env)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert len(lab.calls("rlhf")) == ("STUB_FAIL_AT" in env)
    assert lab.left() == []
    assert not lab.out.exists()


def test_sigterm_ends_the_server_and_the_trainer(lab):
    process = lab.until_hanging("distil.sh", GPUS="0,1", ROLLOUT_PORT=free_port(), STUB_HANG_AT=1)
    assert len(lab.left()) > 4
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert lab.left() == []


def test_after_kill_9_the_next_run_ends_the_server_that_holds_the_port(lab):
    port = free_port()
    process = lab.until_hanging("distil.sh", GPUS="0,1", ROLLOUT_PORT=port, STUB_HANG_AT=3)
    process.kill()
    process.wait()
    result = lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=port)
    assert result.returncode == 0, result.stderr
    assert values(lab.calls("rlhf")[-1]["argv"], "--resume_from_checkpoint") == ["ckpt/out.run/checkpoint-2"]
    assert lab.left() == []


def test_other_settings_are_refused_before_a_server_starts(lab):
    port = free_port()
    lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=port, STUB_FAIL_AT=1)
    result = lab.run("distil.sh", "--max_length", "5", GPUS="0,1", ROLLOUT_PORT=port)
    assert result.returncode == 2
    assert "other settings" in result.stderr
    assert len(lab.calls("rollout")) == 1


@pytest.mark.parametrize(("gpus", "mode"), [("", None), ("0", "colocate")])
def test_with_one_gpu_or_none_there_is_no_server(lab, gpus, mode):
    lab.run("distil.sh", GPUS=gpus, STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert ("--use_vllm" in call["argv"]) == bool(mode)
    assert not mode or values(call["argv"], "--vllm_mode") == [mode]


# --- bad input ------------------------------------------------------------------------------------------------


def refused(lab: Lab, launcher: str, message: str, *arguments: object, **env: str) -> None:
    """One line on standard error that has the message, exit code 2, and nothing written or started."""
    before = sorted(lab.folder.rglob("*"))
    result = lab.run(launcher, *arguments, **{"GPUS": ""} | env)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: [^\n]*\n", result.stderr), result.stderr
    assert message in result.stderr
    assert lab.calls() == []
    assert sorted(lab.folder.rglob("*")) == before


@pytest.mark.parametrize("launcher", LAUNCHERS)
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
        ("full_run.sh", {}, ["--disk-factor", "1e12"], "GB free"),
        ("distil.sh", {"TEACHER": "absent"}, [], "absent"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_GPUS": "0,1"}, [], "leaves no GPU"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_PORT": "many"}, [], "port many is none"),
        ("export_lora.sh", {"ADAPTER": "env"}, [], "env holds no adapter"),
        ("rl_run.sh", {"ALGORITHM": "PPO"}, [], "unknown ALGORITHM PPO: GSPO, GDPO or CHORD"),
        ("rl_run.sh", {"ALGORITHM": "CHORD", "CHORD_DATASET": "absent.jsonl"}, [], "absent.jsonl is not"),
        (
            "rl_run.sh",
            {},
            ["--reward_funcs", "ocr_wer"],
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


# --- W&B and secrets ------------------------------------------------------------------------------------------


def test_secrets_are_neither_printed_nor_written(lab):
    secret = "s3cr3t-0123456789"
    result = lab.run(
        "full_run.sh",
        "--hub_token",
        secret,
        f"--hub-token={secret}",
        GPUS="",
        WANDB_API_KEY=secret,
        KEEP_RUN=1,
    )
    assert result.returncode == 0, result.stderr
    assert lab.calls()[0]["argv"].count(secret) == 1, "the trainer gets it"
    assert secret not in result.stdout + result.stderr
    for file in lab.out.parent.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("env", "netrc", "offline"),
    [
        ({}, "", True),
        ({"WANDB_API_KEY": "k"}, "", False),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", False),
        ({}, "machine github.com login a password b\n", True),
        (
            {"WANDB_BASE_URL": "https://wandb.firm:8080"},
            "machine wandb.firm\n  login user\n  password k\n",
            False,
        ),
    ],
    ids=["no key", "key", "netrc", "netrc of others", "own server"],
)
def test_without_a_key_wandb_is_offline_and_says_so_once(lab, env, netrc, offline):
    (lab.folder / ".netrc").write_text(netrc)
    result = lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    assert call["env"].get("WANDB_MODE") == ("offline" if offline else None)
    assert result.stdout.count("offline") == offline


# --- style ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    checked = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for number, line in enumerate((ROOT / script).read_text().splitlines(), 1):
        assert not re.search(r"(^|\s)\\\s+(#.*)?$", line), (
            f"line {number}: a backslash that continues nothing"
        )
        assert not line.lstrip().startswith("#") or not line.endswith("\\"), (
            f"line {number}: a comment with a backslash"
        )
