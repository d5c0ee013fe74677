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

import pytest
from helpers.lab import Lab, check_flags, executable, free_port, values
from helpers.paths import ROOT

from prunekit.checkpoint import history, open_checkpoint

TRAINERS = ["full_run.sh", "distil.sh", "lora.sh", "rl_run.sh"]
LAUNCHERS = [*TRAINERS, "export_lora.sh"]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.sh"), *ROOT.glob("lib/*.sh")))


# --- flags ----------------------------------------------------------------------------------------------------


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


def test_the_users_plugins_come_beside_ours_and_not_in_their_place(lab):
    plugin = lab.folder / "mine.py"
    plugin.touch()
    lab.run("full_run.sh", "--external_plugins", plugin, "--max_steps", 3, GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    names = [Path(name).name for name in values(call["argv"], "--external_plugins")]
    assert names[0] == "qwen_vl_token_ids.py" and names[-1] == "mine.py"
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


# --- what a line is made of: the shell alone, no launcher ---------------------------------------------------------


@pytest.fixture
def settle(lab):
    """settle(kind, *flags, user=[...], **env): what settle makes of a launcher's flags; a dict of flags, "" if bare.

    Its standard output is under "said".
    """

    def run(kind: str, *flags: object, user: tuple = (), most: int = 4, **env: object) -> dict[str, str]:
        script = f'source "{ROOT}/lib/common.sh"; settle {kind} {most} {" ".join(map(str, flags))}; '
        script += 'printf "%s\\n" @ "${LINE[@]}" --DISK "$DISK_FACTOR"'
        environment = lab.env | {"STUB_GPUS": "8", "GPUS": "0"} | {k: str(v) for k, v in env.items()}
        result = subprocess.run(
            ["bash", "-c", script, "full_run.sh", *map(str, user)],
            cwd=lab.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if result.returncode:
            return {"refused": result.stderr, "code": str(result.returncode)}
        said, _, line = result.stdout.partition("@\n")
        words, found = line.splitlines(), {"said": said}
        for word, following in zip(words, [*words[1:], "--"]):
            if word.startswith("--"):
                found[word.removeprefix("--")] = "" if following.startswith("--") else following
        return found

    return run


@pytest.fixture
def packages(lab, settle):
    """packages(*names): have Python packages of these names be importable."""

    def install(*names: str) -> None:
        for name in names:
            (lab.folder / "site" / name).mkdir(parents=True)
            (lab.folder / "site" / name / "__init__.py").touch()
        lab.env["PYTHONPATH"] = f"{lab.folder / 'site'}:{ROOT}"

    return install


FULL = ("--tuner_type", "full", "--learning_rate", "1e-6")


@pytest.mark.parametrize("gpus", ["0", "0,1"])
def test_on_gpus_deepspeed_keeps_float32_copies_of_what_is_trained(settle, gpus):
    line = settle("sft", *FULL, GPUS=gpus)
    assert (line["torch_dtype"], line["bf16"], line["fp16"]) == ("bfloat16", "true", "false")
    assert line["deepspeed"].startswith("zero")


@pytest.mark.parametrize("env", [{"GPUS": "0"}, {"GPUS": "0,1"}, {"GPUS": "", "DTYPE": "bfloat16"}], ids=str)
def test_without_deepspeed_weights_are_float32_under_bfloat16_autocast(settle, env):
    line = settle("sft", *FULL, DEEPSPEED="", **env)
    assert (line["torch_dtype"], line["bf16"], line["fp16"]) == ("float32", "true", "false")
    assert "deepspeed" not in line


@pytest.mark.parametrize("gpus", ["0", "0,1"])
@pytest.mark.parametrize(
    "flags",
    [["--optimizer", "head_rates"], ["--optimizer", "active_heads"], ["--callbacks", "dynamic_sparsity"]],
    ids=" ".join,
)
def test_what_deepspeed_cannot_do_runs_without_it_and_with_float32_weights(settle, flags, gpus):
    line = settle("sft", *FULL, user=flags, GPUS=gpus)
    assert "deepspeed" not in line and line["torch_dtype"] == "float32"


@pytest.mark.parametrize("gpus", ["", "0"])
@pytest.mark.parametrize("deepspeed", ["", "zero2"])
def test_computing_in_float32_is_never_float16(settle, gpus, deepspeed):
    line = settle("sft", *FULL, GPUS=gpus, DTYPE="float32", DEEPSPEED=deepspeed)
    assert (line["torch_dtype"], line["bf16"], line["fp16"]) == ("float32", "false", "false")


def test_the_base_of_a_lora_stays_in_16_bits(settle):
    line = settle("sft", "--tuner_type", "lora", "--learning_rate", "1e-6", GPUS="0")
    assert line["torch_dtype"] == "bfloat16" and "deepspeed" not in line


@pytest.mark.parametrize("gpus", ["", "0"])
def test_steps_that_bfloat16_weights_would_round_away_are_refused(settle, gpus):
    user = ["--torch_dtype", "bfloat16"]
    refusal = settle("sft", *FULL, user=user, GPUS=gpus, DEEPSPEED="")
    assert refusal["code"] == "2"
    assert refusal["refused"].startswith(
        "error: --torch_dtype bfloat16 would round steps of --learning_rate 1e-6 away: "
    )
    assert "refused" not in settle("sft", *FULL, user=[*user, "--learning_rate", "8e-5"], GPUS=gpus, DEEPSPEED="")
    assert "refused" not in settle("sft", *FULL, user=user, GPUS="0", DEEPSPEED="zero2")


@pytest.mark.parametrize(("gpus", "deepspeed", "factor"), [("0", "zero2", "25"), ("0", "", "19"), ("", "", "19")])
def test_room_is_asked_for_three_checkpoints_with_their_optimizer_states(settle, gpus, deepspeed, factor):
    assert settle("sft", *FULL, GPUS=gpus, DEEPSPEED=deepspeed)["DISK"] == factor
    assert settle("sft", "--tuner_type", "lora", GPUS=gpus, DEEPSPEED=deepspeed)["DISK"] == "1.1"


@pytest.mark.parametrize("deepspeed", ["zero3", "zero3_offload"])
def test_deepspeed_is_honoured_on_one_gpu(settle, deepspeed):
    assert settle("sft", *FULL, GPUS="0", DEEPSPEED=deepspeed)["deepspeed"] == deepspeed


@pytest.mark.parametrize(("megabytes", "zero"), [(17000, "zero1"), (19000, "zero2")])
def test_gradients_are_kept_whole_where_they_fit(lab, settle, megabytes, zero):
    """2 bytes a parameter of weights and gradients each, an eighth of 12, and 40% of 80 GB left."""
    model = lab.folder / "big"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(megabytes * 2**20)  # a hole
    line = settle("sft", *FULL, GPUS="0,1,2,3,4,5,6,7", GLOBAL_BATCH=64, MODEL=model)
    assert line["deepspeed"] == zero
    assert settle("sft", *FULL, GPUS="0,1,2,3,4,5,6,7", GLOBAL_BATCH=32, MODEL=model)["deepspeed"] == "zero2"


def rows(line):
    return int(line["per_device_train_batch_size"]), int(line["gradient_accumulation_steps"])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("setting", ["GPUS", "CPU_PROCESSES"])
def test_a_step_has_as_many_rows_on_any_number_of_gpus(settle, processes, setting):
    many = {"GPUS": ",".join(map(str, range(processes)))} if setting == "GPUS" else {"GPUS": "", setting: processes}
    batch, accumulation = rows(settle("sft", *FULL, **many))
    assert batch * accumulation * processes == 16
    batch, accumulation = rows(settle("sft", *FULL, GLOBAL_BATCH=24, **many))
    assert batch * accumulation * processes == 24


def test_on_three_gpus_a_step_has_the_nearest_number_of_rows_and_says_it(settle):
    line = settle("sft", *FULL, GPUS="0,1,2")
    assert rows(line) == (1, 5)
    assert "15 rows a step" in line["said"]


def test_a_global_batch_that_cannot_be_shared_out_is_refused(settle):
    refusal = settle("sft", *FULL, GPUS="0,1,2", GLOBAL_BATCH=16)
    assert refusal == {
        "code": "2",
        "refused": "error: GLOBAL_BATCH=16 does not divide by 1 rows on each of 3: give a multiple of 3\n",
    }


def test_nodes_share_a_step(settle):
    assert rows(settle("sft", *FULL, GPUS="0,1", NNODES=4, MASTER_ADDR="a")) == (2, 1)


@pytest.mark.parametrize("flag", [["--per_device_train_batch_size", "8"], ["--per-device-train-batch-size=8"]], ids=str)
def test_the_users_own_batch_counts(settle, flag):
    line = settle("sft", *FULL, user=flag, GPUS="0")
    assert line["gradient_accumulation_steps"] == "2"


def test_the_users_own_accumulation_comes_last(settle):
    line = settle("sft", *FULL, user=["--gradient_accumulation_steps", "7"], GPUS="0", GLOBAL_BATCH=5)
    assert line["gradient_accumulation_steps"] == "7"


@pytest.mark.parametrize(("memory", "batch"), [("81559", 4), ("24564", 1)])
def test_small_gpus_get_one_row_at_once(settle, memory, batch):
    assert rows(settle("sft", *FULL, GPUS="0", STUB_MEMORY=memory))[0] == batch


def test_what_makes_training_faster_is_on_where_it_is_installed_and_said(settle, packages):
    packages("flash_attn", "liger_kernel")
    line = settle("sft", *FULL, GPUS="0,1")
    expected = {
        "attn_impl": "flash_attention_2",
        "padding_free": "true",
        "use_liger_kernel": "true",
        "per_device_eval_batch_size": "4",
    }
    assert expected.items() <= line.items()
    assert int(line["dataloader_num_workers"]) > 0
    said = line["said"].splitlines()[-1]
    assert said.startswith("for speed: ") and "PLAIN=1" in said
    assert all(f"--{flag} {value}" in said for flag, value in expected.items())


def test_plain_leaves_all_of_it_out(settle, packages):
    packages("flash_attn", "liger_kernel")
    line = settle("sft", *FULL, GPUS="0,1", PLAIN=1)
    assert not line.keys() & {
        "attn_impl",
        "padding_free",
        "use_liger_kernel",
        "group_by_length",
        "dataloader_num_workers",
    }
    assert rows(line)[0] == 1 and "for speed" not in line["said"]


def test_on_a_cpu_there_is_none_of_it(settle, packages):
    packages("flash_attn", "liger_kernel")
    assert not settle("sft", *FULL, GPUS="").keys() & {
        "attn_impl",
        "padding_free",
        "use_liger_kernel",
        "group_by_length",
    }


def test_nothing_is_unpadded_without_flash_attention(settle, packages):
    packages("flash_attn")
    assert "padding_free" not in settle("sft", *FULL, user=["--attn_impl", "sdpa"])
    assert not {"padding_free", "attn_impl"} & settle("sft", *FULL, DTYPE="float32").keys()


@pytest.mark.parametrize(("family", "grouped"), [("qwen3", True), ("qwen3_vl", False)])
def test_without_flash_attention_rows_of_text_are_grouped_by_length_and_images_not_decoded_beforehand(
    settle, tiny, family, grouped
):
    assert ("group_by_length" in settle("sft", *FULL, MODEL=tiny(family))) == grouped


def test_liger_stays_off_where_its_loss_does_not_fit(settle, packages):
    packages("liger_kernel")
    assert "use_liger_kernel" not in settle("sft", *FULL, DEEPSPEED="zero3")
    long = ("--max_completion_length", "4096")
    assert "use_liger_kernel" in settle("gkd", *FULL, *long)
    assert "use_liger_kernel" not in settle("gkd", *FULL, *long, user=["--gkd-logits-topk=64"])
    assert "use_liger_kernel" not in settle("gkd", *FULL, *long, user=["--sft_alpha", "0.1"])
    assert "use_liger_kernel" not in settle("gkd", *FULL, "--max_completion_length", "512")


def test_weights_that_zero3_shares_out_go_to_vllm_layer_by_layer(settle):
    colocate = ("--use_vllm", "true", "--vllm_mode", "colocate")
    assert settle("grpo", *FULL, *colocate, DEEPSPEED="zero3")["move_model_batches"] == "16"
    assert "move_model_batches" not in settle("grpo", *FULL, *colocate)


@pytest.mark.parametrize(
    ("installed", "cached", "found"),
    [([], "", ""), (["flash_attn"], "", "flash_attention_2"), (["kernels"], "", ""),
     (["kernels"], ".cache/huggingface/hub/kernels", "flash_attention_2"),
     (["kernels"], "elsewhere/models", "flash_attention_2"), ([], "elsewhere/kernels", ""),
     (["liger_kernel"], "", "liger")],
    ids=str,
)  # fmt: skip
def test_flash_attention_is_a_package_or_a_kernel_that_no_training_has_to_fetch(tmp_path, installed, cached, found):
    if cached:
        (tmp_path / f"{cached}--kernels-community--flash-attn2/snapshots/1").mkdir(parents=True)
    env = {"HF_HUB_CACHE": str(tmp_path / "elsewhere")} if "elsewhere" in cached else {}
    for name in installed:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / f"{name}-0.17.2.dist-info").mkdir()
        (tmp_path / f"{name}-0.17.2.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.17.2\n"
        )
    result = subprocess.run(
        [sys.executable, "-m", "prunekit.training.speedups"], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT}"} | env,
    )  # fmt: skip
    assert result.stdout.strip() == found


@pytest.mark.parametrize(
    ("gpus", "batch", "accumulation"), [("", 8, 4), ("0", 8, 4), ("0,1,2,3", 8, 1), ("0,1,2,3,4,5,6,7", 4, 1)]
)
def test_rl_steps_are_four_prompts_and_four_of_them_a_rollout(lab, gpus, batch, accumulation):
    lab.run("rl_run.sh", GPUS=gpus, STUB_FAIL_AT=1, STUB_GPUS=8)
    [call] = lab.calls()
    assert values(call["argv"], "--per_device_train_batch_size") == [str(batch)]
    assert values(call["argv"], "--gradient_accumulation_steps") == [str(accumulation)]
    assert values(call["argv"], "--steps_per_generation") == [str(4 * accumulation)]


@pytest.mark.parametrize("gpus", ["0", "0,1,2"])
def test_rl_evaluates_whole_groups(lab, gpus):
    lab.run("rl_run.sh", GPUS=gpus, STUB_FAIL_AT=1)
    [call] = lab.calls()
    [batch] = values(call["argv"], "--per_device_eval_batch_size")
    assert int(batch) % int(values(call["argv"], "--num_generations")[0]) == 0


def test_colocated_weights_are_dropped_while_training(lab):
    for env, level in (({}, "2"), ({"PLAIN": "1"}, "1")):
        lab.run("rl_run.sh", GPUS="0", STUB_FAIL_AT=1, RESTART="1", **env)
        assert values(lab.calls()[-1]["argv"], "--sleep_level") == [level]
        assert "PYTORCH_CUDA_ALLOC_CONF" not in lab.calls()[-1]["env"], "vLLM's sleep refuses it"


def test_training_alone_on_a_gpu_may_grow_its_segments(lab):
    lab.run("full_run.sh", GPUS="0", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert call["env"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert call["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


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
    assert names >= {"README.md", "command.sh"}
    assert (lab.out / "command.sh").read_text().startswith(f"# {stage}, run in {lab.folder}\nswift ")
    if launcher != "export_lora.sh":
        assert names >= {"logging.jsonl", "curves.png"}
    assert not lab.work.exists()
    assert lab.left() == []
    assert f"{stage}: wrote ckpt/out\n" in result.stdout


def test_a_lora_is_published_as_an_adapter(lab):
    assert lab.run("lora.sh", GPUS="").returncode == 0
    names = {file.name for file in lab.out.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "command.sh", "curves.png"}
    assert "\nlibrary_name: peft\n" in (lab.out / "README.md").read_text()
    assert not lab.work.exists()


@pytest.mark.parametrize(("before", "after"), [("0,1", "0"), ("0", "0,1,2")])
def test_deepspeed_resumes_with_as_many_gpus_only_and_it_is_said(lab, before, after):
    flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
    lab.run("full_run.sh", *flags, GPUS=before, DEEPSPEED="zero2", STUB_FAIL_AT=3)
    other = lab.run("full_run.sh", *flags, GPUS=after, DEEPSPEED="zero2")
    assert other.returncode == 2
    assert f"a run of {len(before.split(','))} processes" in other.stderr and "RESTART=1" in other.stderr
    again = lab.run("full_run.sh", *flags, GPUS=before, DEEPSPEED="zero2")
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
    [wrapper] = [pid for pid in lab.left() if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(process.pid)]
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
    assert trainer["env"]["NPROC_PER_NODE"] == str(len(training.split(",")))
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


@pytest.mark.parametrize("lmbda", [{"LMBDA": "0"}, {"flags": ["--lmbda", "0.0"]}], ids=str)
def test_without_answers_of_the_students_own_no_gpu_is_kept_for_a_server(lab, lmbda):
    lab.run("distil.sh", *lmbda.pop("flags", []), GPUS="0,1", STUB_FAIL_AT=1, **lmbda)
    [call] = lab.calls()
    assert call["argv"][0] == "rlhf" and "--use_vllm" not in call["argv"]
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("gpus", "env", "rollout"),
    [("0,1,2,3", {}, "3"), ("0,1,2,3,4,5,6,7", {}, "6,7"), ("0,1,2,3,4,5,6,7", {"PLAIN": "1"}, "7")],
)
def test_a_quarter_of_the_gpus_generates(lab, gpus, env, rollout):
    lab.run("distil.sh", GPUS=gpus, STUB_FAIL_AT=1, **env)
    assert lab.calls("rollout")[0]["env"]["CUDA_VISIBLE_DEVICES"] == rollout


def test_vllm_shares_all_gpus_if_none_are_kept_for_it(lab):
    lab.run("distil.sh", GPUS="0,1", ROLLOUT_GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--vllm_mode") == ["colocate"]
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_ports_are_free_ones_and_may_be_others_when_a_run_goes_on(lab):
    for fail in ({"STUB_FAIL_AT": "3"}, {}):
        result = lab.run("distil.sh", GPUS="0,1", **fail)
    assert result.returncode == 0, result.stderr
    ports = []
    for server, trainer in zip(lab.calls("rollout"), lab.calls("rlhf")):
        [port] = values(server["argv"], "--port")
        assert values(trainer["argv"], "--vllm_server_port") == [port]
        ports += [port, *values(trainer["argv"], "--vllm_server_group_port")]
    assert len(set(ports)) == 4 and not {"8000", "51216"} & set(ports)
    assert "--resume_from_checkpoint" in trainer["argv"]


def test_flags_for_vllm_reach_the_server(lab, parsers):
    user = [
        "--vllm_max_model_len",
        "60",
        "--vllm_enforce_eager",
        "true",
        "--vllm_server_timeout",
        "9",
        "--max_steps",
        "3",
    ]
    lab.run("distil.sh", *user, GPUS="0,1", STUB_FAIL_AT=1)
    [server] = lab.calls("rollout")
    assert values(server["argv"], "--vllm_max_model_len") == ["60"]
    assert values(server["argv"], "--vllm_enforce_eager") == ["true"]
    check_flags(parsers["rollout"], server["argv"][1:])


@pytest.mark.parametrize(("gpus", "kind"), [("0", "rlhf"), ("0,1", "rollout")])
def test_the_engine_is_as_long_as_a_row_and_its_answer_and_no_longer_than_the_model(lab, gpus, kind):
    settings = json.loads((Path(lab.env["MODEL"]) / "config.json").read_text())
    positions = settings["text_config"]["max_position_embeddings"]
    for flags, length in ((["--max_length", "30", "--max_completion_length", "10"], 40), ([], positions)):
        lab.run("distil.sh", *flags, GPUS=gpus, STUB_FAIL_AT=1, RESTART="1")
        assert values(lab.calls(kind)[-1]["argv"], "--vllm_max_model_len") == [str(length)]


def test_a_server_computes_in_16_bits_whatever_is_trained(lab):
    lab.run("distil.sh", GPUS="0,1", DEEPSPEED="", STUB_FAIL_AT=1)
    assert values(lab.calls("rlhf")[0]["argv"], "--torch_dtype") == ["float32"]
    assert values(lab.calls("rollout")[0]["argv"], "--torch_dtype") == ["bfloat16"]


def test_of_several_nodes_the_first_has_the_server_and_the_others_train_on_all_gpus(lab):
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "GPUS": "0,1"}
    main = lab.until_hanging("distil.sh", NODE_RANK=0, STUB_HANG_AT=1, **nodes)
    other = lab.run("distil.sh", NODE_RANK=1, **nodes)
    assert other.returncode == 0, other.stderr
    main.terminate()
    main.communicate(timeout=60)
    assert len(lab.calls("rollout")) == 1
    here, there = lab.calls("rlhf")
    assert [call["env"]["CUDA_VISIBLE_DEVICES"] for call in (here, there)] == ["0", "0,1"]
    assert [values(call["argv"], "--gradient_accumulation_steps") for call in (here, there)] == [
        ["5"],
        ["5"],
    ], "of 3 GPUs"


# --- knockouts ---


@pytest.fixture
def knockouts(lab):
    """knockouts(**env): the arguments of prunekit.knockout.sweep for a sweep without a scan, which isn't run."""
    told = lab.folder / "told"
    executable(
        lab.folder / "env/bin/python",
        f'#!/bin/sh\n[ "$2" = prunekit.knockout.sweep ] || exec {sys.executable} "$@"\nprintf "%s\\n" "$@" > {told}\n',
    )

    def run(**env: str) -> list[str]:
        result = lab.run("knockout_check.sh", MODE="train", **env)
        assert result.returncode == 0, result.stderr
        return told.read_text().splitlines()

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


EVERY = [*LAUNCHERS, "knockout_check.sh", "progressive_run.sh", "sparse_run.sh"]
BAD_SETTINGS = [
    *(({name: value}, "full_run.sh") for name, value in {
        "CPU_PROCESSES": "abc", "NNODES": "many", "NODE_RANK": "1", "MASTER_PORT": "70000", "DTYPE": "fp16",
        "PLAIN": "yes",
        "RESTART": "yes", "KEEP_RUN": "-", "OVERWRITE": "true", "CHECKPOINT": "first", "GLOBAL_BATCH": "0",
        "DEEPSPEED": "zero9",
    }.items()),
    *(({"GPUS": gpus}, "full_run.sh") for gpus in ("abc", "99", "0,0", "-1", "0,", "0 1")),
    ({"NNODES": "2"}, "full_run.sh"),
    *(({name: value}, "progressive_run.sh") for name, value in {
        "STEPS1": "0", "STEPS2": "-1", "STEPS3": "a b", "ACCUMULATE": "a[$(touch pwned)]",
    }.items()),
    *(({name: value}, "knockout_check.sh") for name, value in {
        "JOBS": "x", "GREEDY": "-5", "GENERATE": "-1", "GENERATE_TOKENS": "0", "HEAL": "yes", "RACE": "2",
        "GPUS_PER_TASK": "x", "TARGET_PARAMS": "2",
        "TEXT_LAYERS": "a", "VISION_BLOCKS": "1..3", "FINALISTS": "-1", "MODE": "x",
    }.items()),
    *(({name: value}, "sparse_run.sh") for name, value in {
        "REFIT": "yes", "CYCLES": "-1", "SPARSITY": "1", "START": "x", "WORSE": "nan", "SCHEDULE": "x", "SCORE": "x",
    }.items()),
    *(({"GPUS": "0,1", name: value}, "distil.sh") for name, value in {
        "ROLLOUT_GPUS": "x", "ROLLOUT_PORT": "0", "ROLLOUT_DEADLINE": "soon",
    }.items()),
    *(({"MASTER_ADDR": "a", "NNODES": "2"}, name) for name in ("export_lora.sh", "knockout_check.sh", "sparse_run.sh")),
    ({"GPUS": "0,1,2", "JOBS": "2"}, "knockout_check.sh"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "launcher"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused_by_the_shell_alone(lab, env, launcher):
    """In one line that names them, before Python, which takes seconds, is called or anything is written."""
    executable(lab.folder / "env/bin/python", "#!/bin/sh\nexit 9\n")
    refused(lab, launcher, f"{list(env)[-1]}=", STUB_GPUS="4", **env)


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


def test_a_build_that_was_killed_does_not_hold_up_the_next(lab):
    lock = lab.folder / ".cache/torch_extensions/py311_cu130/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    for age, left in ((60, True), (3600, False)):
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        lab.run("full_run.sh", GPUS="0", DEEPSPEED="zero2_offload", STUB_FAIL_AT=1, RESTART=1)
        assert lock.exists() == left, "one that is being built must stay"


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
        ("distil.sh", {"TEACHER": "absent"}, [], "absent"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_GPUS": "0,1"}, [], "leaves no GPU"),
        ("distil.sh", {"GPUS": "0,1", "ROLLOUT_PORT": "many"}, [], "ROLLOUT_PORT=many: give a whole number"),
        ("export_lora.sh", {"ADAPTER": "env"}, [], "env holds no adapter"),
        ("rl_run.sh", {"ALGORITHM": "PPO"}, [], "unknown ALGORITHM PPO: GSPO, GDPO or CHORD"),
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
        assert not re.search(r"(^|\s)\\\s+(#.*)?$", line), f"line {number}: a backslash that continues nothing"
        assert not line.lstrip().startswith("#") or not line.endswith("\\"), (
            f"line {number}: a comment with a backslash"
        )
