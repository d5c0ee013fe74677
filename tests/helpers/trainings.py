"""Trainings of two steps, and who is left of them."""

import contextlib
import os
import time

import psutil

FLAGS = [
    *("--use_cpu", "true", "--torch_dtype", "float32", "--fp16", "false", "--bf16", "false"),
    *("--gradient_checkpointing", "true", "--dataloader_num_workers", "0", "--check_model", "false"),
    *("--add_version", "false", "--seed", "42", "--report_to", "none", "--tuner_type", "full"),
    *("--freeze_vit", "false", "--freeze_aligner", "false", "--gradient_accumulation_steps", "1"),
    *("--per_device_train_batch_size", "4", "--max_steps", "2", "--eval_steps", "1", "--logging_steps", "1"),
    *("--learning_rate", "1e-3"),
]


def left_running(word, within=10):
    """The processes with this word in their command line or environment that are still there after `within` s."""
    end = time.monotonic() + within
    while left := [p for p in psutil.process_iter() if p.pid != os.getpid() and word in said(p)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left


def said(process):
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join([*process.cmdline(), *process.environ().values()])
    return ""
