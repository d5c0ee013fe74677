#!/usr/bin/env bash
# Recover a pruned model by supervised fine-tuning of all its weights.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET (ms-swift messages JSONL, or rows {"text": ...}: pre-training goes on)
#   Out:  $OUTPUT (a checkpoint), with logging.jsonl, command.sh and curves.png of the run
#   Cost: by arithmetic, not measured: 16 bytes of GPU memory per parameter, of which ZeRO shares out 12 (14 with zero2, 16 with
#         zero3) among the GPUs, and activations; so 8B should fit 8x80 GB, and fewer with zero3 (python -m prunekit.memory
#         says what yours will take)
#   MODEL=checkpoints/pruned GPUS=0,1 bash full_run.sh --max_steps 50
#   MODEL=checkpoints/pruned GLOBAL_BATCH=64 bash full_run.sh      # rows a step, on any number of GPUs; default: about 16
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/pruned}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/recovered}

ARGS=(
  --dataset "$DATASET"
  --val_dataset "$VAL_DATASET"
  --max_steps 12000
  --learning_rate 8e-5              # 3-5 times below what you'd use for a whole model
  --warmup_ratio 0.03
  --max_length 4096
  --eval_steps 500                  # eval/token_acc in W&B
  --save_steps 500                  # an interrupted run resumes from the last of these
  --logging_steps 10
)

settle sft 4 "${FULL_ARGS[@]}" "${ARGS[@]}"
preflight sft --disk-factor "$DISK_FACTOR"
train sft
