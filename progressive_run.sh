#!/usr/bin/env bash
# Recover a pruned model in three phases: what the cuts hurt most, fast; then all of it; then slowly, in large batches.
#   In:   $MODEL (what a surgery script wrote), $DATASET, $VAL_DATASET (messages, or rows {"text": ...})
#   Out:  $OUTPUT (a checkpoint), and $OUTPUT-phase1, $OUTPUT-phase2 on the way, which the same command doesn't repeat
#         (RESTART=1 does; those of another model, other data or settings are refused)
#   Cost: as full_run.sh, which runs three times; in phase 1 most weights need neither gradient nor optimizer state
#   MODEL=checkpoints/narrow OUTPUT=checkpoints/recovered bash progressive_run.sh
#   MODEL=checkpoints/narrow STEPS1=100 STEPS2=500 STEPS3=200 bash progressive_run.sh --per_device_train_batch_size 4
#   MODEL=checkpoints/narrow TRAIN1=heads HEADS1=0.25 bash progressive_run.sh   # first the most important heads
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/pruned}
OUTPUT=${OUTPUT:-checkpoints/recovered}
STEPS1=${STEPS1:-1500}
STEPS2=${STEPS2:-8000}
STEPS3=${STEPS3:-1000}
TRAIN1=${TRAIN1:-cut}        # phase 1 trains what was cut, or heads: the most important ones, and nothing else
HEADS1=${HEADS1:-0.5}        # of each layer's heads; important is what width_cut.py scored highest, or the weights say
ACCUMULATE=${ACCUMULATE:-}   # gradient accumulation, instead of GLOBAL_BATCH; the third phase has four times either

for name in STEPS1 STEPS2 STEPS3; do need_number "$name" 1; done
[ -z "$ACCUMULATE" ] || need_number ACCUMULATE 1 100000

need TRAIN1 'cut|heads' "choose cut or heads"
need HEADS1 '1|0?\.[0-9]+' "give a share of the heads, above 0, at most 1"

# shellcheck disable=SC2034  # used by name: phase
PHASE1=(
  --max_steps "$STEPS1"
  --learning_rate 2e-4
  ${ACCUMULATE:+--gradient_accumulation_steps "$ACCUMULATE"}
)
if [ "$TRAIN1" = heads ]; then
  PHASE1+=(--optimizer important_heads)
else
  # The layers beside removed ones, or the attention (MLPs) whose heads (neurons) were cut: pruning_info.json says which.
  critical=$(python -m prunekit.critical "$MODEL")
  PHASE1+=(
    --freeze_parameters_ratio 1
    --freeze_aligner true       # else ms-swift trains all mergers
    --trainable_parameters_regex "$critical"
  )
fi
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
  output=$OUTPUT reuse='' overwrite=$OVERWRITE
  [ "$number" = 3 ] || { output=$OUTPUT-phase$number reuse=1 overwrite=''; }
  declare -n phase=PHASE$number
  rates=${HEAD_RATES:-}
  if [ "$number$TRAIN1" = 1heads ]; then rates=weak_share=$(awk -v share="$HEADS1" 'BEGIN { print 1 - share }'); fi
  echo "phase $number: $input -> $output"
  times=$([ "$number" = 3 ] && echo 4 || echo 1)
  HEAD_RATES=$rates MODEL=$input OUTPUT=$output STAGE=$STAGE-$number OVERWRITE=$overwrite REUSE=$reuse \
    RUN_NAME=${RUN_NAME:+$RUN_NAME-$number} \
    GLOBAL_BATCH=${GLOBAL_BATCH:+$((times * GLOBAL_BATCH))} DEFAULT_BATCH=$((times * DEFAULT_BATCH)) \
    bash "$ROOT/full_run.sh" --external_plugins "${USER_PLUGINS[@]}" "${phase[@]}" "$@" &
  running=$!
  wait "$running"
  running=''
  [ -z "$CHECK" ] || continue
  input=$output
  if ! is_main_node && [ "$number" != 3 ]; then
    echo "waiting for $output, which the first node publishes"
    until [ -e "$output" ] && { [ -n "$KEEP_RUN" ] || [ ! -e "$output.run" ]; }; do
      # since this node began: not in an earlier run
      [ ! "$output.run/failed-0" -nt "$output.run/launcher-$NODE_RANK" ] ||
        fail "the first node has failed: its messages say why; the same command on all goes on"
      sleep 1
    done
  fi
done
