#!/usr/bin/env bash
# The method as a loop: find what is cheap, cut it, recover, distil, measure, and again, until the model is small enough.
#   In:   $MODEL (a checkpoint, the teacher too), $DATASET, $VAL_DATASET (ms-swift messages JSONL), and what you want:
#         targets, any of TARGET_PARAMS=0.6 and TARGET_KV=0.125 (shares of the base's parameters, of its KV cache) and
#         TARGET_BYTES=5e9 (of weights), and KEEP=0.97 of the base's METRIC on VAL_DATASET, the gate
#   Out:  $OUTPUT: the last round's checkpoint that keeps the gate. $OUTPUT.loop: loop.json (what could be cut, what was,
#         what it kept), loop.png (the way), and a folder a round: scan, cut, recovered, distilled, as if made by hand
#         Exit code 0: all targets are reached; 3: OUTPUT keeps the gate, but not all are; 1: nothing keeps it
#   Cost: a round is a scan, a fit a trial, full_run.sh and distil.sh; how much disk is said beforehand
#   MODEL=Qwen3-VL-8B-Instruct OUTPUT=checkpoints/small TARGET_BYTES=5e9 KEEP=0.97 bash loop.sh
#   MODEL=Qwen3-VL-8B-Instruct TARGET_PARAMS=0.6 CUTS='layers neurons' bash loop.sh --dry-run   # prints the lines only
# The same command goes on with what is there, and with folders that you put in their places.
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/small}

TARGET_PARAMS=${TARGET_PARAMS:-}    # 0.6: the share of the base's parameters that is left
TARGET_BYTES=${TARGET_BYTES:-}      # 5e9: of weights
TARGET_KV=${TARGET_KV:-}            # 0.125: the share of the base's KV bytes a token
KEEP=${KEEP:-0.97}                  # the gate: what a round must keep of the base's METRIC
METRIC=${METRIC:-token_acc}         # token_acc, exact_match, cer, reward, loss (docs/loop.md says what a share of each is)
CUTS=${CUTS:-layers heads neurons kv} # what may be cut
MAX_ROUNDS=${MAX_ROUNDS:-8}
ROUND_SHARE=${ROUND_SHARE:-0.25}    # of its weights that a model may lose in a round; down to 0.4 of that near the gate
KEEP_ROUNDS=${KEEP_ROUNDS:-good}    # whose checkpoints stay on the disk: of all good rounds, of the last good one, or all

RECOVER_STEPS=${RECOVER_STEPS:-3000}
DISTIL_STEPS=${DISTIL_STEPS:-1000}  # 0: no distillation
LONGER_STEPS=${LONGER_STEPS:-}      # of recovery again, where a round is below the gate; default: twice as many
RECOVER_ARGS=${RECOVER_ARGS:-}      # flags for full_run.sh alone, and for distil.sh alone; what both take comes last
DISTIL_ARGS=${DISTIL_ARGS:-}
EVALUATE_ARGS=${EVALUATE_ARGS:-}    # --max-new-tokens 24, --rewards ocr_cer --plugins plugins/ocr_rewards.py
CALIB_TOKENS=${CALIB_TOKENS:-16384} # of DATASET, to heal and refit on
HEAL=${HEAL:-1}                     # empty: seams of removed layers aren't healed, nor judged healed
DRY_RUN=${DRY_RUN:-}                # 1 (or the flag --dry-run): print the lines, run none

words=()
for word in "$@"; do
  if [ "${word//_/-}" = --dry-run ]; then DRY_RUN=1; else words+=("$word"); fi
done
set -- "${words[@]}"
read -ra recover_args <<< "$RECOVER_ARGS"
read -ra distil_args <<< "$DISTIL_ARGS"
read -ra evaluate_args <<< "$EVALUATE_ARGS"

# --- refuse what can be refused -----------------------------------------------------------------------------------

one_node "a loop's stages run on one node; its GPUs all take part"
need_switch DRY_RUN HEAL
for name in MAX_ROUNDS RECOVER_STEPS CALIB_TOKENS; do need_number "$name" 1; done
LONGER_STEPS=${LONGER_STEPS:-$((2 * RECOVER_STEPS))}
need_number LONGER_STEPS 1
need_number DISTIL_STEPS 0
need METRIC 'token_acc|exact_match|cer|reward|loss' "choose token_acc, exact_match, cer, reward or loss"
need KEEP_ROUNDS 'good|last|all' "choose good, last or all"
for name in TARGET_PARAMS TARGET_KV; do
  need "$name" '|0?\.[0-9]*[1-9][0-9]*' "give the share that is to be left, between 0 and 1"
