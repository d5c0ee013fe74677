# What the launchers share. Sourced, never run: settings, argument arrays and a few functions.
# A launcher sets MODEL, DATASET, OUTPUT, ... before or after sourcing, then calls `train`.
# shellcheck shell=bash disable=SC2034  # arrays here are for the launchers
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An active environment (venv, conda) that has ms-swift is used; without one, that of lib/setup.sh.
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
[ -x "$active/bin/swift" ] || active=$ROOT/.venv
PATH=$active/bin:$PATH
STAGE=${STAGE:-$(basename "$0" .sh)}
WORK='' # set by claim_work, never from outside: it is deleted in the end
POSITIONS='' # set by preflight

die() { echo "error: $*" >&2; exit 2; }  # bad input
fail() { echo "error: $*" >&2; exit 1; } # something broke

case " $* " in
  *" --help "* | *" -h "*)
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit 0
    ;;
esac
remaining=()
for argument in "$@"; do
  case ${argument//_/-} in
    --overwrite) OVERWRITE=1 ;;
    --model | --model=*) die "--model: set MODEL=... instead, which is checked first and published last" ;;
    --output-dir | --output-dir=*) die "--output_dir: set OUTPUT=... instead; the run's own folder is \$OUTPUT.run" ;;
    *) remaining+=("$argument") ;;
  esac
done
set -- "${remaining[@]}"
command -v swift >/dev/null || die "ms-swift is not installed: run 'bash lib/setup.sh'"

# --- settings that every launcher understands; edit here or set from outside -------------------------------

# e.g. 0,1,2,3; empty: the CPU; default: those of CUDA_VISIBLE_DEVICES, or all (a broken driver's message is no GPU)
find_gpus() { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]\+' | paste -sd, || true; }
GPUS=${GPUS-${CUDA_VISIBLE_DEVICES-$(find_gpus)}}
DTYPE=${DTYPE:-$([ -n "$GPUS" ] && echo bfloat16 || echo float32)}
MODEL_TYPE=${MODEL_TYPE:-}          # ms-swift's name; default: the model's own model_type
TEMPLATE=${TEMPLATE:-}              # ms-swift's chat template; default: the one most like the checkpoint's own
DEEPSPEED=${DEEPSPEED-zero2}        # used with several GPUs; zero3 for models that don't fit; empty: plain DDP
OVERWRITE=${OVERWRITE:-}            # 1 (or the flag --overwrite): replace a finished OUTPUT
RESTART=${RESTART:-}                # 1: forget an interrupted run instead of resuming it
CHECKPOINT=${CHECKPOINT:-last}      # which one to publish: last, or best (by ms-swift's --metric_for_best_model)
KEEP_RUN=${KEEP_RUN:-}              # 1: keep ms-swift's own checkpoints and optimizer states
WANDB_PROJECT=${WANDB_PROJECT:-prune-kit}
WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-}
RUN_NAME=${RUN_NAME:-}              # default: stage and name of OUTPUT
CPU_PROCESSES=${CPU_PROCESSES:-1}   # training processes on a machine without GPUs
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each, with OUTPUT on a
# file system that they share.

PLUGINS=(
  "$ROOT/plugins/qwen_vl_token_ids.py"
  "$ROOT/plugins/gpt2_model.py"
  "$ROOT/plugins/head_rates.py" # --optimizer head_rates, active_heads
)

# --- argument arrays ------------------------------------------------------------------------------------------

