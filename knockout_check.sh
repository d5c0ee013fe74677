#!/usr/bin/env bash
# Which layers are cheap? A short SFT for the whole model and for the model without each layer listed here.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET
#   Out:  $OUTPUT/ranking.json and ranking.png (token_acc relative to the baseline); one W&B run each, one group
#   Cost: (layers + 1) short trainings. Continue an interrupted sweep by the same command.
#   MODEL=checkpoints/base TEXT_LAYERS=4-20 VISION_BLOCKS=none GPUS=0,1,2,3 JOBS=4 bash knockout_check.sh
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-runs/knockout}

TEXT_LAYERS=${TEXT_LAYERS:-all}     # all, none, or numbers and ranges: 4-20,30
VISION_BLOCKS=${VISION_BLOCKS:-all}
JOBS=${JOBS:-1}                     # runs side by side: GPUS are shared out among them

ARGS=(
  --max_steps 100
  --learning_rate 8e-5
  --warmup_ratio 0.03
  --per_device_train_batch_size 1
  --gradient_accumulation_steps 16
  --max_length 4096
  --eval_steps 25                   # the curve's start tells a key layer: look for the spike
  --logging_steps 5
)

preflight --dataset "$DATASET" --val-dataset "$VAL_DATASET" --disk-factor "$((JOBS + 1))" --reuse-out "$@"
claim_work
setup_wandb
if [ -n "$RESTART" ] && [ -e "$OUTPUT/settings.json" ]; then rm -rf "$OUTPUT"; fi # a sweep, and nothing else
if [ -n "$GPUS" ] && [ "$JOBS" -gt 1 ]; then
  all=$(tr , '\n' <<< "$GPUS" | wc -l)
  use_gpus "$(cut -d, -f"1-$((all / JOBS > 0 ? all / JOBS : 1))" <<< "$GPUS")"
fi
run_group python -m prunekit.knockout --model "$MODEL" --model-type "$MODEL_TYPE" --out "$OUTPUT" \
  --text "$TEXT_LAYERS" --vision "$VISION_BLOCKS" --gpus "$GPUS" --jobs "$JOBS" \
  --group "${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}" -- \
  --external_plugins "${PLUGINS[@]}" ${TEMPLATE:+--template "$TEMPLATE"} \
  "${DEVICE_ARGS[@]}" "${RUN_ARGS[@]}" --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" \
  "${ARGS[@]}" "$@"
wait "$GROUP_PID"
rm -rf "$WORK"
