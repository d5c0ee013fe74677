"""What lib/common.sh makes of a line: the shell alone, no launcher."""

import os
import subprocess
import sys

import pytest
from helpers.lab import executable, values
from helpers.paths import ROOT


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
    [
        ["--optimizer", "head_rates"],
        ["--optimizer=active_heads"],
        ["--callbacks", "dynamic_sparsity"],
        ["--callbacks=dynamic_sparsity"],
    ],
    ids=" ".join,
)
def test_what_deepspeed_cannot_do_runs_without_it_and_with_float32_weights(settle, flags, gpus):
    line = settle("sft", *FULL, user=flags, GPUS=gpus)
    assert "deepspeed" not in line and line["torch_dtype"] == "float32"


@pytest.mark.parametrize("flags", [["--deepspeed", ""], ["--deepspeed="], ["--fsdp", "fsdp2"]], ids=str)
def test_where_a_flag_turns_deepspeed_off_weights_are_float32(settle, flags):
    line = settle("sft", *FULL, user=flags, GPUS="0,1")
    assert line["torch_dtype"] == "float32" and not line.get("deepspeed")


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
    taught = settle("gkd", *FULL, "--teacher_model", model, GPUS="0,1,2,3,4,5,6,7", GLOBAL_BATCH=64, MODEL=model)
    assert taught["deepspeed"] == "zero2", "each GPU has the whole teacher, too"


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


def test_flags_that_are_written_into_a_launcher_count_as_those_on_its_line(settle, packages):
    packages("liger_kernel")
    own = ["--per_device_train_batch_size", "2", "--deepspeed", "zero3"]
    line = settle("sft", *FULL, *own, GPUS="0")
    assert rows(line) == (2, 8)
    assert line["deepspeed"] == "zero3" and "use_liger_kernel" not in line


def test_the_users_own_accumulation_comes_last(settle):
    line = settle("sft", *FULL, user=["--gradient_accumulation_steps", "7"], GPUS="0", GLOBAL_BATCH=5)
    assert line["gradient_accumulation_steps"] == "7"


@pytest.mark.parametrize(
    ("user", "steps"),
    [(["--num_train_epochs", 3], "-1"), (["--max_steps", 9, "--num-train-epochs=3"], "-1"),
     (["--num_train_epochs", 3, "--max_steps", 9], "9"), ([], "12000")],
    ids=str,
)  # fmt: skip
def test_epochs_that_a_user_names_count_in_place_of_steps(settle, user, steps):
    """Where both are there, the trainer goes by steps."""
    assert settle("sft", *FULL, "--max_steps", 12000, user=user)["max_steps"] == steps


@pytest.mark.parametrize(("memory", "batch"), [("81559", 4), ("24564", 1)])
def test_small_gpus_get_one_row_at_once(settle, memory, batch):
    assert rows(settle("sft", *FULL, GPUS="0", STUB_MEMORY=memory))[0] == batch


