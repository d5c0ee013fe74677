#!/usr/bin/env bash
# Teach or repair one skill with a LoRA. export_lora.sh merges it back.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET (mix in rows of the old skills, or they fade)
#   Out:  $OUTPUT (an adapter folder), with logging.jsonl, command.sh and curves.png of the run
#   Cost: counted, not measured: 2 bytes of GPU memory per parameter, 16 per parameter of the adapter, and activations; so 8B
#         takes 25 GB with rows of 4096 tokens, one at once (python -m prunekit.memory says what yours will)
#   MODEL=checkpoints/mqa DATASET=data/handwriting.jsonl OUTPUT=checkpoints/lora bash lora.sh
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/recovered}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/lora}

ARGS=(
  --dataset "$DATASET"
  --val_dataset "$VAL_DATASET"
  --tuner_type lora
  --target_modules all-linear       # of GPT-2, whose layers that passes over, preflight names them
  --freeze_vit false                # a new script or layout is first of all something new to see
  --freeze_aligner false
  --lora_rank 32
  --lora_alpha 64
  --lora_dropout 0.05
  --learning_rate 1e-4
  --warmup_ratio 0.05
  --num_train_epochs 2
  --max_length 4096
  --eval_steps 200
  --save_steps 200
  --logging_steps 10
)

settle sft 4 "${ARGS[@]}"
preflight sft
train sft
