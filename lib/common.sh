# What the launchers share. Sourced, never run: settings, argument arrays and a few functions.
# A launcher sets MODEL, DATASET, OUTPUT, ... before or after sourcing, then calls `train`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -x "$ROOT/.venv/bin/python" ] && PATH=$ROOT/.venv/bin:$PATH
STAGE=${STAGE:-$(basename "$0" .sh)}

die() { echo "error: $*" >&2; exit 2; }

case " $* " in
  *" --help "* | *" -h "*)
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit 0
    ;;
esac
remaining=()
for argument in "$@"; do
  if [ "$argument" = --overwrite ]; then OVERWRITE=1; else remaining+=("$argument"); fi
done
set -- "${remaining[@]}"
command -v swift >/dev/null || die "ms-swift is not installed: run 'bash lib/setup.sh'"

# --- settings that every launcher understands; edit here or set from outside -------------------------------

GPUS=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)} # e.g. 0,1,2,3
DTYPE=${DTYPE:-$([ -n "$GPUS" ] && echo bfloat16 || echo float32)}
MODEL_TYPE=${MODEL_TYPE:-}          # ms-swift's name; default: the model's own model_type
TEMPLATE=${TEMPLATE:-}              # ms-swift's chat template; default: the one of MODEL_TYPE
DEEPSPEED=${DEEPSPEED-zero2}        # used with several GPUs; zero3 for models that don't fit; empty: plain DDP
OVERWRITE=${OVERWRITE:-}            # 1 (or the flag --overwrite): replace a finished OUTPUT
RESTART=${RESTART:-}                # 1: forget an interrupted run instead of resuming it
KEEP_RUN=${KEEP_RUN:-}              # 1: keep ms-swift's own checkpoints and optimizer states
WANDB_PROJECT=${WANDB_PROJECT:-prune-kit}
WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-}
RUN_NAME=${RUN_NAME:-}              # default: stage and name of OUTPUT
CPU_PROCESSES=${CPU_PROCESSES:-1}   # training processes on a machine without GPUs
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each.

PLUGINS=("$ROOT/plugins/qwen_vl_token_ids.py")

# --- argument arrays ------------------------------------------------------------------------------------------

