"""Numbers of a line: those that no training can use are refused."""

import pytest
from helpers.swift_lines import check

from prunekit.errors import PruneKitError


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("sft", "--max_length 0", r"--max_length 0: give a number above 0"),
        ("sft", "--learning_rate nan", r"--learning_rate nan: give a finite number"),
        ("sft", "--learning_rate inf", r"--learning_rate inf: give a finite number"),
        ("sft", "--learning_rate 1e400", r"--learning_rate inf: give a finite number"),
        ("sft", "--learning_rate -1", r"--learning_rate -1.0: give 0 or more"),
        ("sft", "--lora_dropout 1", r"--lora_dropout 1.0: give a number from 0 to 1, below 1"),
        ("sft", "--max_steps 0", r"--max_steps 0: give a number of steps, or -1"),
        ("sft", "--max_steps -2", r"--max_steps -2: give a number of steps, or -1"),
        ("sft", "--per_device_train_batch_size 0", r"give a number above 0"),
        ("sft", "--gradient_accumulation_steps -4", r"give a number above 0"),
        ("sft", "--save_steps 0", r"give a number above 0"),
        ("sft", "--seed -1", r"give 0 or more"),
        ("rlhf", "--rlhf_type gkd --lmbda 1.5", r"--lmbda 1.5: give a number from 0 to 1"),
        ("rlhf", "--rlhf_type gkd --beta 2", r"--beta 2.0: give a number from 0 .*to 1"),
        ("rlhf", "--rlhf_type gkd --gkd_logits_topk 0", r"--gkd_logits_topk 0: give a number above 0"),
        ("rlhf", "--rlhf_type gkd --temperature 0", r"--temperature 0.0: give .* above 0: the loss divides by it"),
        ("rlhf", "--rlhf_type grpo --temperature 0", r"--temperature 0.0: give a number above 0"),
        ("rlhf", "--rlhf_type gkd --vllm_gpu_memory_utilization 0", r"give a share of the GPU's memory, above 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_in_one_line(kind, line, message):
    with pytest.raises(PruneKitError, match=message) as error:
        check(kind, *line.split())
    assert "\n" not in str(error.value)