done
need TARGET_BYTES '|[0-9]{1,15}(\.[0-9]+)?(e[0-9]{1,2})?' "give bytes, as 5e9"
need KEEP '0?\.[0-9]*[1-9][0-9]*|1(\.0*)?' "give the share of the base's $METRIC to keep, as 0.97"
need ROUND_SHARE '0?\.[0-9]*[1-9][0-9]*' "give a share of the weights, as 0.25"
need CUTS '(layers|heads|neurons|kv)( +(layers|heads|neurons|kv))*' "choose from layers, heads, neurons and kv"
[ -n "$TARGET_PARAMS$TARGET_BYTES$TARGET_KV" ] || die "no target: set TARGET_PARAMS, TARGET_BYTES or TARGET_KV"
[[ $METRIC != reward || " $EVALUATE_ARGS " == *" --rewards "* ]] ||
  die "METRIC=reward: of which rewards? EVALUATE_ARGS='--rewards ocr_cer --plugins plugins/ocr_rewards.py'"
case $METRIC in
  token_acc | loss) [[ $EVALUATE_ARGS =~ --(no-generate|rewards) ]] || evaluate_args+=(--no-generate) ;;
  *) [[ $EVALUATE_ARGS != *--no-generate* ]] || die "METRIC=$METRIC: is of answers, and EVALUATE_ARGS has --no-generate" ;;
esac

result=distilled
[ "$DISTIL_STEPS" -gt 0 ] || result=recovered
out=$OUTPUT
[ -z "$DRY_RUN" ] || OUTPUT=$OUTPUT.dry-run # that is never made, nor is anything of a loop that runs touched
if [ "$result" = distilled ]; then
  USER_ARGS=("${distil_args[@]}" "$@")
  settle gkd 4 --rlhf_type gkd --teacher_model "$MODEL" --dataset "$DATASET" --val_dataset "$VAL_DATASET" \
    "${FULL_ARGS[@]}" >/dev/null
  preflight rlhf --teacher "$MODEL"
fi
USER_ARGS=("${recover_args[@]}" "$@")
settle sft 4 --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" >/dev/null
# Of the model's size: a training's checkpoints; the round's cuts, trials and results; what stays of rounds, and OUTPUT.
disk=$((DISK_FACTOR + 9 + $([ "$KEEP_ROUNDS" = last ] && echo 1 || echo "$MAX_ROUNDS")))
[ "$KEEP_ROUNDS" != all ] || disk=$((disk + 3 * MAX_ROUNDS))
preflight sft --disk-factor "$disk"
scanners=$PROCESSES
use_gpus "${GPUS%%,*}" # cuts and evaluations take one, trainings are told all of them
OUTPUT=${out%/}
folder=$OUTPUT.loop
BEGIN=(
  python -m prunekit.loop begin --model "$MODEL" --keep "$KEEP" --metric "$METRIC" --cuts "$CUTS" --share "$ROUND_SHARE"
  ${TARGET_PARAMS:+--target-params "$TARGET_PARAMS"} ${TARGET_BYTES:+--target-bytes "$TARGET_BYTES"}
  ${TARGET_KV:+--target-kv "$TARGET_KV"} --data "$DATASET" "$VAL_DATASET"
)
"${BEGIN[@]}"
megabytes=$(du -cmL --apparent-size "$MODEL"/*.safetensors | tail -n 1 | cut -f1)
echo "disk: up to $((disk * megabytes)) MB, $disk times the model, most of it while a stage trains (KEEP_ROUNDS=$KEEP_ROUNDS)"

export DATASET VAL_DATASET GPUS
export -n STAGE RESTART OVERWRITE REUSE KEEP_RUN # this loop's, not its stages'
plugins=()
[ ${#USER_PLUGINS[@]} -eq 0 ] || plugins=(--external_plugins "${USER_PLUGINS[@]}")
[ -z "$DRY_RUN" ] || echo "+ export $(quoted DATASET="$DATASET" VAL_DATASET="$VAL_DATASET" GPUS="$GPUS")"

# --- what a round is made of --------------------------------------------------------------------------------------

# run COMMAND...: say a line as a person would type it, and run it; its exit code.
run() {
  local begun=$SECONDS code=0
  local -a said=("$@") # without env
  [ "$1" != env ] || said=("${@:2}")
  echo "+ $(quoted "${said[@]}")"
  [ -z "$DRY_RUN" ] || return 0
  run_to_end "$@" || code=$?
  echo "${here##*/} $((SECONDS - begun)) ${said[*]:0:3}" >> "$folder/seconds"
  return "$code"
}
stop() { # WHAT
  fail "round ${here##*/} stopped: $1's messages are above; the same command goes on with it (before a training gets other" \
    "flags, remove its $here/*.run)"
}

have() { # NAME...: is any of these in the round's folder?
  local name
  for name in "$@"; do [ ! -e "$here/$name" ] || return 0; done
  return 1
}

