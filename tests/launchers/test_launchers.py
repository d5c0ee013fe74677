"""The launchers, as a user runs them, with a stub in ms-swift's place (stub_swift.py).

Their flags are held against the argument classes of the installed ms-swift, so that a renamed one fails here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.lab import LAUNCHERS, TRAINERS, check_flags, free_port, values, wait_for
from helpers.paths import ROOT

SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.sh"), *ROOT.glob("lib/*.sh")))


# --- flags ----------------------------------------------------------------------------------------------------


CASES = [
    (launcher, {"GPUS": gpus} | settings)
    for launcher, variants in {
        "full_run.sh": [{}],
        "knockout_check.sh": [{"MODE": "train", "TEXT_LAYERS": "1", "VISION_BLOCKS": "none"}],
        "lora.sh": [{}],
        "export_lora.sh": [{}],
        "quantise.sh": [{"METHOD": "bnb"}, {"METHOD": "block-fp8"}],
        "distil.sh": [{}],
        "rl_run.sh": [{"ALGORITHM": name} for name in ("GSPO", "GDPO", "CHORD", "DAPO", "DR_GRPO", "CISPO", "OPD")],
    }.items()
    for settings in variants
    for gpus in ("", "0", "0,1,2,3")
    # On a CPU knockout_check.sh trains in forks of its own; what an algorithm's array holds is the same everywhere.
    if gpus == "0"
    or launcher not in ("knockout_check.sh", "quantise.sh")
    and settings.get("ALGORITHM", "GSPO") in ("GSPO", "OPD")
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
    from swift.model import LLMModelType, MLLMModelType

    from prunekit.families import FAMILIES

    # Its own names: of what is registered, something may be ours, if this process has asked for a template before
    own = {*vars(LLMModelType).values(), *vars(MLLMModelType).values()}
    unknown = {name for name, family in FAMILIES.items() if family.causal and name not in own}
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


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "knockout_check.sh", "loop.sh", "quantise.sh"])
def test_help_prints_the_header_and_runs_nothing(lab, launcher):
    before = sorted(lab.folder.rglob("*"))
    result = lab.run(launcher, "--max_steps", "3", "--help")
    assert result.returncode == 0
    for word in ("In:", "Out:", "$MODEL", "$OUTPUT", f"bash {launcher}"):
        assert word in result.stdout
    assert "source" not in result.stdout
    assert sorted(lab.folder.rglob("*")) == before


def test_a_value_that_says_how_to_ask_for_help_is_no_call_for_it(lab):
    lab.run("full_run.sh", "--system", "Answer -h or --help by a list.", GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--system") == ["Answer -h or --help by a list."]


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


@pytest.mark.parametrize("share, beta", [("0", "0"), ("0.0", "0"), ("0.5", "1"), ("1", "1")])
@pytest.mark.parametrize("by_flag", [False, True], ids=["setting", "flag"])
def test_distillation_off_policy_is_by_forward_kl(share, beta, by_flag, lab):
    setting, flags = ({}, ["--lmbda", share]) if by_flag else ({"LMBDA": share}, [])
    lab.run("distil.sh", *flags, GPUS="", STUB_FAIL_AT=1, **setting)
    [call] = lab.calls()
    assert values(call["argv"], "--beta") == [beta]


def test_a_training_has_its_progress_bar_though_others_are_off(lab):
    """ms-swift 4.6 fails without, at its first evaluation."""
    lab.run("full_run.sh", GPUS="", TQDM_DISABLE="1", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert "TQDM_DISABLE" not in call["env"]


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


@pytest.mark.parametrize(
    "family, flags, targets",
    [
        ("gpt2", [], ["c_attn", "c_proj", "c_fc"]),
        ("gpt2", ["--target_modules", "c_fc"], ["c_fc"]),
        ("qwen3_vl", [], ["all-linear"]),
    ],
)
def test_a_lora_is_on_all_projections_also_where_all_linear_passes_over_them(family, flags, targets, lab, tiny):
    lab.run("lora.sh", *flags, GPUS="", MODEL=str(tiny(family)), STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--target_modules") == targets


def test_what_a_library_prints_in_preflight_is_no_answer(lab):
    (lab.folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'prunekit.training.preflight' in sys.orig_argv:\n"
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


def test_a_teachers_server_takes_the_place_of_a_teacher(lab):
    flags = ("--teacher_model_server", "http://localhost:8000")
    result = lab.run("distil.sh", *flags, GPUS="", TEACHER="absent", STUB_FAIL_AT=1)
    assert result.returncode == 1, result.stderr
    [call] = lab.calls()
    assert not {"--teacher_model", "--teacher_model_type"} & set(call["argv"])
    assert values(call["argv"], "--teacher_model_server") == ["http://localhost:8000"]
    assert (values(call["argv"], "--gkd_logits_topk"), values(call["argv"], "--temperature")) == (["8"], ["1"])
    result = lab.run("distil.sh", *flags, GPUS="", CACHE="cache")
    assert result.returncode == 2 and "leave one out" in result.stderr


def test_the_users_plugins_come_beside_ours_and_not_in_their_place(lab):
    plugin = lab.folder / "mine.py"
    plugin.touch()
    lab.run("full_run.sh", "--external_plugins", plugin, "--max_steps", 3, GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    names = [Path(name).name for name in values(call["argv"], "--external_plugins")]
    assert names[0] == "images_and_answers.py" and names[-1] == "mine.py"
    assert call["argv"].count("--external_plugins") == 1
    assert values(call["argv"], "--max_steps") == ["3"]


def test_data_and_rewards_of_the_command_line_are_checked_in_place_of_the_settings(lab):
    shutil.copy(lab.folder / "train.jsonl", lab.folder / "more.jsonl")
    data = ["--dataset", "more.jsonl", "more.jsonl#1"]
    rewards = ["--reward_funcs", "ocr_length", "format", "--reward_weights", "1", "1"]
    lab.run("rl_run.sh", *data, *rewards, DATASET="absent.jsonl", GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--dataset") == ["more.jsonl", "more.jsonl#1"]
    assert values(call["argv"], "--reward_funcs") == ["ocr_length", "format"]


def test_an_adapter_of_the_command_line_is_checked_in_place_of_the_setting(lab):
    shutil.copytree(lab.folder / "adapter", lab.folder / "mine")
    result = lab.run("export_lora.sh", "--adapters", "mine", GPUS="", ADAPTER="absent")
    assert result.returncode == 0, result.stderr
    result = lab.run("export_lora.sh", "--adapters", ".", GPUS="", OUTPUT="ckpt/other")
    assert result.returncode == 2 and result.stderr.startswith("error: . holds no adapter"), result.stderr


# --- devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "visible", "processes"),
    [
        ({}, "", None),
        ({"GPUS": "", "STUB_GPUS": "4"}, "", None),
        ({"STUB_GPUS": "1"}, "0", "1"),
        ({"STUB_GPUS": "4"}, "0,1,2,3", "4"),
        ({"STUB_GPUS": "4", "GPUS": "2,3"}, "2,3", "2"),
        ({"STUB_GPUS": "4", "CUDA_VISIBLE_DEVICES": "1,3"}, "1,3", "2"),
        ({"CPU_PROCESSES": "2"}, "", "2"),
        ({"GPUS": "0", "NPROC_PER_NODE": "8"}, "0", "1"),
        ({"GPUS": "0", "NNODES": "2", "MASTER_ADDR": "a"}, "0", "1"),
    ],
    ids=str,
)
def test_devices_decide_processes_and_flags(lab, env, visible, processes):
    lab.run("full_run.sh", STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == visible
    assert call["env"].get("NPROC_PER_NODE") == processes
    assert ("--deepspeed" in call["argv"]) == bool(visible)
    assert ("--use_cpu" in call["argv"]) == (not visible)
    assert ("--ddp_backend" in call["argv"]) == bool(not visible and processes)
    assert values(call["argv"], "--torch_dtype") == ["bfloat16" if visible else "float32"]


@pytest.mark.parametrize(
    ("base", "env", "merged"),
    [
        ("float32", {"GPUS": "0"}, "float32"),
        ("float16", {"GPUS": "0"}, "float16"),
        ("bfloat16", {"GPUS": "0"}, "bfloat16"),
        ("float16", {"GPUS": "0", "DTYPE": "bfloat16"}, "bfloat16"),
        ("bfloat16", {"GPUS": ""}, "float32"),
    ],
)
def test_an_adapter_is_merged_no_less_precisely_than_its_base_is_kept(lab, own, base, env, merged):
    model = own("qwen3_vl")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": base} | {
        part: config[part] | {"dtype": base} for part in ("text_config", "vision_config")
    }))  # fmt: skip
    lab.run("export_lora.sh", MODEL=str(model), STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    assert values(call["argv"], "--torch_dtype") == [merged]


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


def test_a_node_that_would_train_by_other_flags_than_the_first_is_refused_whichever_begins(lab):
    nodes = {"NNODES": "2", "STUB_GPUS": "1", "MASTER_ADDR": "127.0.0.1"}
    other = lab.start("full_run.sh", NODE_RANK=1, STUB_MEMORY=24000, **nodes)  # a row at once where the first has four
    wait_for(lambda: (lab.work / "lock-1").exists())
    main = lab.until_hanging("full_run.sh", NODE_RANK=0, STUB_HANG_AT=1, **nodes)
    _, err = other.communicate(timeout=120)
    main.terminate()
    main.communicate(timeout=60)
    assert other.returncode == 2 and re.fullmatch(r"error: node 1 would train by another line than [^\n]*\n", err), err
    assert [call["env"]["NODE_RANK"] for call in lab.calls("sft")] == ["0"]


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
    assert lab.calls()[0]["argv"].count(secret) == 2, "the trainer gets it"
    assert secret not in result.stdout + result.stderr
    for file in lab.out.parent.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(("key", "offline"), [("", True), ("k", False)])
def test_without_a_key_wandb_is_offline_and_says_so_once(lab, key, offline):
    result = lab.run("full_run.sh", GPUS="", STUB_FAIL_AT=1, WANDB_API_KEY=key)
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
        assert not re.search(r"(^|\s)\\\s+(#.*)?$", line), f"line {number}: a backslash that continues nothing"
        assert not line.lstrip().startswith("#") or not line.endswith("\\"), (
            f"line {number}: a comment with a backslash"
        )