# use_gpus LIST: train on these GPUs (0,1,...), or on the CPU if the list is empty. Sets DEVICE_ARGS.
use_gpus() {
  local processes=${CPU_PROCESSES:-1} distributed=''
  if [ -n "$1" ]; then
    export CUDA_VISIBLE_DEVICES=$1
    processes=$(tr , '\n' <<< "$1" | wc -l)
  fi
  if [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then distributed=1; fi
  if [ -n "$1" ]; then
    DEVICE_ARGS=(--torch_dtype "$DTYPE")
    if [ -n "$distributed" ] && [ -n "$DEEPSPEED" ]; then DEVICE_ARGS+=(--deepspeed "$DEEPSPEED"); fi
  else
    export CUDA_VISIBLE_DEVICES=
    DEVICE_ARGS=(
      --use_cpu true            # without it several processes train replicas that never meet
      --torch_dtype "$DTYPE"
      --fp16 false
      --bf16 "$([ "$DTYPE" = bfloat16 ] && echo true || echo false)"
      --gradient_checkpointing false
      --dataloader_num_workers 0
    )
    if [ -n "$distributed" ]; then DEVICE_ARGS+=(--ddp_backend gloo); fi
  fi
  unset NPROC_PER_NODE # ms-swift takes its presence as a call for torchrun
  if [ -n "$distributed" ]; then export NPROC_PER_NODE=$processes; fi
}
use_gpus "$GPUS"

FULL_ARGS=(
  --tuner_type full
  --freeze_vit false          # ms-swift freezes both by default, even for full training
  --freeze_aligner false
)

RUN_ARGS=(
  --check_model false         # a local folder needs no look at the hub
  --add_version false
  --save_total_limit 2
  --seed 42
  --report_to wandb
)

# --- functions ------------------------------------------------------------------------------------------------

is_main_node() { [ "${NODE_RANK:-0}" -eq 0 ]; }

# preflight ARGS...: refuse bad input before anything is written (see prunekit/preflight.py; the user's own flags, put
# last, count there as they do for ms-swift). Sets MODEL_TYPE, TEACHER_TYPE, TEMPLATE and POSITIONS. What an interrupted run of this
# OUTPUT left running is ended here: it may hold the port or the GPUs.
preflight() {
  OUTPUT=${OUTPUT%/}
  local found name value overwrite=$OVERWRITE
  if [ -d "$OUTPUT.run" ]; then
    claim_work
    is_published && overwrite=1
  fi
  found=$(python -m prunekit.preflight --model "$MODEL" --out "$OUTPUT" ${overwrite:+--overwrite} --checkpoint "$CHECKPOINT" \
    ${MODEL_TYPE:+--model-type "$MODEL_TYPE"} ${TEMPLATE:+--template "$TEMPLATE"} "$@")
  while IFS='=' read -r name value; do
    case $name in # libraries may print lines of their own
      MODEL_TYPE) MODEL_TYPE=${MODEL_TYPE:-$value} ;;
      TEACHER_TYPE) TEACHER_TYPE=${TEACHER_TYPE:-$value} ;;
      TEMPLATE) export TEMPLATE=${TEMPLATE:-$value} ;; # to the launchers that this one calls, too
      POSITIONS) POSITIONS=$value ;;
    esac
  done <<< "$found"
}

