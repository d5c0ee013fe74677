#!/usr/bin/env bash
# Which layers are cheap? Scores every removal in memory, without training; then a short SFT without each of the best.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET
#   Out:  $OUTPUT/ranking.json, ranking.csv, ranking.png, curves.png, greedy.png; W&B: one run each, and one with all
#   Cost: the scan about half a forward pass of the tokens per layer; then (FINALISTS + 1) short trainings.
#   Continue an interrupted sweep by the same command.
#   MODEL=checkpoints/base MODE=scan GREEDY=8 bash knockout_check.sh
#   MODEL=checkpoints/base TEXT_LAYERS=4-20 VISION_BLOCKS=none GPUS=0,1,2,3 JOBS=4 bash knockout_check.sh
#   RAY_ADDRESS=10.0.0.1:6379 GPUS_PER_TASK=2 bash knockout_check.sh      # spread over a Ray cluster
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-runs/knockout}

MODE=${MODE:-all}                   # scan: train nothing; train: no scan, a training for every layer; all: both
TEXT_LAYERS=${TEXT_LAYERS:-all}     # all, none, or numbers and ranges: 4-20,30
VISION_BLOCKS=${VISION_BLOCKS:-all}
FINALISTS=${FINALISTS:-10}          # how many of the scan's cheapest are trained; ALL: every one
JOBS=${JOBS:-1}                     # trainings side by side: GPUS are shared out among them
GPUS_PER_TASK=${GPUS_PER_TASK:-$([ -n "$GPUS" ] && echo 1 || echo 0)} # on a Ray cluster

RACE=${RACE:-}                      # 1: samples only where it's undecided which are the best: a third of the time
GREEDY=${GREEDY:-}                  # 8: also find a set of 8 layers, scanning again after each removal
TARGET_PARAMS=${TARGET_PARAMS:-}    # 0.75: or one that leaves so many of the parameters
HEAL=${HEAL:-}                      # 1: choose that set with its seams healed on DATASET (manual_select.py --heal)
GENERATE=${GENERATE:-0}             # also answer so many rows without each finalist: token_acc hides a collapse

SCAN_ARGS=(
  --tokens 65536                    # of VAL_DATASET, 0: all
  --max-length 4096
  --batch-tokens 4096               # lower it if out of memory
)
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

case $MODE in scan | train | all) ;; *) die "MODE=$MODE: choose scan, train or all" ;; esac
[[ $FINALISTS =~ ^([0-9]+|all|ALL)$ ]] || die "FINALISTS=$FINALISTS: give a number of layers to train without, or ALL"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || die "JOBS=$JOBS: give a number of trainings side by side"
processes=$(tr , '\n' <<< "${GPUS:-cpu}" | wc -l)
if [ -n "$GPUS" ] && [ "$JOBS" -gt "$processes" ]; then die "JOBS=$JOBS: each needs a GPU, GPUS=$GPUS names $processes"; fi
preflight --dataset "$DATASET" --val-dataset "$VAL_DATASET" --disk-factor 0.1 --reuse-out "$@"
if [ -n "$RESTART" ] && { [ -d "$OUTPUT/scan" ] || [ -d "$OUTPUT/trained" ]; }; then rm -rf "$OUTPUT"; fi
if [ -e "$OUTPUT" ] && [ ! -d "$OUTPUT/scan" ] && [ ! -d "$OUTPUT/trained" ] && [ -n "$(ls -A "$OUTPUT")" ]; then
  die "$OUTPUT: is in use, and no sweep of knockouts; choose another OUTPUT"
fi
claim_work
setup_wandb
LAYERS=(--text "$TEXT_LAYERS" --vision "$VISION_BLOCKS")
if [ "$MODE" != train ]; then
  run=(python)
  if [ "$processes" -gt 1 ] && [ -z "${RAY_ADDRESS:-}" ]; then run=(torchrun --standalone --nproc_per_node "$processes"); fi
  run_group "${run[@]}" -m prunekit.scan --model "$MODEL" --dataset "$VAL_DATASET" --out "$OUTPUT/scan" "${LAYERS[@]}" \
    --model-type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"} "${SCAN_ARGS[@]}" \
    ${RACE:+--race} --best "$([[ $FINALISTS =~ ^[1-9][0-9]*$ ]] && echo "$FINALISTS" || echo 10)" \
    ${GREEDY:+--greedy "$GREEDY"} ${TARGET_PARAMS:+--target-params "$TARGET_PARAMS"} \
    ${HEAL:+--heal --calib "$DATASET"} --generate "$GENERATE" --gpus-per-task "$GPUS_PER_TASK"
  wait "$GROUP_PID"
fi
if [ -n "$GPUS" ] && [ "$JOBS" -gt 1 ]; then
  use_gpus "$(cut -d, -f"1-$((processes / JOBS))" <<< "$GPUS")"
fi
within_positions "${ARGS[@]}" "$@"
run_group python -m prunekit.knockout --model "$MODEL" --model-type "$MODEL_TYPE" --out "$OUTPUT" "${LAYERS[@]}" \
  --finalists "$([ "$MODE" = scan ] && echo 0 || echo "$FINALISTS")" --gpus "$GPUS" --jobs "$JOBS" \
  --gpus-per-task "$GPUS_PER_TASK" --group "${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}" -- \
  --external_plugins "${PLUGINS[@]}" ${TEMPLATE:+--template "$TEMPLATE"} \
  "${DEVICE_ARGS[@]}" "${RUN_ARGS[@]}" --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" \
  "${ARGS[@]}" "$@" "${WITHIN[@]}"
wait "$GROUP_PID"
rm -rf "$WORK"
