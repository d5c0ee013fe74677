#!/usr/bin/env bash
# The method as a loop: find what is cheap, cut it, recover, distil, measure, and again, until the model is small enough.
#   In:   $MODEL (a checkpoint, the teacher too), $DATASET, $VAL_DATASET (ms-swift messages JSONL), and what you want:
#         targets, any of TARGET_PARAMS=0.6 and TARGET_KV=0.125 (shares of the base's parameters, of its KV cache),
#         TARGET_BYTES=5e9 (of weights) and TARGET_SPEED=2.0 (times as fast), and KEEP=0.97 of the base's METRIC on
#         VAL_DATASET, the gate. END='kv lora rl': stages behind the last round
#   Out:  $OUTPUT: the last checkpoint that keeps the gate. $OUTPUT.loop: loop.json (what could be cut, what was, what it
#         kept), loop.png (the way), report (a card to show), and a folder a round: scan, cut, recovered, distilled, as if
#         made by hand
#         Exit code 0: all targets are reached; 3: OUTPUT keeps the gate, but not all are; 1: nothing keeps it
#   Cost: a round is a scan, a fit a trial, full_run.sh and distil.sh; how much disk is said beforehand
#   MODEL=Qwen3-VL-8B-Instruct OUTPUT=checkpoints/small TARGET_BYTES=5e9 KEEP=0.97 bash loop.sh
#   MODEL=Qwen3-VL-8B-Instruct TARGET_PARAMS=0.6 CUTS='layers neurons' bash loop.sh --dry-run   # prints the lines only
#   MODEL=Qwen3-30B-A3B TARGET_PARAMS=0.5 CUTS='layers experts neurons' bash loop.sh   # experts of a mixture, too
#   MODEL=Qwen3-VL-8B-Instruct TARGET_SPEED=2 END='kv rl' RL_DATASET=data/rl.jsonl bash loop.sh
# The same command goes on with what is there, and with folders that you put in their places.
source "$(dirname "$0")/lib/common.sh"
PATIENCE=200 # with launchers, which have theirs with a trainer and a server

MODEL=${MODEL:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/small}

TARGET_PARAMS=${TARGET_PARAMS:-}    # 0.6: the share of the base's parameters that is left
TARGET_BYTES=${TARGET_BYTES:-}      # 5e9: of weights
TARGET_KV=${TARGET_KV:-}            # 0.125: the share of the base's KV bytes a token
TARGET_SPEED=${TARGET_SPEED:-}      # 2.0: times as fast as the base, measured on this machine after each round
SPEED_OF=${SPEED_OF:-decoding}      # what is to be faster: decoding or prefill
SPEED_ARGS=${SPEED_ARGS:---batches 1} # --batches 32 --prompt-tokens 2048 --decode-tokens 64 (python -m prunekit.speed)
KEEP=${KEEP:-0.97}                  # the gate: what a round must keep of the base's METRIC
METRIC=${METRIC:-token_acc}         # token_acc, exact_match, cer, reward, loss (docs/loop.md says what a share of each is)
CUTS=${CUTS:-layers heads neurons kv} # what may be cut; experts (of a mixture) and vocabulary, too
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
HEAL=${HEAL-1}                      # empty: seams of removed layers aren't healed, nor judged healed
ON_NODES=${ON_NODES:-}              # words before each training's `bash full_run.sh ...`, which run it on all nodes:
                                    # 'srun bash examples/slurm/node.sh' (docs/training.md)

END=${END:-}                        # stages behind the last round, in this order: kv, lora and rl, each behind the gate
END_KV=${END_KV:-1}                 # kv: merge KV heads to so many in one go, refined so long, and recover so long
END_REFINE=${END_REFINE:-200}
END_STEPS=${END_STEPS:-2000}
LORA_DATASET=${LORA_DATASET:-}      # lora: rows of the skill to repair, with some of the old ones
LORA_ARGS=${LORA_ARGS:-}            # flags for lora.sh
RL_DATASET=${RL_DATASET:-}          # rl: rows with the truth in a column, as rl_run.sh takes them
RL_ARGS=${RL_ARGS:-}                # flags for rl_run.sh; its settings (ALGORITHM, ...) are taken from outside
CARD=${CARD-1}                      # empty: no report card at the end
CARD_ARGS=${CARD_ARGS:---limit 200} # flags for it: --by skill, --check-serving
DRY_RUN=${DRY_RUN:-}                # 1 (or the flag --dry-run): print the lines, run none

