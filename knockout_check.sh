#!/usr/bin/env bash
# Which layers, and experts, are cheap? Scores removals in memory, without training; then a short SFT without the best.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET
#   Out:  $OUTPUT/ranking.json, ranking.csv, ranking.png, curves.png, greedy.png; W&B: one run each, and one with all
#   Cost: the scan about half a forward pass of the tokens per layer, one per number of experts; then
#         (FINALISTS + 1) short trainings.
#   Continue an interrupted sweep by the same command.
#   MODEL=checkpoints/base MODE=scan GREEDY=8 bash knockout_check.sh
#   MODEL=checkpoints/base TEXT_LAYERS=4-20 VISION_BLOCKS=none GPUS=0,1,2,3 JOBS=2 bash knockout_check.sh
#   MODEL=Qwen3-30B-A3B MODE=scan EXPERTS=all bash knockout_check.sh      # and numbers of experts, by eighths
#   RAY_ADDRESS=10.0.0.1:6379 GPUS_PER_TASK=2 bash knockout_check.sh      # spread over a Ray cluster
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-runs/knockout}

MODE=${MODE:-all}                   # scan: train nothing; train: no scan, a training for every layer; all: both
TEXT_LAYERS=${TEXT_LAYERS:-all}     # all, none, or numbers and ranges: 4-20,30
VISION_BLOCKS=${VISION_BLOCKS:-all}
EXPERTS=${EXPERTS:-none}            # of each mixture that stay, scanned: all (by eighths), none, or 96,64; chosen on DATASET
FINALISTS=${FINALISTS:-10}          # how many of the scan's cheapest are trained; ALL: every one
JOBS=${JOBS:-1}                     # trainings side by side: GPUS are shared out among them, as many to each
GPUS_PER_TASK=${GPUS_PER_TASK:-$([ -n "$GPUS" ] && echo 1 || echo 0)} # of a training on a Ray cluster, whatever GPUS are here

RACE=${RACE:-}                      # 1: samples only where it's undecided which are the best: a third of the time
GREEDY=${GREEDY:-}                  # 8: also find a set of 8 layers, scanning again after each removal
TARGET_PARAMS=${TARGET_PARAMS:-}    # 0.75: or one that leaves so many of the parameters
HEAL=${HEAL:-}                      # 1: choose that set with its seams healed on DATASET (manual_select.py --heal)
GENERATE=${GENERATE:-0}             # also answer so many rows without each finalist: token_acc hides a collapse
GENERATE_TOKENS=${GENERATE_TOKENS:-64} # of an answer; what is cut there counts as wrong, and is warned of

BY=${BY:-}                          # a column of the rows (skill, source): score each of its groups of rows, too
GATE=${GATE:-mean}                  # worst: by the group that loses most, instead of the mean of all rows

SCAN_ARGS=(
  --tokens 65536                    # of VAL_DATASET, 0: all
  --max-length 4096
  --batch-tokens 4096               # lower it if out of memory
)
ARGS=(
  --dataset "$DATASET"
  --val_dataset "$VAL_DATASET"
  --max_steps 100
  --learning_rate 8e-5
  --warmup_ratio 0.03
  --max_length 4096
  --eval_steps 25                   # the curve's start tells a key layer: look for the spike
  --logging_steps 5
)

need MODE 'scan|train|all' "choose scan, train or all"
need FINALISTS '[0-9]{1,9}|all|ALL' "give a number of layers to train without, or ALL"
for name in TEXT_LAYERS VISION_BLOCKS; do
  need "$name" 'all|none|[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*' "give all, none, or numbers and ranges: 4-20,30"
done
need EXPERTS 'all|none|[0-9]+(,[0-9]+)*' "give all, none, or numbers: 96,64"
need_number JOBS 1 1024
need_number GPUS_PER_TASK 0 1024
[ -z "$GREEDY" ] || need_number GREEDY 1
need TARGET_PARAMS '|0?\.[0-9]*[1-9][0-9]*' "give the share of the parameters that is to stay, between 0 and 1"
need_number GENERATE 0
need_number GENERATE_TOKENS 1
[ -z "$HEAL" ] || [ -z "${RAY_ADDRESS:-}" ] || die "HEAL=$HEAL: works on one machine; unset RAY_ADDRESS"
need_switch RACE HEAL
need GATE 'mean|worst' "choose mean or worst"
[ -z "$HEAL" ] || [ -n "$GREEDY$TARGET_PARAMS" ] || die "HEAL=$HEAL: heals the sets of a path; set GREEDY or TARGET_PARAMS"
for name in RACE GREEDY TARGET_PARAMS HEAL GENERATE EXPERTS; do
  [ "$MODE" != train ] || [[ ${!name} =~ ^(|0|none)$ ]] || die "$name=${!name}: is for the scan, which MODE=train leaves out: set MODE=all, or leave it out"