@pytest.mark.parametrize(
    ("said", "gpus", "expected"),
    [
        ("0, 81559\\n1, 24576", "0,1", "24576"),
        ("0, 81559\\n1, 24576", "0", "81559"),
        ("0, 81559\\n1, 24576", "", "0"),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", "0", "0"),
        ("0, [N/A]", "0", "0"),
        ("0, 81559", "MIG-GPU-a/1/0", "0"),
    ],
)
def test_the_memory_of_gpus_is_nvidia_smis(lab, said, gpus, expected):
    executable(lab.folder / "env/bin/nvidia-smi", f"#!/bin/sh\nprintf '{said}\\n'\n")
    done = subprocess.run(
        ["bash", "-c", f'source "{ROOT}/lib/common.sh"; gpu_memory', "full_run.sh"],
        cwd=lab.folder, env=lab.env | {"GPUS": gpus}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


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


@pytest.mark.parametrize(("more", "unpadded"), [([], False), (["fla"], True)], ids=str)
def test_layers_of_linear_attention_read_unpadded_rows_only_by_fla(settle, packages, tiny, more, unpadded):
    packages("flash_attn", *more)
    line = settle("sft", *FULL, MODEL=tiny("qwen3_5"))
    assert line["attn_impl"] == "flash_attention_2" and ("padding_free" in line) == unpadded


@pytest.mark.parametrize(("family", "grouped"), [("qwen3", True), ("qwen3_vl", False)])
def test_without_flash_attention_rows_of_text_are_grouped_by_length_and_images_not_decoded_beforehand(
    settle, tiny, family, grouped
):
    assert ("group_by_length" in settle("sft", *FULL, MODEL=tiny(family))) == grouped


@pytest.mark.parametrize(("lmbda", "memory", "batch"), [("1", 81559, "16"), ("0", 81559, "4"), ("0.0", 24000, "1")])
def test_a_distillation_is_judged_in_large_batches_only_where_its_answers_are_generated(settle, lmbda, memory, batch):
    line = settle("gkd", *FULL, "--lmbda", lmbda, GPUS="0", STUB_MEMORY=memory)
    assert line["per_device_eval_batch_size"] == batch


def test_liger_stays_off_where_its_loss_does_not_fit(lab, settle, packages):
    packages("liger_kernel")
    (lab.folder / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    (lab.folder / "other.json").write_text('{"zero_optimization": {"stage": 2}, "mine": {"stage": 3}}')
    for deepspeed, fits in (("zero3", False), ("mine.json", False), ("other.json", True)):
        assert ("use_liger_kernel" in settle("sft", *FULL, DEEPSPEED=deepspeed)) == fits
    long = ("--max_completion_length", "4096")
    assert "use_liger_kernel" in settle("gkd", *FULL, *long)
    assert "use_liger_kernel" not in settle("gkd", *FULL, *long, user=["--gkd-logits-topk=64"])
    assert "use_liger_kernel" not in settle("gkd", *FULL, *long, user=["--sft_alpha", "0.1"])
    assert "use_liger_kernel" not in settle("gkd", *FULL, "--max_completion_length", "512")


def test_a_configuration_of_deepspeeds_without_a_stage_is_refused_in_one_line(lab, settle):
    (lab.folder / "mine.json").write_text('{"stage": 3}')
    expected = 'error: --deepspeed mine.json: has no "zero_optimization", an object with a "stage"\n'
    assert settle("sft", *FULL, DEEPSPEED="mine.json") == {"refused": expected, "code": "2"}


def test_liger_does_without_a_teacher_whose_head_is_padded_to_another_size(lab, settle, packages, tiny):
    packages("liger_kernel")
    long = ("--max_completion_length", "4096", "--teacher_model")
    teacher = lab.folder / "padded"
    teacher.mkdir()
    config = (tiny("qwen3") / "config.json").read_text()
    (teacher / "config.json").write_text(config.replace('"vocab_size": 128', '"vocab_size": 192'))
    assert "use_liger_kernel" in settle("gkd", *FULL, *long, tiny("qwen3"), MODEL=tiny("qwen3"))
    assert "use_liger_kernel" not in settle("gkd", *FULL, *long, teacher, MODEL=tiny("qwen3"))


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_weights_that_zero3_shares_out_go_to_vllm_layer_by_layer(settle, mode):
    vllm = ("--use_vllm", "true", "--vllm_mode", mode)
    assert settle("grpo", *FULL, *vllm, DEEPSPEED="zero3")["move_model_batches"] == "16"
    assert "move_model_batches" not in settle("grpo", *FULL, *vllm)


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
        [sys.executable, "-m", "prunekit.training.speedups", str(tmp_path)], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT}"} | env,
    )  # fmt: skip
    assert result.stdout.split() == [*found.split(), "padding_free"]


@pytest.mark.parametrize(
    ("gpus", "batch", "accumulation"), [("", 8, 4), ("0", 8, 4), ("0,1,2,3", 8, 1), ("0,1,2,3,4,5,6,7", 4, 1)]
)
def test_rl_steps_are_four_prompts_and_four_of_them_a_rollout(lab, gpus, batch, accumulation):
    lab.run("rl_run.sh", GPUS=gpus, STUB_FAIL_AT=1, STUB_GPUS=8)
    [call] = lab.calls()
    assert values(call["argv"], "--per_device_train_batch_size") == [str(batch)]
    assert values(call["argv"], "--gradient_accumulation_steps") == [str(accumulation)]
    assert values(call["argv"], "--steps_per_generation") == [str(4 * accumulation)]


def test_a_generation_batch_that_a_user_names_takes_the_place_of_steps(lab):
    """ms-swift takes one of the two."""
    lab.run("rl_run.sh", "--generation_batch_size", 64, GPUS="0", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert "--steps_per_generation" not in call["argv"]


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


@pytest.mark.parametrize(
    ("env", "offline"),
    [({}, "1"), ({"HF_HUB_OFFLINE": "0"}, "0"), ({"PLAIN": "1"}, None), ({"DATASET": "train.jsonl#1"}, "1"),
     ({"DATASET": "org/rows#1"}, None), ({"VAL_DATASET": "org/rows"}, None)],
    ids=str,
)  # fmt: skip
def test_the_hub_is_not_asked_about_a_kernel_that_is_here_unless_data_come_from_it(lab, env, offline):
    (lab.folder / "packages/flash_attn").mkdir()
    lab.run("full_run.sh", GPUS="0", STUB_FAIL_AT=1, **env)
    [call] = lab.calls()
    assert call["env"].get("HF_HUB_OFFLINE") == offline


def test_a_reward_model_of_the_hub_is_fetched_though_the_kernel_is_here(lab):
    (lab.folder / "packages/flash_attn").mkdir()
    lab.run("rl_run.sh", "--reward_model", "org/judge", "--reward_weights", *[1] * 5, GPUS="0", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert "HF_HUB_OFFLINE" not in call["env"]


def test_training_alone_on_a_gpu_may_grow_its_segments(lab):
    lab.run("full_run.sh", GPUS="0", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert call["env"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert call["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