setup_wandb() {
  export WANDB_PROJECT WANDB_DIR=${WANDB_DIR:-$(dirname "$OUTPUT")}
  [ -n "$WANDB_RUN_GROUP" ] && export WANDB_RUN_GROUP
  mkdir -p "$WANDB_DIR"
  local host=${WANDB_BASE_URL:-https://api.wandb.ai}
  host=${host#*://}
  if [ -z "${WANDB_MODE:-}" ] && [ -z "${WANDB_API_KEY:-}" ] && ! grep -qsF "${host%%[:/]*}" "${NETRC:-$HOME/.netrc}"; then
    export WANDB_MODE=offline
    echo "W&B: no key found, so runs are kept offline in $WANDB_DIR/wandb ('wandb login', then 'wandb sync' sends them)"
  fi
}

# within_positions ARGS...: sets WITHIN, which takes back a --max_length of more tokens than the model has positions.
within_positions() {
  local flag previous='' length=0
  for flag in "$@"; do
    case "${previous//-/_} ${flag//-/_}" in
      __max_length\ *) length=$flag ;;
      *\ __max_length=*) length=${flag#*=} ;;
    esac
    previous=$flag
  done
  WITHIN=()
  if [ -n "$POSITIONS" ] && [[ $length =~ ^[0-9]+$ ]] && [ "$length" -gt "$POSITIONS" ]; then
    WITHIN=(--max_length "$POSITIONS")
    echo "--max_length $POSITIONS: the model has no more positions; longer rows are left out" >&2
  fi
}

# end_group PGID: ask a process group to stop, then make it.
end_group() {
  kill -TERM -- "-$1" 2>/dev/null || kill -TERM "$1" 2>/dev/null || return 0 # just started, it has no group yet
  for _ in $(seq 50); do
    # its dead don't count: in a container nobody may collect them
    grep -qsE "\) [^ZX] [0-9]+ $1 " /proc/[0-9]*/stat || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

# run_group COMMAND...: run in a process group of its own, so that ending it ends all of it: the swift command is
# only a wrapper, and the trainer behind it would outlive it. Sets GROUP_PID.
groups=()
run_group() {
  env "$RUN_MARK" setsid "$@" 9>&- &
  GROUP_PID=$!
  groups+=("$GROUP_PID")
}
end_groups() {
  trap '' INT TERM HUP # a second Ctrl-C must not leave half of it running
  local group
  for group in "${groups[@]}" $(jobs -p); do end_group "$group"; done
}
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# end_leftovers: end the processes of an earlier run of this OUTPUT, known by a mark in their environment, since a
# process or group number may have been given to another meanwhile.
end_leftovers() {
  local signal
  local -a left
  for signal in TERM KILL; do
    for try in $(seq 50); do
      mapfile -t left < <(grep -lszxF "$RUN_MARK" /proc/[0-9]*/environ | cut -d/ -f3)
      [ ${#left[@]} -gt 0 ] || return 0
      if [ "$try" -eq 1 ]; then
        echo "ending what an interrupted run left behind (SIG$signal to process ${left[*]})"
        kill "-$signal" "${left[@]}" 2>/dev/null || true
      fi
      sleep 0.1
    done
  done
}

# claim_work: take $OUTPUT.run for this run alone, and end what a killed launcher left running there. Sets WORK.
claim_work() {
  [ -z "$WORK" ] || return 0
  local folder=$OUTPUT.run node=${NODE_RANK:-0} owner
  if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ] && ! compgen -G "$folder/lock-*" >/dev/null; then
    die "$folder is in the way, and no run's: move it, or choose another OUTPUT"
  fi
  mkdir -p "$folder"
  exec 9>>"$folder/lock-$node"
  if ! flock -n 9; then
    owner=$(cat "$folder/launcher-$node" 2>/dev/null || true)
    if [ "${owner#* }" != "$HOSTNAME" ] || kill -0 "${owner% *}" 2>/dev/null; then
      die "$OUTPUT is being made by process ${owner/ / on }: wait for it, stop it, or choose another OUTPUT"
    fi
    flock -w 600 9 || die "a process of an earlier run still holds $folder: end it (fuser -v $folder/lock-$node)"
  fi
  echo "$$ $HOSTNAME" > "$folder/launcher-$node"
  WORK=$folder
  RUN_MARK=PRUNEKIT_RUN=$(realpath "$folder")/$node
  end_leftovers
}

# start_server URL DEADLINE COMMAND...: start a server in a process group of its own and wait until URL answers.
start_server() {
  local url=$1 deadline=$2
  shift 2
  no_proxy=127.0.0.1,${no_proxy:-${NO_PROXY:-}}
  export no_proxy NO_PROXY=$no_proxy
  echo "+ $(quoted "$@")"
  run_group "$@"
  local server=$GROUP_PID end=$((SECONDS + deadline))
  until python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$url" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || fail "the server ended before it answered: its messages are above"
    [ "$SECONDS" -lt "$end" ] || fail "no answer from $url within $deadline s: its messages are above; or raise the deadline"
    sleep 1
  done
  echo "the server answers at $url"
}

# quoted ARGS...: as one would type them, secrets left out.
quoted() {
  local argument previous=''
  for argument in "$@"; do
    case "${previous//-/_} ${argument//-/_}" in
      __hub_token\ * | __api_key\ * | __swanlab_token\ * | __swanlab_secret\ *) printf '%s ' '***' ;;
      *\ __hub_token=* | *\ __api_key=* | *\ __swanlab_token=* | *\ __swanlab_secret=*) printf '%s ' "${argument%%=*}=***" ;;
      *) printf '%q ' "$argument" ;;
    esac
    previous=$argument
  done
}

