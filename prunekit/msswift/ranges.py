"""Which numbers ms-swift's flags may have."""

import argparse
import math

from prunekit.errors import PruneKitError

POSITIVE = (
    "max_length", "max_completion_length", "max_new_tokens", "response_length", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_epochs", "logging_steps",
    "eval_steps", "save_steps", "dataset_num_proc", "packing_length", "packing_num_proc",
    "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size",
    "gkd_logits_topk", "lora_rank", "lora_alpha", "adam_epsilon", "epsilon", "max_pixels", "sequence_parallel_size",
    "vllm_max_model_len", "vllm_tensor_parallel_size", "vllm_data_parallel_size", "vllm_max_num_seqs", "max_model_len",
    "chord_sft_per_device_train_batch_size", "eval_accumulation_steps", "move_model_batches", "max_turns",
    "ddp_timeout",
)  # fmt: skip
NATURAL = (
    "learning_rate", "vit_lr", "aligner_lr", "weight_decay", "max_grad_norm", "warmup_steps", "temperature", "seed",
    "data_seed", "dataloader_num_workers", "dataloader_prefetch_factor", "epsilon_high", "chord_mu_warmup_steps",
    "chord_mu_decay_steps", "beta", "sleep_level", "eval_delay",
)  # fmt: skip
SHARES = (
    "lmbda", "lora_dropout", "freeze_parameters_ratio", "split_dataset_ratio", "vllm_gpu_memory_utilization", "top_p",
    "adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing_factor", "chord_mu_peak", "chord_mu_valley",
)  # fmt: skip
BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2", "warmup_ratio")


def check_numbers(args: argparse.Namespace) -> None:
    """PruneKitError for a number that no training can use: not finite, or out of its range."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                wrong = "give a finite number"
            elif name in POSITIVE and number <= 0:
                wrong = "give a number above 0"
            elif name in NATURAL and number < 0:
                wrong = "give 0 or more"
            elif name in SHARES and not 0 <= number <= 1 or name in BELOW_ONE and number == 1:
                wrong = "give a number from 0 to 1" + (", below 1" if name in BELOW_ONE else "")
            elif name == "beta" and getattr(args, "rlhf_type", "") == "gkd" and number > 1:
                wrong = "give a number from 0 (forward KL) to 1 (reverse KL)"
            elif name == "temperature" and number == 0 and getattr(args, "rlhf_type", "") in ("gkd", "grpo"):
                wrong = "give a number above 0: the loss divides by it"
            elif name == "vllm_gpu_memory_utilization" and number == 0:
                wrong = "give a share of the GPU's memory, above 0"
            elif name == "max_steps" and (number == 0 or number < -1):
                wrong = "give a number of steps, or -1 to count by --num_train_epochs"
            else:
                continue
            raise PruneKitError(f"--{name} {number}: {wrong}")