words=()
for word in "$@"; do
  if [ "${word//_/-}" = --dry-run ]; then DRY_RUN=1; else words+=("$word"); fi
done
set -- "${words[@]}"
# To the end, which read calls a failure: of several lines, too
read -rd "" -a recover_args <<< "$RECOVER_ARGS" || true
read -rd "" -a distil_args <<< "$DISTIL_ARGS" || true
read -rd "" -a evaluate_args <<< "$EVALUATE_ARGS" || true
read -rd "" -a speed_args <<< "$SPEED_ARGS" || true
read -rd "" -a lora_args <<< "$LORA_ARGS" || true
read -rd "" -a rl_args <<< "$RL_ARGS" || true
read -rd "" -a card_args <<< "$CARD_ARGS" || true
read -rd "" -a on_nodes <<< "$ON_NODES" || true
read -ra end_stages <<< "$END"

# --- refuse what can be refused -----------------------------------------------------------------------------------

[ -z "$CHECK" ] || DRY_RUN=1
CHECK='' # not its stages'
one_node "a loop is one process: unset NNODES, and have its trainings run on all nodes by ON_NODES"
need_switch DRY_RUN HEAL CARD
for name in MAX_ROUNDS RECOVER_STEPS CALIB_TOKENS END_KV END_STEPS; do need_number "$name" 1; done
need_number END_REFINE 0
LONGER_STEPS=${LONGER_STEPS:-$((2 * RECOVER_STEPS))}
need_number LONGER_STEPS 1
need_number DISTIL_STEPS 0
need METRIC 'token_acc|exact_match|cer|reward|loss' "choose token_acc, exact_match, cer, reward or loss"
need KEEP_ROUNDS 'good|last|all' "choose good, last or all"
for name in TARGET_PARAMS TARGET_KV; do
  need "$name" '|0?\.[0-9]*[1-9][0-9]*' "give the share that is to be left, between 0 and 1"
done
need TARGET_SPEED '|[0-9]{1,3}(\.[0-9]+)?' "give how many times as fast, as 2.0"
need SPEED_OF 'decoding|prefill' "choose decoding or prefill"
need END '|(kv|lora|rl)( +(kv|lora|rl))*' "choose from kv, lora and rl"
[ -z "$(tr -s ' ' '\n' <<< "$END" | sort | uniq -d)" ] || die "END=$END: name each once"
[[ " $END " != *" lora "* ]] || [ -n "$LORA_DATASET" ] || die "END=$END: of which skill? Set LORA_DATASET"
[[ " $END " != *" rl "* ]] || [ -n "$RL_DATASET" ] || die "END=$END: on which rows? Set RL_DATASET"
[ -z "${RAY_ADDRESS:-}" ] || [ -z "$HEAL" ] || die "RAY_ADDRESS=$RAY_ADDRESS: scans on a cluster don't heal: set HEAL=0, or unset it"
need TARGET_BYTES '|[0-9]{1,15}(\.[0-9]+)?(e[0-9]{1,2})?' "give bytes, as 5e9"
need KEEP '0?\.[0-9]*[1-9][0-9]*|1(\.0*)?' "give the share of the base's $METRIC to keep, as 0.97"
need ROUND_SHARE '0?\.[0-9]*[1-9][0-9]*' "give a share of the weights, as 0.25"
kind='(layers|experts|heads|neurons|kv|vocabulary)'
need CUTS "$kind( +$kind)*" "choose from layers, experts, heads, neurons, kv and vocabulary"
[[ " $CUTS " != *" vocabulary "* || " $END " != *" rl "* || ${ALGORITHM:-} != OPD ]] ||
  die "ALGORITHM=OPD: its TEACHER has the tokens that CUTS=vocabulary takes away: cut no vocabulary, or choose another ALGORITHM"
