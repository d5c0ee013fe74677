#!/usr/bin/env bash
# Recover a pruned model in three phases: what the cuts hurt most, fast; then all of it; then slowly, in large batches.
#   In:   $MODEL (what a surgery script wrote), $DATASET, $VAL_DATASET
#   Out:  $OUTPUT (a checkpoint), and $OUTPUT-phase1, $OUTPUT-phase2 on the way, which the same command doesn't repeat
#         (RESTART=1 does; those of another model, other data or settings are refused)
#   Cost: as full_run.sh, which runs three times; in phase 1 most weights need neither gradient nor optimizer state
#   MODEL=checkpoints/narrow OUTPUT=checkpoints/recovered bash progressive_run.sh
#   MODEL=checkpoints/narrow STEPS1=100 STEPS2=500 STEPS3=200 bash progressive_run.sh --per_device_train_batch_size 4
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/pruned}
OUTPUT=${OUTPUT:-checkpoints/recovered}
STEPS1=${STEPS1:-1500}
STEPS2=${STEPS2:-8000}
STEPS3=${STEPS3:-1000}
ACCUMULATE=${ACCUMULATE:-}   # gradient accumulation, instead of GLOBAL_BATCH; the third phase has four times either

for name in STEPS1 STEPS2 STEPS3; do need_number "$name" 1; done
[ -z "$ACCUMULATE" ] || need_number ACCUMULATE 1 100000

# shellcheck disable=SC2034  # used by name: phase
# The layers beside removed ones, or the attention (MLPs) whose heads (neurons) were cut: pruning_info.json says which.
PHASE1=(
  --max_steps "$STEPS1"
  --learning_rate 2e-4
  ${ACCUMULATE:+--gradient_accumulation_steps "$ACCUMULATE"}
  --freeze_parameters_ratio 1
  --freeze_aligner true       # else ms-swift trains all mergers
  --trainable_parameters_regex "$(python -m prunekit.critical "$MODEL")"
)
# shellcheck disable=SC2034
PHASE2=(
  --max_steps "$STEPS2"
  --learning_rate 8e-5
  ${ACCUMULATE:+--gradient_accumulation_steps "$ACCUMULATE"}
)
# shellcheck disable=SC2034
PHASE3=(
  --max_steps "$STEPS3"
  --learning_rate 1e-5
  ${ACCUMULATE:+--gradient_accumulation_steps $((4 * ACCUMULATE))}
)

OUTPUT=${OUTPUT%/}
if [ -e "$OUTPUT" ] && [ ! -e "$OUTPUT.run" ] && [ -z "$OVERWRITE" ]; then
  die "$OUTPUT: exists; choose another OUTPUT or pass --overwrite"
fi
# An interrupted phase has ended before this ends.
running=''
trap 'trap "" INT TERM HUP; if [ -n "$running" ]; then kill -TERM "$running" 2>/dev/null && wait "$running" || true; fi' EXIT

input=$MODEL
for number in 1 2 3; do
  output=$OUTPUT reuse=''
  [ "$number" = 3 ] || { output=$OUTPUT-phase$number reuse=1; }
  declare -n phase=PHASE$number
  echo "phase $number: $input -> $output"
  times=$([ "$number" = 3 ] && echo 4 || echo 1)
  MODEL=$input OUTPUT=$output STAGE=$STAGE-$number OVERWRITE=$OVERWRITE REUSE=$reuse \
    GLOBAL_BATCH=${GLOBAL_BATCH:+$((times * GLOBAL_BATCH))} DEFAULT_BATCH=$((times * DEFAULT_BATCH)) \
    bash "$ROOT/full_run.sh" --external_plugins "${USER_PLUGINS[@]}" "${phase[@]}" "$@" &
  running=$!
  wait "$running"
  running=''
  input=$output
done