# use_gpus LIST: train on these GPUs (0,1,...), or on the CPU if the list is empty. Sets DEVICE_ARGS.
use_gpus() {
  local processes=${CPU_PROCESSES:-1}
  if [ -n "$1" ]; then
    export CUDA_VISIBLE_DEVICES=$1
    processes=$(tr , '\n' <<< "$1" | wc -l)
    DEVICE_ARGS=(--torch_dtype "$DTYPE")
    if [ "$processes" -gt 1 ] && [ -n "$DEEPSPEED" ]; then DEVICE_ARGS+=(--deepspeed "$DEEPSPEED"); fi
  else
    DEVICE_ARGS=(
      --use_cpu true            # without it several processes train replicas that never meet
      --torch_dtype "$DTYPE"
      --fp16 false
      --bf16 "$([ "$DTYPE" = bfloat16 ] && echo true || echo false)"
      --gradient_checkpointing false
      --dataloader_num_workers 0
    )
    if [ "$processes" -gt 1 ]; then DEVICE_ARGS+=(--ddp_backend gloo); fi
  fi
  unset NPROC_PER_NODE # ms-swift takes its presence as a call for torchrun
  if [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then export NPROC_PER_NODE=$processes; fi
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

# preflight ARGS...: refuse bad input before anything is written; sets MODEL_TYPE. (See prunekit/preflight.py.)
preflight() {
  local found
  found=$(python -m prunekit.preflight --model "$MODEL" --out "$OUTPUT" ${OVERWRITE:+--overwrite} "$@")
  MODEL_TYPE=${MODEL_TYPE:-$found}
}

setup_wandb() {
  export WANDB_PROJECT WANDB_DIR=${WANDB_DIR:-$(dirname "$OUTPUT")}
  [ -n "$WANDB_RUN_GROUP" ] && export WANDB_RUN_GROUP
  mkdir -p "$WANDB_DIR"
  if [ -z "${WANDB_MODE:-}" ] && [ -z "${WANDB_API_KEY:-}" ] && ! grep -qs 'api.wandb.ai' "${NETRC:-$HOME/.netrc}"; then
    export WANDB_MODE=offline
    echo "W&B: no key found, so runs are kept offline in $WANDB_DIR/wandb ('wandb login', then 'wandb sync' sends them)"
  fi
}

# end_group PGID: ask a process group to stop, then make it.
end_group() {
  kill -TERM -- "-$1" 2>/dev/null || return 0
  for _ in $(seq 50); do
    kill -0 -- "-$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

# run_group COMMAND...: run in a process group of its own, so that ending it ends all of it: the swift command is
# only a wrapper, and the trainer behind it would outlive it. Sets GROUP_PID.
groups=()
run_group() {
  setsid "$@" &
  GROUP_PID=$!
  groups+=("$GROUP_PID")
  echo "$GROUP_PID" >> "$WORK/groups"
}
end_groups() {
  local group
  for group in "${groups[@]}"; do end_group "$group"; done
}
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# claim_work: take $OUTPUT.run for this run alone. What a killed launcher left running is ended first.
claim_work() {
  [ -n "${WORK:-}" ] && return
  WORK=$OUTPUT.run
  mkdir -p "$WORK"
  exec 9>>"$WORK/lock"
  if ! flock -n 9; then
    local launcher
    launcher=$(cat "$WORK/launcher" 2>/dev/null || true)
    if [ -n "$launcher" ] && kill -0 "$launcher" 2>/dev/null; then
      die "$OUTPUT is being made by process $launcher: wait for it, stop it, or choose another OUTPUT"
    fi
    while read -r group; do end_group "$group"; done < "$WORK/groups"
    flock -w 30 9 || die "a process of an earlier run still holds $WORK: end it (fuser -v $WORK/lock)"
  fi
  echo $$ > "$WORK/launcher"
  : > "$WORK/groups"
}

# start_server URL DEADLINE COMMAND...: start a server in a process group of its own and wait until URL answers.
start_server() {
  local url=$1 deadline=$2
  shift 2
  echo "+ $(printf '%q ' "$@")"
  run_group "$@"
  local server=$GROUP_PID end=$((SECONDS + deadline))
  until python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$url" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || die "the server ended before it answered: its messages are above"
    [ "$SECONDS" -lt "$end" ] || die "no answer from $url within $deadline s: look at its messages above, or raise the deadline"
    sleep 2
  done
  echo "the server answers at $url"
}

# run_swift KIND ARGS...: run ms-swift in $WORK, resuming an interrupted run of the same settings.
run_swift() {
  local kind=$1
  shift
  if [ -n "$RESTART" ]; then
    find "$WORK" -mindepth 1 -maxdepth 1 ! -name lock ! -name launcher ! -name groups -exec rm -rf {} +
  fi
  local -a command=(
    swift "$kind" --model "$MODEL" --model_type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"}
    --external_plugins "${PLUGINS[@]}" "$@"
  )
  local line resume
  line=$(printf '%q ' "${command[@]}")
  if [ -e "$WORK/command.sh" ] && [ "$(tail -n 1 "$WORK/command.sh")" != "$line" ]; then
    die "$WORK holds an interrupted run with other settings: repeat those (its command.sh), or set RESTART=1 to forget it"
  fi
  if is_main_node; then
    printf '%s\n' "# $STAGE, run in $PWD" "$line" > "$WORK/command.sh.new"
    mv "$WORK/command.sh.new" "$WORK/command.sh"
  fi
  echo "+ $line"
  resume=$(python -m prunekit.publish --run "$WORK" --find-resume)
  if [ -n "$resume" ]; then
    echo "resuming from $resume"
    command+=(--resume_from_checkpoint "$resume")
  fi
  run_group "${command[@]}"
  local code=0
  wait "$GROUP_PID" || code=$?
  if [ "$code" -ne 0 ]; then
    echo "error: $STAGE failed (exit code $code): its messages are above; the same command goes on from its last checkpoint" >&2
    exit 1
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
  python -m prunekit.publish --run "$1" --base "$MODEL" --out "$OUTPUT" --stage "$STAGE" \
    --checkpoint "${CHECKPOINT:-last}" ${OVERWRITE:+--overwrite}
  [ -e "$OUTPUT/logging.jsonl" ] && python -m prunekit.report "$OUTPUT"
  [ -n "$KEEP_RUN" ] || rm -rf "$WORK"
  echo "$STAGE: wrote $OUTPUT"
}
