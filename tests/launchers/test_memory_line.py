"""What launchers say of memory before they start, and that the command means what they do."""

import pytest

from prunekit.memory import STAGES, defaults
from prunekit.msswift.line import parse

COUNTED = (
    "tuner_type", "lora_rank", "lora_dropout", "target_modules", "freeze_llm", "freeze_vit", "freeze_aligner", "bf16",
    "fp16", "torch_dtype", "deepspeed", "gradient_checkpointing", "per_device_train_batch_size", "optim",
    "gradient_accumulation_steps",
)  # fmt: skip
OF_RLHF = ("rlhf_type", "beta", "use_vllm", "vllm_mode", "sleep_level", "vllm_gpu_memory_utilization")


@pytest.mark.parametrize(
    ("stage", "launcher", "gpus"),
    [
        ("sft", "full_run.sh", "0,1"),
        ("sft", "full_run.sh", "0,1,2,3,4,5,6,7"),
        ("sft", "full_run.sh", ""),
        ("lora", "lora.sh", "0"),
        ("lora", "lora.sh", "0,1"),
        ("gkd", "distil.sh", "0"),
        ("grpo", "rl_run.sh", "0,1"),
        ("grpo", "rl_run.sh", "0,1,2"),
    ],
)
def test_the_commands_own_settings_are_the_launchers(lab, stage, launcher, gpus):
    env = {"DEEPSPEED": "zero2"} if "," in gpus else {}  # what it chooses for itself depends on the model
    result = lab.run(launcher, STUB_GPUS="8", GPUS=gpus, PLAIN="", **env)
    assert result.returncode == 0, result.stderr
    kind = STAGES[stage][0]
    (call,) = lab.calls(kind)
    count = len(gpus.split(",")) if gpus else 0
    theirs, ours = parse(kind, call["argv"][1:]), parse(kind, defaults(stage, count, []))
    names = [name for name in COUNTED if kind == "sft" or not name.startswith("lora")]
    # Where answers are made, a launcher keeps lengths within the model's positions
    names += OF_RLHF if kind == "rlhf" else ("max_length",)
    if stage == "gkd":
        names.remove("beta")  # there it is what the loss is, no reference model
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_a_training_on_gpus_says_its_memory_in_one_line(lab):
    result = lab.run("full_run.sh", "--max_length", 64, STUB_GPUS="2", STUB_MEMORY="80000", MEMORY="1")
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stdout.splitlines() if line.startswith("memory: ")]
    assert "GB a GPU" in said and "rows of 64 tokens" in said and "more than" not in said


@pytest.mark.parametrize("env", [{"MEMORY": "0", "STUB_GPUS": "2"}, {"MEMORY": "1"}])
def test_without_gpus_or_wish_nothing_is_counted(lab, env):
    assert "memory: " not in lab.run("full_run.sh", **env).stdout