done
[ "$GATE" = mean ] || [ -n "$BY" ] || die "GATE=$GATE: worst of which groups? Set BY to a column of the rows"
[ "$GATE" = mean ] || [ -z "$RACE" ] || die "GATE=$GATE: needs every removal scored on every row; leave out RACE"
if [ -z "$RESTART" ]; then # ranking.json is made anew of what a MODE goes by
  [ "$MODE" != train ] || [ ! -e "$OUTPUT/scan" ] ||
    die "MODE=train: $OUTPUT holds a scan, whose finalists MODE=all trains; to train without every layer choose another OUTPUT"
  # Scans of earlier versions left a folder for trainings, and nothing in it
  trainings=$(find "$OUTPUT/trained" ! -type d -print -quit 2> /dev/null) || true
  [ "$MODE" = train ] || [ -z "$trainings" ] || { [ "$MODE" = all ] && [ -e "$OUTPUT/scan" ]; } ||
    die "MODE=$MODE: $OUTPUT holds trainings that its ranking would lose; choose another OUTPUT"
fi
one_node "knockouts run on one node each: spread them by RAY_ADDRESS, and unset NNODES"
refuse_data_flags "$@"
processes=$PROCESSES
if [ -n "${RAY_ADDRESS:-}" ]; then
  tasks=''
  [ "$GPUS_PER_TASK" -eq 0 ] || tasks=$(seq -s, 0 $((GPUS_PER_TASK - 1))) # of the nodes, which this one needn't be like
elif [ -n "$GPUS" ]; then
  [ "$JOBS" -le "$processes" ] || die "JOBS=$JOBS: each needs a GPU, GPUS=$GPUS names $processes"
  # With other numbers of GPUs the runs would differ in more than the layer that is missing.
  [ $((processes % JOBS)) -eq 0 ] || die "JOBS=$JOBS: $processes GPUs (GPUS=$GPUS) can't be shared out evenly among so many"
  tasks=$(cut -d, -f"1-$((processes / JOBS))" <<< "$GPUS")
else
  tasks=''
fi
use_gpus "$tasks"
settle sft 4 "${FULL_ARGS[@]}" "${ARGS[@]}"
preflight sft --disk-factor 0.1 --reuse-out
use_gpus "$GPUS"
# Before anything is removed, or scanned for hours: prunekit.knockout.sweep would refuse it behind that.
python -m prunekit.knockout.folder --out "$OUTPUT"
[ -z "$RESTART" ] || rm -rf "$OUTPUT"
claim_work
setup_wandb
LAYERS=(--text "$TEXT_LAYERS" --vision "$VISION_BLOCKS" ${BY:+--by "$BY" --gate "$GATE"})
if [ "$MODE" != train ]; then
  [ -z "${RAY_ADDRESS:-}" ] || processes=1
  calib=()
  [ -z "$HEAL" ] && [ "$EXPERTS" = none ] || calib=(--calib "$DATASET")
  best=() # of a whole scan any number may be trained later
  if [[ $FINALISTS =~ ^[1-9] && $RACE$GENERATE != 0 ]]; then best=(--best "$FINALISTS"); fi
  run_to_end python -m prunekit.scan --model "$MODEL" --dataset "$VAL_DATASET" --out "$OUTPUT/scan" "${LAYERS[@]}" \
    --model-type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"} ${DTYPE:+--dtype "$DTYPE"} "${SCAN_ARGS[@]}" \
    ${RACE:+--race} "${best[@]}" \
    ${GREEDY:+--greedy "$GREEDY"} ${TARGET_PARAMS:+--target-params "$TARGET_PARAMS"} \
    ${HEAL:+--heal} --experts "$EXPERTS" "${calib[@]}" --generate "$GENERATE" --generate-tokens "$GENERATE_TOKENS" \
    --processes "$processes" --gpus-per-task "$((GPUS_PER_TASK > 0))" # it uses one
fi
run_to_end python -m prunekit.knockout.sweep --model "$MODEL" --model-type "$MODEL_TYPE" --out "$OUTPUT" "${LAYERS[@]}" \
  --finalists "$([ "$MODE" = scan ] && echo 0 || echo "$FINALISTS")" --gpus "$GPUS" --jobs "$JOBS" \
  --gpus-per-task "$GPUS_PER_TASK" --group "${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}" -- \
  ${TEMPLATE:+--template "$TEMPLATE"} "${LINE[@]}"
remove_work
