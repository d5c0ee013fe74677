"""Run by test_head_rates.py in a process of its own: trainings of a masked model by ms-swift, one after the other.

python tests/helpers/swift_head_rates.py MODEL DATASET OUT      # OUT/{sft,resumed,frozen,gkd,grpo}/checkpoint-N
"""

import os
import shutil
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HEAD_RATES": "weak=0.1 refresh=2", "LOG_LEVEL": "ERROR"}
from helpers.paths import ROOT
from swift import rlhf_main, sft_main

MODEL, DATASET, OUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
PLUGINS = [str(ROOT / "plugins" / f"{name}.py") for name in ("images_and_answers", "head_rates", "ocr_rewards")]


def run(main, name: str, *more: str, optimizer: str = "head_rates") -> None:
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    flags = f"""
        --model {MODEL} --model_type qwen3_vl --dataset {DATASET} --split_dataset_ratio 0 --tuner_type full
        --freeze_vit false --freeze_aligner false --check_model false --add_version false --output_dir {OUT / name}
        --use_cpu true --torch_dtype float32 --fp16 false --bf16 false --gradient_checkpointing false
        --dataloader_num_workers 0 --gradient_accumulation_steps 1 --per_device_train_batch_size 2
        --save_steps 2 --report_to none --learning_rate 1e-3 --weight_decay 0.1 --seed 42
    """
    main([*flags.split(), "--external_plugins", *PLUGINS, "--optimizer", optimizer, *more])


run(sft_main, "sft", "--max_steps", "4")
shutil.copytree(OUT / "sft", OUT / "resumed", ignore=shutil.ignore_patterns("checkpoint-4"))
run(sft_main, "resumed", "--max_steps", "4", "--resume_from_checkpoint", str(OUT / "resumed" / "checkpoint-2"))
run(sft_main, "frozen", "--max_steps", "2", optimizer="active_heads")
short = ("--max_steps", "2", "--max_completion_length", "4")
run(
    rlhf_main,
    "gkd",
    "--rlhf_type",
    "gkd",
    "--teacher_model",
    MODEL,
    "--teacher_model_type",
    "qwen3_vl",
    "--lmbda",
    "1",
    *short,
)
grpo = ("--rlhf_type", "grpo", "--num_generations", "2", "--reward_funcs", "ocr_cer")
run(rlhf_main, "grpo", *grpo, *short)
