#!/usr/bin/env bash
# Prune single weights in cycles: set some more to zero, retrain with all zeros kept, measure; then choose.
#   In:   $MODEL (a checkpoint), $DATASET, $VAL_DATASET (ms-swift messages JSONL, or rows {"text": ...})
#   Out:  $OUTPUT: of the cycles' checkpoints the sparsest whose perplexity is at most WORSE above the dense model's.
#         $OUTPUT.cycles: every cycle's checkpoint (1, 2, ...), cycles.json and quality.png
#   Cost: CYCLES times full_run.sh's; zeros in dense files make nothing smaller or faster by themselves
#   MODEL=checkpoints/base OUTPUT=checkpoints/sparse SPARSITY=0.7 MODULES='mlp|o_proj' bash sparse_run.sh --max_steps 500
# What is there of an interrupted run isn't made again: neither a cycle that is done nor the steps of the one that isn't.
CHECKPOINT=${CHECKPOINT:-best}      # of each cycle's training: best, or last
source "$(dirname "$0")/lib/common.sh"
PATIENCE=200 # with launchers, which have theirs with a trainer and a server

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/sparse}

SPARSITY=${SPARSITY:-0.7}           # after the last cycle, of the weights that MODULES names
START=${START:-}                    # after the first one; default: half of SPARSITY
CYCLES=${CYCLES:-4}
SCHEDULE=${SCHEDULE:-exponential}   # of what lies between: exponential, or cubic (more of it early)
MODULES=${MODULES:-}                # regex, as sparsify.py's; default: the projections of all layers
SCORE=${SCORE:-magnitude}           # or wanda, gradient: calibrated on DATASET before each cycle
REFIT=${REFIT:-}                    # 1: what stays makes up for what went before it is trained; calibrated, too
WORSE=${WORSE:-0.15}                # perplexity lost that is good enough; after a cycle that lost more there is no other

SPARSIFY_ARGS=(
  --score "$SCORE"
  ${MODULES:+--modules "$MODULES"}
  ${REFIT:+--refit}
)
[ "$SCORE$REFIT" = magnitude ] || SPARSIFY_ARGS+=(
  --calib "$DATASET" ${MODEL_TYPE:+--model-type "$MODEL_TYPE"} ${TEMPLATE:+--template "$TEMPLATE"}
)
ARGS=(
  --callbacks keep_zeros
  --max_steps 1000
)
PLUGINS+=("$ROOT/plugins/sparsity.py")

need_number CYCLES 1 1000
need_switch REFIT
need SPARSITY '0?\.[0-9]+' "give the share of zeros, between 0 and 1"
need START '|0?\.[0-9]+' "give the share of zeros after the first cycle, between 0 and 1"
need WORSE '[0-9]{0,6}\.?[0-9]+' "give a positive share, as 0.15"
need SCHEDULE 'exponential|cubic' "choose exponential or cubic"
need SCORE 'magnitude|wanda|gradient' "choose magnitude, wanda or gradient"
one_node "cycles run on one node; its GPUs all take part"
refuse_data_flags "$@"
[ -z "$REUSE" ] || die "REUSE=1: is for a single training; leave it out: the same command goes on by itself"
flags_of callbacks "$@"
[[ ${#FLAGS[@]} -eq 0 || " ${FLAGS[*]} " == *" keep_zeros "* ]] ||
  die "${FLAGS[*]}: name keep_zeros, too, without which a cycle would train its zeros away"
settle sft 4 --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" "${ARGS[@]}"
PLAN=(
  python -m prunekit.training.cycles plan --model "$MODEL" --sparsity "$SPARSITY" ${START:+--start "$START"}
  --cycles "$CYCLES" --schedule "$SCHEDULE" ${MODULES:+--modules "$MODULES"} --worse "$WORSE"
)
"${PLAN[@]}" >/dev/null
preflight sft --disk-factor $((DISK_FACTOR + CYCLES))
folder=$OUTPUT.cycles
claim_work
[ -z "$RESTART" ] || forget "$folder" settings.json
levels=$("${PLAN[@]}" --into "$folder" --data "$DATASET" "$VAL_DATASET" \
  --flags "$(quoted CHECKPOINT="$CHECKPOINT" GLOBAL_BATCH="$GLOBAL_BATCH" DTYPE="$DTYPE" "${SPARSIFY_ARGS[@]}" \
    --external_plugins "${EXTERNAL[@]}" "${ARGS[@]}" "$@")")
MADE='' # begun: what comes to nothing now can go on, with another WORSE

finish() {
  python -m prunekit.report "$OUTPUT" || echo "warning: no figures for $OUTPUT: the message is above" >&2
  remove_work
}
if [ -z "$RESTART" ] && is_published; then # killed while cleaning up
  finish
  exit 0
fi

settings=()
for name in MODEL DATASET VAL_DATASET OUTPUT SPARSITY START CYCLES SCHEDULE MODULES SCORE REFIT WORSE CHECKPOINT \
  GLOBAL_BATCH DTYPE; do
  settings+=("$name=${!name}")
done
printf '%s\n' "# $STAGE, run in $PWD" "$(quoted env "${settings[@]}" bash "$ROOT/sparse_run.sh" \
  --external_plugins "${USER_PLUGINS[@]}" "$@")" > "$folder/command.sh"

evaluate() { # JSON MODEL...: their loss and token_acc on VAL_DATASET
  local json=$1
  shift
  run_to_end env CUDA_VISIBLE_DEVICES="${GPUS%%,*}" python -m prunekit.evaluate --model "$@" --dataset "$VAL_DATASET" \
    --no-generate --model-type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"} --json "$json.new"
  mv "$json.new" "$json"
}

[ -e "$folder/dense.json" ] || evaluate "$folder/dense.json" "$MODEL"
previous=$MODEL cycle=0
for level in $levels; do
  cycle=$((cycle + 1))
  here=$folder/$cycle
  if [ ! -e "$here.json" ]; then
    if [ ! -e "$here.sparse" ] && [ ! -e "$here" ]; then
      run_to_end python "$ROOT/sparsify.py" --model "$previous" --out "$here.sparse" --sparsity "$level" "${SPARSIFY_ARGS[@]}"
    fi
    if [ ! -e "$here" ] || [ -d "$here.run" ]; then
      run_to_end env MODEL="$here.sparse" OUTPUT="$here" STAGE=full_run CHECKPOINT="$CHECKPOINT" RESTART= OVERWRITE= KEEP_RUN= \
        WANDB_RUN_GROUP="${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}" DATASET="$DATASET" VAL_DATASET="$VAL_DATASET" \
        RUN_NAME="${RUN_NAME:+$RUN_NAME-$cycle}" \
        GPUS="$GPUS" bash "$ROOT/full_run.sh" --external_plugins "${EXTERNAL[@]}" "${ARGS[@]}" "$@" ||
        fail "cycle $cycle failed: its messages are above; the same command goes on with it"
    fi
    evaluate "$here.json" "$here.sparse" "$here"
  fi
  rm -rf "$here.sparse"
  good=0
  python -m prunekit.training.cycles judge --cycles "$folder" --worse "$WORSE" || good=$?
  if [ "$good" -eq 3 ]; then
    echo "no more cycles: that is over WORSE=$WORSE"
    break
  fi
  [ "$good" -eq 0 ] || exit "$good"
  previous=$here
done
begin_publishing
python -m prunekit.training.cycles publish --cycles "$folder" --base "$MODEL" --out "$OUTPUT" --worse "$WORSE" \
  ${OVERWRITE:+--overwrite}
finish
