#!/usr/bin/env bash
# Recover a pruned model by supervised fine-tuning of all its weights.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET (ms-swift messages JSONL)
#   Out:  $OUTPUT (a checkpoint), with logging.jsonl, command.sh and curves.png of the run
#   Cost: 16 bytes of GPU memory per parameter and activations; 8B on 8x80 GB with zero2 fits, on fewer use zero3
#   MODEL=checkpoints/pruned GPUS=0,1 bash full_run.sh --max_steps 50
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/pruned}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/recovered}

ARGS=(
  --max_steps 12000
  --learning_rate 8e-5              # 3-5 times below what you'd use for a whole model
  --warmup_ratio 0.03
  --per_device_train_batch_size 1
  --gradient_accumulation_steps 16
  --max_length 4096
  --eval_steps 500                  # eval/token_acc in W&B
  --save_steps 500                  # an interrupted run resumes from the last of these
  --logging_steps 10
)

preflight --dataset "$DATASET" --val-dataset "$VAL_DATASET" --disk-factor 11 "$@"
train sft --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" "${ARGS[@]}" "$@"