[ -n "$TARGET_PARAMS$TARGET_BYTES$TARGET_KV$TARGET_SPEED" ] ||
  die "no target: set TARGET_PARAMS, TARGET_BYTES, TARGET_KV or TARGET_SPEED"
[[ $METRIC != reward || " ${evaluate_args[*]} " == *" --rewards "* ]] ||
  die "METRIC=reward: of which rewards? EVALUATE_ARGS='--rewards ocr_cer --plugins plugins/ocr_rewards.py'"
case $METRIC in
  token_acc | loss) [[ $EVALUATE_ARGS =~ --(no-generate|rewards) ]] || evaluate_args+=(--no-generate) ;;
  *) [[ $EVALUATE_ARGS != *--no-generate* ]] || die "METRIC=$METRIC: is of answers, and EVALUATE_ARGS has --no-generate" ;;
esac

refuse_data_flags "$@"
[ -z "$REUSE" ] || die "REUSE=1: is for a single training; leave it out: the same command goes on by itself"

result=distilled
[ "$DISTIL_STEPS" -gt 0 ] || result=recovered
out=$OUTPUT
[ -z "$DRY_RUN" ] || OUTPUT=$OUTPUT.dry-run # that is never made, nor is anything of a loop that runs touched
USER_ARGS=("${recover_args[@]}" "$@")
settle sft 4 --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" >/dev/null
ENVIRONMENT=() # of its stages, each of which settles its own
# Of the model's size: a training's checkpoints; the round's cuts, trials and results; what stays of rounds, and OUTPUT.
disk=$((DISK_FACTOR + 9 + $([ "$KEEP_ROUNDS" = last ] && echo 1 || echo "$MAX_ROUNDS") + ${#end_stages[@]}))
[ "$KEEP_ROUNDS" != all ] || disk=$((disk + 3 * MAX_ROUNDS + 2 * ${#end_stages[@]}))
megabytes=$(weight_of "$MODEL")
used=$(du -smL --apparent-size "${out%/}.loop" 2>/dev/null | cut -f1 || true) # by this loop, before it was interrupted
more=$((disk - ${used:-0} / (megabytes > 0 ? megabytes : 1)))
preflight sft --disk-factor "$((more > DISK_FACTOR ? more : DISK_FACTOR))"
# check LAUNCHER ARGS...: have it refuse what it would, of what there is by now: the base stands for what it will get. And
# have it say its memory.
check() {
  env CHECK=1 MODEL="$MODEL" OUTPUT="${out%/}.checked" bash "$ROOT/$1" --external_plugins "${USER_PLUGINS[@]}" "${@:2}" |
    { grep '^memory: ' || true; }
}
# The port may be held by what an interrupted round left behind
[ "$result" != distilled ] || DATASET=$DATASET VAL_DATASET=$VAL_DATASET GPUS=$GPUS TEACHER=$MODEL ROLLOUT_PORT='' \
  check distil.sh "${distil_args[@]}" "$@"
[[ " $END " != *" lora "* ]] || DATASET=$LORA_DATASET VAL_DATASET=$VAL_DATASET check lora.sh "${lora_args[@]}"
[[ " $END " != *" rl "* ]] || DATASET=$RL_DATASET VAL_DATASET='' check rl_run.sh "${rl_args[@]}"
[[ " $END " != *" kv "* ]] || python "$ROOT/kv_cut.py" --model "$MODEL" --kv-heads "$END_KV" --dry-run >/dev/null
scanners=(--processes "$PROCESSES")
[ -z "${RAY_ADDRESS:-}" ] || scanners=(--gpus-per-task "$([ -n "$GPUS" ] && echo 1 || echo 0)")
use_gpus "${GPUS%%,*}" # cuts and evaluations take one, trainings are told all of them
OUTPUT=${out%/}
folder=$OUTPUT.loop
BEGIN=(
  python -m prunekit.loop begin --model "$MODEL" --keep "$KEEP" --metric "$METRIC" --cuts "$CUTS" --share "$ROUND_SHARE"
  ${TARGET_PARAMS:+--target-params "$TARGET_PARAMS"} ${TARGET_BYTES:+--target-bytes "$TARGET_BYTES"}
  ${TARGET_KV:+--target-kv "$TARGET_KV"} ${TARGET_SPEED:+--target-speed "$TARGET_SPEED" --speed-of "$SPEED_OF"}
  --data "$DATASET" "$VAL_DATASET"
)
"${BEGIN[@]}"
echo "disk: up to $((disk * megabytes)) MB, $disk times the model, most of it while a stage trains (KEEP_ROUNDS=$KEEP_ROUNDS)"

export DATASET VAL_DATASET GPUS
export -n STAGE RESTART OVERWRITE REUSE KEEP_RUN CHECK # this loop's, not its stages'
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
  echo "${here#"$folder"/} $((SECONDS - begun)) $(quoted "${said[@]}")" >> "$folder/seconds"
  return "$code"
}
stop() { # WHAT
  fail "round ${here#"$folder"/} stopped: $1's messages are above; the same command goes on with it (before a training gets other" \
    "flags, remove its $here/*.run)"
}

have() { # NAME...: is any of these in the round's folder?
  local name
  for name in "$@"; do [ ! -e "$here/$name" ] || return 0; done
  return 1
}

NAMES=(--model-type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"} ${DTYPE:+--dtype "$DTYPE"})
CALIB=(--calib "$DATASET" --calib-tokens "$CALIB_TOKENS" "${NAMES[@]}")

evaluate() { # JSON ARGS...: measure models on VAL_DATASET
  local json=$1
  shift
  rm -f "$json.new"
  run python -m prunekit.evaluate --dataset "$VAL_DATASET" "${NAMES[@]}" --json "$json.new" "$@" || return $?
  [ -n "$DRY_RUN" ] || mv "$json.new" "$json"
}

measure_speed() { # JSON MODEL...: measure models beside each other, if a speed is wanted
  local json=$1
  shift
  [ -n "$TARGET_SPEED" ] && [ ! -e "$json" ] || return 0
  rm -f "$json.new"
  run python -m prunekit.speed "$@" "${speed_args[@]}" --json "$json.new" || return $?
  [ -n "$DRY_RUN" ] || mv "$json.new" "$json"
}

trained() { # NAME MODEL LAUNCHER ARGS...: that launcher makes NAME of MODEL, or cleans up behind a NAME that it has made
  local name=$1 model=$2 launcher=$3
  shift 3
  if have "$name" && [ ! -d "$here/$name.run" ]; then return; fi
  local -a settings=(MODEL="$model" OUTPUT="$here/$name" RUN_NAME="$label-$name")
  case $launcher in
    distil.sh)
      settings+=(TEACHER="$teacher")
      # CACHE is of what the base says
      [ -z "${CACHE:-}" ] || [ "$teacher" = "$MODEL" ] || settings+=(CACHE="$teacher.cache")
      ;;
    export_lora.sh) settings+=(ADAPTER="$here/lora") ;;
    lora.sh) settings+=(DATASET="$LORA_DATASET") ;;
    rl_run.sh) settings+=(DATASET="$RL_DATASET" VAL_DATASET=) ;;
  esac
  local -a nodes=("${on_nodes[@]}")
  [ "$launcher" != export_lora.sh ] || nodes=()
  run env "${settings[@]}" "${nodes[@]}" bash "$ROOT/$launcher" "${plugins[@]}" "$@" || stop "$launcher"
}

fitting() { # SCRIPT FLAGS...: sets FIT, what that takes to fit its cut on DATASET
  case $1 in
    manual_select.py)
      FIT=()
      if [[ " $* " == *" --heal "* ]]; then FIT=("${CALIB[@]}"); fi
      ;;
    vocab_cut.py) FIT=(--calib "$DATASET") ;;
    *) FIT=("${CALIB[@]}") ;;
  esac
}