# run_swift KIND ARGS...: run ms-swift in $WORK, resuming an interrupted run of the same settings. If SERVER is set
# (what start_server takes), that runs beside it.
SERVER=()
run_swift() {
  local kind=$1
  shift
  within_positions "$@"
  local -a command=(
    swift "$kind" --model "$MODEL" --model_type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"}
    --external_plugins "${PLUGINS[@]}" "$@" "${WITHIN[@]}"
  )
  local line resume='' same=''
  line=$(quoted "${command[@]}")
  if [ ! -e "$WORK/command.sh" ] || [ "$(tail -n 1 "$WORK/command.sh")" = "$line" ]; then same=1; fi
  if [ -z "$RESTART" ] && [ -n "$same" ] && is_published; then # killed while cleaning up
    clean_up
    exit 0
  elif is_published; then
    [ -n "$OVERWRITE" ] || die "$OUTPUT: exists; choose another OUTPUT or pass --overwrite"
    RESTART=1
  fi
  if [ -n "$RESTART" ]; then
    if is_main_node; then
      find "$WORK" -mindepth 1 -maxdepth 1 ! -name 'lock-*' ! -name 'launcher-*' -exec rm -rf {} +
    fi
  else
    [ -n "$same" ] ||
      die "$WORK holds an interrupted run with other settings: repeat those (its command.sh), or set RESTART=1 to forget it"
    resume=$(python -m prunekit.publish --run "$WORK" --find-resume)
  fi
  if is_main_node; then
    printf '%s\n' "# $STAGE, run in $PWD" "$line" > "$WORK/command.sh.new"
    mv "$WORK/command.sh.new" "$WORK/command.sh"
  fi
  if [ ${#SERVER[@]} -gt 0 ]; then start_server "${SERVER[@]}"; fi
  echo "+ $line"
  if [ -n "$resume" ]; then
    echo "resuming from $resume"
    command+=(--resume_from_checkpoint "$resume")
  fi
  run_group "${command[@]}"
  local code=0
  wait "$GROUP_PID" || code=$?
  end_group "$GROUP_PID" # what the trainer left behind
  unset 'groups[-1]'
  if [ "$code" -ne 0 ]; then
    fail "$STAGE failed (exit code $code): its messages are above; the same command goes on from its last checkpoint"
  fi
}

# train sft|rlhf ARGS...: train $MODEL in $OUTPUT.run and publish $OUTPUT.
train() {
  local kind=$1
  shift
  claim_work
  setup_wandb
  run_swift "$kind" "${DEVICE_ARGS[@]}" "${RUN_ARGS[@]}" --run_name "${RUN_NAME:-$STAGE-$(basename "$OUTPUT")}" "$@" \
    --output_dir "$WORK"
  if is_main_node; then publish "$WORK"; fi
}

# export_merged ARGS...: merge $ADAPTER into $MODEL and publish $OUTPUT.
export_merged() {
  claim_work
  rm -rf "$WORK/merged"
  run_swift export --adapters "$ADAPTER" --torch_dtype "$DTYPE" "$@" --output_dir "$WORK/merged"
  publish "$WORK/merged"
}

# publish FOLDER: turn what a run wrote into $OUTPUT, whole or not at all, and clean up.
publish() {
  { stat -c %i "$OUTPUT" 2>/dev/null || echo none; } > "$WORK/publishing.new"
  mv "$WORK/publishing.new" "$WORK/publishing"
  python -m prunekit.publish --run "$1" --base "$MODEL" --out "$OUTPUT" --stage "$STAGE" \
    --checkpoint "$CHECKPOINT" ${OVERWRITE:+--overwrite}
  clean_up
}

# is_published: is $OUTPUT another folder than when this run began to publish?
is_published() {
  [ -e "$WORK/publishing" ] && [ -e "$OUTPUT" ] && [ "$(stat -c %i "$OUTPUT")" != "$(< "$WORK/publishing")" ]
}

clean_up() {
  if [ -e "$OUTPUT/logging.jsonl" ]; then
    python -m prunekit.report "$OUTPUT" || echo "warning: no figures for $OUTPUT: the message is above" >&2
  fi
  if [ -n "$KEEP_RUN" ]; then rm -f "$WORK/publishing"; else rm -rf "$WORK"; fi
  echo "$STAGE: wrote $OUTPUT"
}