NAMES=(--model-type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"})
CALIB=(--calib "$DATASET" --calib-tokens "$CALIB_TOKENS" "${NAMES[@]}")

evaluate() { # JSON ARGS...: measure models on VAL_DATASET
  local json=$1
  shift
  rm -f "$json.new"
  run python -m prunekit.evaluate --dataset "$VAL_DATASET" "${NAMES[@]}" --json "$json.new" "$@" || return $?
  [ -n "$DRY_RUN" ] || mv "$json.new" "$json"
}

trained() { # NAME MODEL LAUNCHER ARGS...: that launcher makes NAME of MODEL, or cleans up behind a NAME that it has made
  local name=$1 model=$2 launcher=$3
  shift 3
  if have "$name" && [ ! -d "$here/$name.run" ]; then return; fi
  local -a settings=(MODEL="$model" OUTPUT="$here/$name" RUN_NAME="round-$ROUND-$name")
  [ "$launcher" != distil.sh ] || settings+=(TEACHER="$MODEL")
  run env "${settings[@]}" bash "$ROOT/$launcher" "${plugins[@]}" "$@" || stop "$launcher"
}

measure_candidates() { # what each kind of cut costs, healed or refitted, on VAL_DATASET
  local name script flags said
  local -a models=() trials=() more=()
  if [[ " $CUTS " == *" layers "* ]] && ! have scan/scan.json; then
    [ "$WANTS" != kv ] || more+=(--vision none) # which has none of it
    [ -z "$HEAL" ] || more+=(--heal --calib "$DATASET" --calib-tokens "$CALIB_TOKENS")
    run env ${GPUS:+CUDA_VISIBLE_DEVICES="$GPUS"} python -m prunekit.scan --model "$from" --dataset "$VAL_DATASET" \
      --out "$here/scan" --tokens 0 "${NAMES[@]}" --target-params "$LEAVES" --processes "$scanners" "${more[@]}" ||
      stop prunekit.scan
  fi
  ! have trials.json || return 0
  said=$(python -m prunekit.loop trials --into "$state" --model "$from")
  [ -z "$said" ] || mapfile -t trials <<< "$said"
  for name in "${trials[@]}"; do
    read -r name script flags <<< "$name"
    models+=("$here/trials/$name")
    # shellcheck disable=SC2086  # flags and numbers
    have "trials/$name" || run python "$ROOT/$script" --model "$from" --out "$here/trials/$name" $flags "${CALIB[@]}" || stop "$script"
  done
  [ ${#models[@]} -eq 0 ] || evaluate "$here/trials.json" --model "$from" "${models[@]}" --no-generate ||
    stop prunekit.evaluate
}

make_cut() { # what is cheapest, from $from into $here/cut; 3: nothing fits
  local line number=0 input=$from output chosen trial
  local -a lines measured=() fitting
  ! have scan/scan.json || measured+=(--scan "$here/scan/scan.json")
  ! have trials.json || measured+=(--trials "$here/trials.json")
  chosen=$(python -m prunekit.loop choose --into "$state" --model "$from" "${measured[@]}") || return $?
  mapfile -t lines <<< "$chosen"
  for line in "${lines[@]}"; do
    number=$((number + 1))
    read -ra words <<< "$line"
    output=$here/cut
    [ "$number" -eq ${#lines[@]} ] || output=$here/cut-$number
    if [ ! -e "$output" ]; then
      fitting=("${CALIB[@]}")
      if [ "${words[0]}" = manual_select.py ]; then fitting=(${HEAL:+--heal "${CALIB[@]}"}); fi
      trial=trials/${words[1]#--}-${words[2]}
      if [ -z "$DRY_RUN" ] && [ "$number" -eq 1 ] && [ ${#words[@]} -eq 3 ] && have "$trial"; then
        mv "$here/$trial" "$output" # that very cut, made already
      else
        run python "$ROOT/${words[0]}" --model "$input" --out "$output" "${words[@]:1}" "${fitting[@]}" ||
          stop "${words[0]}"
      fi
    fi
    input=$output
  done
  [ -n "$DRY_RUN" ] || rm -rf "$here/trials"
}

# answer NAME TEXT: the value of NAME= in what a step of prunekit.loop says.
answer() { sed -n "s/^$1=//p" <<< "$2"; }
lasting() { echo --max_steps "$1"; }

# --- the loop -----------------------------------------------------------------------------------------------------

state=$folder here=$folder/0
if [ -n "$DRY_RUN" ]; then
  state=$(mktemp -d)
  trap 'rm -rf "$state"' EXIT
  [ ! -e "$folder/loop.json" ] || cp "$folder/loop.json" "$state"
  [ -e "$folder/loop.json" ] || evaluate "$folder/base.json" --model "$MODEL" "${evaluate_args[@]}"
  "${BEGIN[@]}" --into "$state"
else
  claim_work
  if is_published; then # killed while cleaning up
    remove_work
    echo "$OUTPUT is there already"
    exit 0
  fi
  [ -z "$RESTART" ] || rm -rf "$folder"
  if [ ! -e "$folder/loop.json" ]; then
    mkdir -p "$folder"
    code=0
    evaluate "$folder/base.json" --model "$MODEL" "${evaluate_args[@]}" || code=$?
    [ "$code" -ne 0 ] || "${BEGIN[@]}" --into "$folder" --base-scores "$folder/base.json" || code=$?
    if [ "$code" -ne 0 ]; then
      rm -rf "$folder"
      exit "$code"
    fi
  else
    "${BEGIN[@]}" --into "$folder"
  fi
  export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}
  setup_wandb
  settings=()
  for name in MODEL DATASET VAL_DATASET OUTPUT TARGET_PARAMS TARGET_BYTES TARGET_KV KEEP METRIC CUTS MAX_ROUNDS \
    ROUND_SHARE KEEP_ROUNDS RECOVER_STEPS DISTIL_STEPS LONGER_STEPS RECOVER_ARGS DISTIL_ARGS EVALUATE_ARGS CALIB_TOKENS HEAL; do
    settings+=("$name=${!name}")
  done
  printf '%s\n' "# $STAGE, run in $PWD" "$(quoted env "${settings[@]}" bash "$ROOT/loop.sh" "${plugins[@]}" "$@")" \
    > "$folder/command.sh"
fi

while true; do
  found=$(python -m prunekit.loop next --into "$state" --max-rounds "$MAX_ROUNDS" --keep-rounds "$KEEP_ROUNDS" \
    ${DRY_RUN:+--dry-run})
  END=$(answer END "$found")
  [ -z "$END" ] || break
  ROUND=$(answer ROUND "$found") LEAVES=$(answer LEAVES "$found") WANTS=$(answer WANTS "$found")
  from=$(answer FROM "$found")
  from=${from:+$folder/}${from:-$MODEL}
  here=$folder/$ROUND
  [ -n "$DRY_RUN" ] || mkdir -p "$here"
  echo "round $ROUND of at most $MAX_ROUNDS: from $from, which keeps $(answer KEPT "$found") of the base's $METRIC;" \
    "$(answer MOST "$found") parameters may go"
  if ! have cut recovered distilled; then
    measure_candidates
    code=0
    if [ -n "$DRY_RUN" ] && ! have scan/scan.json trials.json; then
      echo "# what of these is cheapest for the target (docs/loop.md), for instance:"
      run python "$ROOT/manual_select.py" --model "$from" --out "$here/cut" --text N ${HEAL:+--heal "${CALIB[@]}"}
    else
      make_cut || code=$?
    fi
    [ "$code" -ne 3 ] || continue
    [ "$code" -eq 0 ] || exit "$code"
  fi
  if ! have distilled; then
    # shellcheck disable=SC2046  # several words
    trained recovered "$here/cut" full_run.sh $(lasting "$RECOVER_STEPS") "${recover_args[@]}" "$@"
  fi
  if [ "$result" = distilled ]; then
    # shellcheck disable=SC2046
    trained distilled "$here/recovered" distil.sh $(lasting "$DISTIL_STEPS") "${distil_args[@]}" "$@"
  fi
  have evaluation.json || evaluate "$here/evaluation.json" --model "$here/$result" "${evaluate_args[@]}" ||
    stop prunekit.evaluate
  if [ -n "$DRY_RUN" ]; then
    echo "# keeps it KEEP=$KEEP? Then round $((ROUND + 1)) from there. If not, for longer, and else half as much from $from:"
    # shellcheck disable=SC2046
    trained longer "$here/$result" full_run.sh $(lasting "$LONGER_STEPS") "${recover_args[@]}" "$@"
    exit 0
  fi
  verdict=$(python -m prunekit.loop judge --into "$folder" --result "$result")
  echo "$verdict"
  if [ "$(answer VERDICT "$verdict")" = longer ]; then
    # shellcheck disable=SC2046
    trained longer "$here/$result" full_run.sh $(lasting "$LONGER_STEPS") "${recover_args[@]}" "$@"
    have longer.json || evaluate "$here/longer.json" --model "$here/longer" "${evaluate_args[@]}" ||
      stop prunekit.evaluate
    python -m prunekit.loop judge --into "$folder" --result "$result"
  fi
done
echo "no more rounds: $END"
[ -z "$DRY_RUN" ] || exit 0
{ stat -c %i "$OUTPUT" 2>/dev/null || echo none; } > "$WORK/publishing"
code=0
python -m prunekit.loop publish --into "$folder" --out "$OUTPUT" --max-rounds "$MAX_ROUNDS" ${OVERWRITE:+--overwrite} || code=$?
[ "$code" -ne 2 ] || exit 1
remove_work
exit "$code"