measure_candidates() { # what each kind of cut costs, healed or refitted, on VAL_DATASET
  local -a more=()
  if [[ " $CUTS " == *" layers "* ]] && [ -z "$SCANNED" ] && ! have scan/scan.json; then
    [[ "$WANTS" == *params* || "$WANTS" == *bytes* ]] || more+=(--vision none) # which has no KV cache, nor reads text
    [ -z "$HEAL" ] || more+=(--heal --calib "$DATASET" --calib-tokens "$CALIB_TOKENS")
    run env ${GPUS:+CUDA_VISIBLE_DEVICES="$GPUS"} python -m prunekit.scan --model "$from" --dataset "$VAL_DATASET" \
      --out "$here/scan" --tokens 0 "${NAMES[@]}" --path-only --target-params "$LEAVES" "${scanners[@]}" "${more[@]}" ||
      stop prunekit.scan
  fi
  try_cuts trials.json
}

try_cuts() { # JSON ARGS...: make and measure the cuts that prunekit.loop lists
  local json=$1 name script flags said
  local -a models=() trials=()
  shift
  ! have "$json" || return 0
  said=$(python -m prunekit.loop trials --into "$state" --model "$from" "$@") || return $?
  [ -z "$said" ] || mapfile -t trials <<< "$said"
  for name in "${trials[@]}"; do
    read -r name script flags <<< "$name"
    models+=("$here/trials/$name")
    fitting "$script"
    # shellcheck disable=SC2086  # flags and numbers
    have "trials/$name" || run python "$ROOT/$script" --model "$from" --out "$here/trials/$name" $flags "${FIT[@]}" || stop "$script"
  done
  [ ${#models[@]} -eq 0 ] || evaluate "$here/$json" --model "$from" "${models[@]}" --no-generate ||
    stop prunekit.evaluate
}

choose_cuts() { # ARGS...: the scripts that make the cheapest cut, a line each; 3: nothing fits; 4: smaller ones are worth a trial
  local name
  local -a measured=(--trials)
  for name in trials.json finer.json; do
    ! have "$name" || measured+=("$here/$name")
  done
  ! have scan/scan.json || measured+=(--scan "$here/scan/scan.json")
  python -m prunekit.loop choose --into "$state" --model "$from" ${HEAL:+--heal} "${measured[@]}" "$@"
}

make_cut() { # what is cheapest, from $from into $here/cut; 3: nothing fits
  local line number=0 input=$from output chosen trial code=0
  local -a lines
  chosen=$(choose_cuts) || code=$?
  if [ "$code" -eq 4 ]; then
    code=0
    try_cuts finer.json --finer || return $?
    chosen=$(choose_cuts --finer) || code=$?
  fi
  [ "$code" -eq 0 ] || return "$code"
  mapfile -t lines <<< "$chosen"
  for line in "${lines[@]}"; do # the teacher needs the student's tokens
    read -ra words <<< "$line"
    [ "${words[0]}" = vocab_cut.py ] || continue
    fitting vocab_cut.py
    have teacher || run python "$ROOT/vocab_cut.py" --model "$teacher" --out "$here/teacher" "${words[@]:1}" "${FIT[@]}" ||
      stop vocab_cut.py
  done
  for line in "${lines[@]}"; do
    number=$((number + 1))
    read -ra words <<< "$line"
    output=$here/cut
    [ "$number" -eq ${#lines[@]} ] || output=$here/cut-$number
    if [ ! -e "$output" ]; then
      fitting "${words[@]}"
      trial=trials/${words[1]#--}-${words[2]}
      if [ -z "$DRY_RUN" ] && [ "$number" -eq 1 ] && [ ${#words[@]} -eq 3 ] && have "$trial"; then
        # That very cut, made already. Where another follows, which may break, the choice reads it again
        if [ "$number" -eq ${#lines[@]} ]; then mv "$here/$trial" "$output"; else output=$here/$trial; fi
      else
        run python "$ROOT/${words[0]}" --model "$input" --out "$output" "${words[@]:1}" "${FIT[@]}" ||
          stop "${words[0]}"
      fi
    fi
    input=$output
  done
  [ -n "$DRY_RUN" ] || rm -rf "$here/trials"
}

make_card() { # a page to show, of what was published: never worth the loop
  [ -n "$CARD" ] && ! { [ -e "$folder/report" ] && [ -z "$OVERWRITE" ]; } || return 0
  here=$folder/report
  run python -m prunekit.card "$OUTPUT" --base "$MODEL" --loop "$folder" --out "$here" --overwrite \
    --dataset "$VAL_DATASET" "${NAMES[@]}" "${evaluate_args[@]}" "${card_args[@]}" ||
    echo "warning: no report card: its messages are above; $OUTPUT is whole" >&2
}

finish() { # what comes behind OUTPUT, also where that was killed
  local code=0
  [ ! -e "$folder/loop.json" ] || python -m prunekit.loop reached --into "$folder" --max-rounds "$MAX_ROUNDS" || code=$?
  make_card
  remove_work
  exit "$code"
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
  if [ ! -e "$folder/loop.json" ]; then
    evaluate "$folder/base.json" --model "$MODEL" "${evaluate_args[@]}"
    measure_speed "$folder/speed.json" "$MODEL" --parts
  fi
  "${BEGIN[@]}" --into "$state"
else
  claim_work
  if [ -z "$RESTART" ] && is_published; then # killed while cleaning up
    [ ! -e "$folder/loop.json" ] || "${BEGIN[@]}" --into "$folder"
    echo "$OUTPUT is there already"
    finish
  fi
  [ -z "$RESTART" ] || forget "$folder" loop.json
  if [ ! -e "$folder/loop.json" ]; then
    mkdir -p "$folder"
    rm -f "$folder/speed.json" # one that was killed before it began may have been of another base
    code=0
    evaluate "$folder/base.json" --model "$MODEL" "${evaluate_args[@]}" || code=$?
    [ "$code" -ne 0 ] || measure_speed "$folder/speed.json" "$MODEL" --parts || code=$?
    [ "$code" -ne 0 ] || "${BEGIN[@]}" --into "$folder" --base-scores "$folder/base.json" \
      ${TARGET_SPEED:+--base-speed "$folder/speed.json"} || code=$?
    if [ "$code" -ne 0 ]; then # as if it had never been, but for what was put there by hand
      rm -f "$folder"/{base.json,speed.json}{,.new} "$folder"/{seconds,loop.json}
      rmdir "$folder" 2>/dev/null || true
      exit "$code"
    fi
  else
    "${BEGIN[@]}" --into "$folder"
  fi
  export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$(basename "$OUTPUT")}
  setup_wandb
  settings=()
  for name in MODEL DATASET VAL_DATASET OUTPUT TARGET_PARAMS TARGET_BYTES TARGET_KV TARGET_SPEED SPEED_OF SPEED_ARGS KEEP \
    METRIC CUTS MAX_ROUNDS ROUND_SHARE KEEP_ROUNDS RECOVER_STEPS DISTIL_STEPS LONGER_STEPS RECOVER_ARGS DISTIL_ARGS \
    EVALUATE_ARGS CALIB_TOKENS HEAL ON_NODES END END_KV END_REFINE END_STEPS LORA_DATASET LORA_ARGS RL_DATASET RL_ARGS \
    CARD CARD_ARGS; do
    settings+=("$name=${!name}")
  done
  printf '%s\n' "# $STAGE, run in $PWD" "$(quoted env "${settings[@]}" bash "$ROOT/loop.sh" "${plugins[@]}" "$@")" \
    > "$folder/command.sh"
fi

while true; do
  found=$(python -m prunekit.loop next --into "$state" --max-rounds "$MAX_ROUNDS" --keep-rounds "$KEEP_ROUNDS" \
    ${DRY_RUN:+--dry-run})
  why=$(answer END "$found")
  [ -z "$why" ] || break
  ROUND=$(answer ROUND "$found") LEAVES=$(answer LEAVES "$found") WANTS=$(answer WANTS "$found")
  SCANNED=$(answer SCANNED "$found") # from here, by a round that failed
  from=$(answer FROM "$found")
  from=${from:+$folder/}${from:-$MODEL}
  teacher=$(answer TEACHER "$found")
  teacher=${teacher:+$folder/}${teacher:-$MODEL}
  here=$folder/$ROUND label=round-$ROUND
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
    if have teacher; then teacher=$here/teacher; fi
    # shellcheck disable=SC2046
    trained distilled "$here/recovered" distil.sh $(lasting "$DISTIL_STEPS") "${distil_args[@]}" "$@"
  fi
  have evaluation.json || evaluate "$here/evaluation.json" --model "$here/$result" "${evaluate_args[@]}" ||
    stop prunekit.evaluate
  measure_speed "$here/speed.json" "$MODEL" "$here/$result" || stop prunekit.speed
  if [ -n "$DRY_RUN" ]; then
    echo "# keeps it KEEP=$KEEP? Then round $((ROUND + 1)) from there. If not, for longer, and else half as much from $from:"
    # shellcheck disable=SC2046
    trained longer "$here/$result" full_run.sh $(lasting "$LONGER_STEPS") "${recover_args[@]}" "$@"
    why=''
    break
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
[ -z "$why" ] || echo "no more rounds: $why"

# --- behind the last round ----------------------------------------------------------------------------------------

end_stage() { # STAGE ARGS...: make and measure it in its folder, from $from
  local stage=$1 made=$1
  shift
  case $stage in
    kv)
      made=recovered
      have cut recovered || run python "$ROOT/kv_cut.py" --model "$from" --out "$here/cut" --kv-heads "$END_KV" \
        --refine "$END_REFINE" "${CALIB[@]}" || stop kv_cut.py
      # shellcheck disable=SC2046
      trained recovered "$here/cut" full_run.sh $(lasting "$END_STEPS") "${recover_args[@]}" "$@"
      ;;
    lora)
      made=merged
      have merged || trained lora "$from" lora.sh "${lora_args[@]}"
      trained merged "$from" export_lora.sh
      ;;
    rl) trained rl "$from" rl_run.sh "${rl_args[@]}" ;;
  esac
  have evaluation.json || evaluate "$here/evaluation.json" --model "$here/$made" "${evaluate_args[@]}" ||
    stop prunekit.evaluate
  [ "$stage" != kv ] || measure_speed "$here/speed.json" "$MODEL" "$here/$made" || stop prunekit.speed
  if [ -n "$DRY_RUN" ]; then
    from=$here/$made
    return
  fi
  verdict=$(python -m prunekit.loop judge-end --into "$folder" --stage "$stage" --result "$made")
  echo "$verdict"
  [ "$(answer VERDICT "$verdict")" = longer ] || return 0
  # shellcheck disable=SC2046
  trained longer "$here/$made" full_run.sh $(lasting "$LONGER_STEPS") "${recover_args[@]}" "$@"
  have longer.json || evaluate "$here/longer.json" --model "$here/longer" "${evaluate_args[@]}" || stop prunekit.evaluate
  python -m prunekit.loop judge-end --into "$folder" --stage "$stage" --result "$made"
}

if [ -n "$DRY_RUN" ]; then
  from=$here/$result
  [ -z "$END" ] || echo "# behind the last round, each from the last one that keeps KEEP=$KEEP:"
  for stage in "${end_stages[@]}"; do
    here=$folder/end/$stage label=end
    end_stage "$stage" "$@"
  done
  [ -z "$CARD" ] || make_card
  exit 0
fi
while [ -n "$END" ]; do
  found=$(python -m prunekit.loop end --into "$folder" --stages "$END" --kv-heads "$END_KV" --keep-rounds "$KEEP_ROUNDS")
  stage=$(answer STAGE "$found")
  [ -n "$stage" ] || break
  from=$(answer FROM "$found")
  here=$folder/end/$stage label=end
  mkdir -p "$here"
  echo "behind the last round: $stage, from $from"
  end_stage "$stage" "$@"
done
begin_publishing
python -m prunekit.loop publish --into "$folder" --out "$OUTPUT" ${OVERWRITE:+--overwrite} || exit 1
finish
