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
MADE='' # set by claim_work: what a refusal after it takes away again

die() { echo "error: $*" >&2; exit 2; }  # bad input
fail() { echo "error: $*" >&2; exit 1; } # something broke

remaining=() USER_PLUGINS=() flag=''
for argument in "$@"; do
  [[ $argument != --* ]] || flag=${argument//_/-}
  case ${argument//_/-} in
    --help | -h) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    --external-plugins) continue ;; # beside ours, not in their place
    --external-plugins=*) USER_PLUGINS+=("${argument#*=}") && continue ;;
    --overwrite) OVERWRITE=1 ;;
    --model | --model=*) die "--model: set MODEL=... instead, which is checked first and published last" ;;
    --output-dir | --output-dir=*) die "--output_dir: set OUTPUT=... instead; the run's own folder is \$OUTPUT.run" ;;
    --add-version | --add-version=*) die "--add_version: leave it out: the run's own folder is \$OUTPUT.run, and no other" ;;
    --*=[!-]*) remaining+=("${argument%%=*}" "${argument#*=}") ;; # one form for all that reads them
    *) if [ "$flag" = --external-plugins ]; then USER_PLUGINS+=("$argument"); else remaining+=("$argument"); fi ;;
  esac
done
set -- "${remaining[@]}"
while [[ ${OUTPUT:-} == ?*/ ]]; do OUTPUT=${OUTPUT%/}; done # $OUTPUT.run lies beside it
USER_ARGS=("$@") # of ms-swift: they come last, so that they count
command -v swift >/dev/null || die "ms-swift is not installed: run 'bash lib/setup.sh'"
unset TQDM_DISABLE # ms-swift's evaluation writes to the training's bar, and fails where there is none

# --- settings that every launcher understands; edit here or set from outside -------------------------------

# e.g. 0,1,2,3; empty: the CPU; default: those of CUDA_VISIBLE_DEVICES, or all (a broken driver's message is no GPU)
DEVICES=$(nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits 2>/dev/null | grep -x '[0-9]\+\(, .*\)\?' || true)
GPUS=${GPUS-${CUDA_VISIBLE_DEVICES-$(cut -d, -f1 <<< "$DEVICES" | paste -sd,)}}
DTYPE=${DTYPE:-}                    # to compute in; default: bfloat16 on GPUs, float32 on a CPU. Masters are always float32
GLOBAL_BATCH=${GLOBAL_BATCH:-}      # rows of an optimizer step, shared out among all GPUs; default: about DEFAULT_BATCH
MODEL_TYPE=${MODEL_TYPE:-}          # ms-swift's name; default: the model's own model_type
TEMPLATE=${TEMPLATE:-}              # ms-swift's chat template; default: the one most like the checkpoint's own
DEEPSPEED=${DEEPSPEED-auto}         # auto: zero1 or zero2 on GPUs; zero3 for models that don't fit; empty: plain DDP
PLAIN=${PLAIN:-}                    # 1: nothing of what makes training on GPUs faster (see settle)
OVERWRITE=${OVERWRITE:-}            # 1 (or the flag --overwrite): replace a finished OUTPUT
RESTART=${RESTART:-}                # 1: forget an interrupted run instead of resuming it
CHECKPOINT=${CHECKPOINT:-last}      # which one to publish: last, or best (by ms-swift's --metric_for_best_model)
CHECK=${CHECK:-}                    # 1: refuse what can be refused, and run nothing
MEMORY=${MEMORY-1}                  # 0: don't count before a training on GPUs how much of their memory it will take
REUSE=${REUSE:-}                    # 1: an OUTPUT that this same command has made is no mistake but all there is to do
KEEP_RUN=${KEEP_RUN:-}              # 1: keep ms-swift's own checkpoints and optimizer states
WANDB_PROJECT=${WANDB_PROJECT:-prune-kit}
WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-}
RUN_NAME=${RUN_NAME:-}              # default: stage and name of OUTPUT
CPU_PROCESSES=${CPU_PROCESSES:-1}   # training processes on a machine without GPUs
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each, with OUTPUT on a
# file system that they share.

# need NAME PATTERN MEND: refuse a setting that isn't of the pattern (an extended regular expression). Before any
# arithmetic: bash would run a command that it finds in an index there.
need() {
  [[ ${!1:-} =~ ^($2)$ ]] || die "$1=$(printf %q "${!1:-}"): $3"
}
# need_number NAME LEAST [MOST]: refuse a setting that is no whole number in this range.
need_number() {
  need "$1" '0|[1-9][0-9]{0,8}' "give a whole number, $2 or more"
  [ "${!1}" -ge "$2" ] || die "$1=${!1}: give $2 or more"
  [ "${!1}" -le "${3:-999999999}" ] || die "$1=${!1}: give $3 at most"
}
# need_switch NAME...: settings that are on (1) or off (0 or empty, which it makes of it).
need_switch() {
  local name
  for name in "$@"; do
    need "$name" '|0|1' "set it to 1, or leave it empty"
    if [ "${!name}" = 0 ]; then printf -v "$name" ''; fi
  done
}
# need_gpus NAME: a list of GPUs of this machine, each once. Empty is none.
need_gpus() {
  local name=$1 gpu
  need "$name" '|([0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+)(,([0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+))*' \
    "name GPUs by their numbers, as 0,1,2; empty: the CPU"
  [ -n "${!name}" ] || return 0
  [ -z "$(tr , '\n' <<< "${!name}" | sort | uniq -d)" ] || die "$name=${!name}: names a GPU twice"
  if [ -z "$DEVICES" ]; then
    command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia*' >/dev/null ||
      die "$name=${!name}: there is no GPU here, nor nvidia-smi: $name= is the CPU"
    return 0
  fi
  for gpu in $(tr , ' ' <<< "${!name}"); do
    [[ $gpu == *-* ]] || grep -q "^$gpu\(,\|$\)" <<< "$DEVICES" ||
      die "$name=${!name}: there is no GPU $gpu here, but $(cut -d, -f1 <<< "$DEVICES" | paste -sd,)"
  done
}
need_number CPU_PROCESSES 1 1024
need DTYPE '|bfloat16|float16|float32' "choose bfloat16, float16 or float32"
need CHECKPOINT 'last|best' "choose last or best"
need_switch PLAIN OVERWRITE RESTART KEEP_RUN MEMORY CHECK REUSE
[ -z "$GLOBAL_BATCH" ] || need_number GLOBAL_BATCH 1
[[ $DEEPSPEED =~ ^(|auto|zero[0-3]|zero[23]_offload)$ ]] || [ -f "$DEEPSPEED" ] ||
  die "DEEPSPEED=$(printf %q "$DEEPSPEED"): choose zero1, zero2, zero3, zero2_offload or zero3_offload, a file, or empty"
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
need_number NNODES 1
need_number NODE_RANK 0
[ "$NODE_RANK" -lt "$NNODES" ] || die "NODE_RANK=$NODE_RANK: of NNODES=$NNODES nodes the first is 0"
[ -z "${MASTER_PORT:-}" ] || need_number MASTER_PORT 1 65535
[ "$NNODES" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$NNODES: MASTER_ADDR isn't set: the address of the node with NODE_RANK=0"
need_gpus GPUS

PLUGINS=(
  "$ROOT/plugins/images_and_answers.py"
  "$ROOT/plugins/gpt2_model.py"
  "$ROOT/plugins/head_rates.py" # --optimizer head_rates, active_heads, important_heads
)

# --- argument arrays ------------------------------------------------------------------------------------------

# use_gpus LIST: train on these GPUs (0,1,...), or on the CPU if the list is empty. Sets PROCESSES here, WORLD
# on all nodes, and COMPUTE, the type to compute in.
use_gpus() {
  export CUDA_VISIBLE_DEVICES=$1 CUDA_DEVICE_ORDER=PCI_BUS_ID # nvidia-smi's numbers, on machines with different GPUs, too
  PROCESSES=$CPU_PROCESSES
  if [ -n "$1" ]; then PROCESSES=$(tr , '\n' <<< "$1" | wc -l); fi
  WORLD=$((PROCESSES * NNODES))
  COMPUTE=${DTYPE:-$([ -n "$1" ] && echo bfloat16 || echo float32)}
  # ms-swift takes its presence as a call for torchrun, without which vLLM and DeepSpeed miss their ranks on one GPU, too.
  unset NPROC_PER_NODE
  if [ -n "$1" ] || [ "$WORLD" -gt 1 ]; then export NPROC_PER_NODE=$PROCESSES; fi
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
  --ddp_timeout 3600          # seconds; ms-swift's default would wait 208 days for a process that hangs
)

TEXT_ARGS=(                    # rows {"text": ...}, see preflight
  --use_chat_template false
  --loss_scale all              # every token is learned
  --truncation_strategy split   # plugins/texts.py: texts one behind the other, cut into blocks of --max_length tokens
  --lazy_tokenize false
)

# --- functions ------------------------------------------------------------------------------------------------

is_main_node() { [ "$NODE_RANK" -eq 0 ]; }

# one_node WHAT: refuse several nodes.
one_node() { [ "$NNODES" -eq 1 ] || die "NNODES=$NNODES: $1"; }

# value_of FLAG ARGS...: sets VALUE to the (last) value of one of ms-swift's flags, empty if it isn't there.
value_of() {
  local flag=--$1 word name previous=''
  VALUE=''
  shift
  for word in "$@"; do
    name=${word%%=*}
    name=${name//-/_}
    if [ "$previous" = "${flag//-/_}" ]; then VALUE=$word; fi
    previous=''
    if [[ $word == *=* ]] && [ "$name" = "${flag//-/_}" ]; then VALUE=${word#*=}; else previous=$name; fi
  done
}

# flags_of PATTERN ARGS...: sets FLAGS to the flags whose names match (as a file name does), with their values.
flags_of() {
  local pattern=$1 word name taken=''
  FLAGS=()
  shift
  for word in "$@"; do
    if [[ $word == --* ]]; then
      name=${word#--}
      name=${name%%=*}
      taken=''
      # shellcheck disable=SC2053  # a pattern
      [[ ${name//-/_} != $pattern ]] || taken=1
    fi
    [ -z "$taken" ] || FLAGS+=("$word")
  done
}

# refuse_data_flags ARGS...: refuse data as flags, where more than a training reads them.
refuse_data_flags() {
  local name
  for name in dataset val_dataset; do
    value_of "$name" "$@"
    [ -z "$VALUE" ] || die "--$name: set ${name^^}=... instead, which is what models are fitted and measured on, too"
  done
}

# share_batch MOST ARGS...: GLOBAL_BATCH rows a step on any number of GPUs, at most MOST of them at once on one, unless these
# flags say otherwise. Sets ACCUMULATION and BATCH_ARGS. If GLOBAL_BATCH isn't set, the nearest to DEFAULT_BATCH is taken.
DEFAULT_BATCH=${DEFAULT_BATCH:-16}
need_number DEFAULT_BATCH 1
share_batch() {
  local most=$1 batch rows=${GLOBAL_BATCH:-$DEFAULT_BATCH} micro accumulation
  shift
  value_of per_device_train_batch_size "$@"
  batch=$VALUE
  value_of gradient_accumulation_steps "$@"
  accumulation=$VALUE
  if [ -z "$batch" ]; then
    batch=$most
    while [ "$batch" -gt 1 ] && [ $((rows % (batch * WORLD))) -ne 0 ]; do batch=$((batch - 1)); done
  fi
  [[ $batch =~ ^[1-9][0-9]{0,5}$ ]] || die "--per_device_train_batch_size $batch: give a whole number, 1 or more"
  micro=$((batch * WORLD))
  if [ -z "$accumulation" ]; then
    if [ -n "$GLOBAL_BATCH" ] && [ $((rows % micro)) -ne 0 ]; then
      die "GLOBAL_BATCH=$rows does not divide by $batch rows on each of $WORLD: give a multiple of $micro"
    fi
    accumulation=$(((rows + micro / 2) / micro))
    [ "$accumulation" -gt 0 ] || accumulation=1
  fi
  [[ $accumulation =~ ^[1-9][0-9]{0,5}$ ]] || die "--gradient_accumulation_steps $accumulation: give a whole number, 1 or more"
  ACCUMULATION=$accumulation
  BATCH_ARGS=(--per_device_train_batch_size "$batch" --gradient_accumulation_steps "$accumulation")
  echo "$((micro * accumulation)) rows a step: $batch at once, on each of $WORLD, $accumulation times"
}

# gpu_memory: MB of the smallest GPU in use, or 0 if nvidia-smi doesn't say.
gpu_memory() {
  local gpu least='' memory
  for gpu in ${CUDA_VISIBLE_DEVICES//,/ }; do
    memory=$(awk -F ', ' -v gpu="$gpu" '$1 == gpu && $2 ~ /^[0-9]+$/ { print $2 }' <<< "$DEVICES")
    if [ -z "$least" ] || [ "${memory:-0}" -lt "$least" ]; then least=${memory:-0}; fi
  done
  echo "${least:-0}"
}

# weight_of FOLDER: MB of its weights, or nothing.
weight_of() { du -cmL --apparent-size "$1"/*.safetensors 2>/dev/null | tail -n 1 | cut -f1 || true; }

# choose_deepspeed ARGS...: sets ZERO to the DeepSpeed configuration of a run with these flags, or to nothing.
choose_deepspeed() {
  local megabytes teacher
  ZERO=$DEEPSPEED
  flags_of deepspeed "$@"
  if [ ${#FLAGS[@]} -gt 0 ]; then # an empty one turns it off
    value_of deepspeed "$@"
    ZERO=$VALUE
  fi
  [ "$ZERO" = auto ] || return 0
  ZERO=''
  value_of fsdp "$@"
  [ -n "$CUDA_VISIBLE_DEVICES" ] && [ -z "$VALUE" ] || return 0
  case " $* " in # single weights and heads have no optimizer state of their own in DeepSpeed's flat buffers
    *" head_rates "* | *" active_heads "* | *" important_heads "* | *" dynamic_sparsity "*) return 0 ;;
  esac
  value_of tuner_type "$@"
  if [ "$VALUE" != full ] && [ "$WORLD" -eq 1 ]; then return 0; fi # peft keeps an adapter in float32 by itself
  ZERO=zero2
  if [ -z "$PLAIN" ] && [ "$WORLD" -gt 1 ] && [ "$ACCUMULATION" -gt 1 ] && [ "$VALUE" = full ]; then
    # ZeRO-2 sends all gradients at each of the accumulated steps, ZeRO-1 once at the end; it keeps them whole for that:
    # weights and gradients in 16 bits, a share of 12 bytes a parameter, a whole teacher, and 40% left for activations and vLLM.
    megabytes=$(weight_of "$MODEL")
    value_of teacher_model "$@"
    teacher=$(weight_of "${VALUE:-none}")
    if [ -n "$megabytes" ] &&
      [ $(((megabytes * (2 * WORLD + 6) + ${teacher:-0} * WORLD) * 10)) -lt $(($(gpu_memory) * WORLD * 6)) ]; then ZERO=zero1; fi
  fi
}

# settle KIND MOST ARGS...: sets LINE, all of a training's flags for ms-swift but those that name the model and the output: what
# the devices need, what makes it fast, the launcher's own ARGS, the batch (MOST rows at once), and last the user's.
# KIND is sft, gkd or grpo. Also sets ZERO, its ZERO_STAGE (empty without), DISK_FACTOR, what may be needed on the disk in sizes
# of the model, and ENVIRONMENT, NAME=VALUE for what is run.
ENVIRONMENT=()
settle() {
  local kind=$1 most=$2 full='' weights=$COMPUTE colocate found attention word epochs=''
  local -a device speed=()
  shift 2
  local -a all=("$@" "${USER_ARGS[@]}")
  value_of tuner_type "${all[@]}"
  [ "$VALUE" != full ] || full=1
  value_of vllm_mode "${all[@]}"
  colocate=$([ "$VALUE" = colocate ] && echo 1 || true)
  if [ -z "$CUDA_VISIBLE_DEVICES" ] || [ -n "$PLAIN" ] || [ "$(gpu_memory)" -lt 40000 ]; then
    [ "$kind" = grpo ] || most=1
  fi
  share_batch "$most" "${all[@]}"
  choose_deepspeed "${all[@]}"
  ZERO_STAGE=''
  if [ -n "$ZERO" ]; then ZERO_STAGE=$(python -m prunekit.msswift.settings -- "$ZERO"); fi

  # Sums of small steps are lost in 16 bits: AdamW in bfloat16 does 0.2% of what it should at a rate of 1e-6. DeepSpeed
  # keeps a float32 copy of the weights that are trained; without it, they are float32 themselves and 16 bits are autocast's.
  if [ -n "$full" ] && [ -z "$ZERO" ]; then weights=float32; fi
  device=(
    --torch_dtype "$weights"
    --bf16 "$([ "$COMPUTE" = bfloat16 ] && echo true || echo false)" # never left to ms-swift: it takes float32 for fp16
    --fp16 "$([ "$COMPUTE" = float16 ] && echo true || echo false)"
  )
  if [ -n "$ZERO" ]; then device+=(--deepspeed "$ZERO"); fi
  if [ -z "$CUDA_VISIBLE_DEVICES" ]; then
    device+=(
      --use_cpu true            # without it several processes train replicas that never meet
      --gradient_checkpointing false
      --dataloader_num_workers 0
    )
    if [ "$WORLD" -gt 1 ]; then device+=(--ddp_backend gloo); fi
  elif [ -z "$PLAIN" ]; then
    found=" $(python -m prunekit.training.speedups "$MODEL") "
    value_of attn_impl "${all[@]}"
    attention=$VALUE
    if [ -z "$attention" ] && [ "$COMPUTE" != float32 ] && [[ $found == *" flash_attention_2 "* ]]; then
      attention=flash_attention_2
      # Its kernel lies in the hub's cache, and yet the hub is asked about it wherever that isn't forbidden.
      [ -n "${HF_HUB_OFFLINE:-}" ] || wants_hub "${all[@]}" || ENVIRONMENT+=(HF_HUB_OFFLINE=1)
      speed+=(--attn_impl "$attention")
    fi
    if [ "$kind" = sft ]; then
      # Rows of a batch one behind the other instead of padded: as many rows a step as without, unlike packing.
      if [[ $attention == flash* && $found == *" padding_free "* ]]; then
        speed+=(--padding_free true)
      elif ! is_multimodal; then
        speed+=(--group_by_length true) # ms-swift would decode all images beforehand
      fi
      # Fuses the vocabulary's projection and its loss. Not with ZeRO-3: it reads a weight that may not be there.
      if [[ $found == *" liger "* ]] && ! is_zero3; then speed+=(--use_liger_kernel true); fi
      speed+=(
        --dataloader_num_workers "$(at_most 8 $(($(nproc) / PROCESSES)))" # images are decoded and resized there
        --per_device_eval_batch_size "$(at_most 4 "$most")"
      )
    elif [ "$kind" = gkd ]; then
      # Its evaluation generates: in batches, and not often. If not, whole rows of the data are answers, as long as they are.
      value_of lmbda "${all[@]}"
      speed+=(--per_device_eval_batch_size "$(is_zero "$VALUE" && at_most 4 "$most" || echo 16)")
      value_of max_completion_length "${all[@]}"
      # The whole vocabulary's logits of long answers don't fit: Liger's loss makes them in chunks.
      if [[ $found == *" liger "* && $VALUE =~ ^[0-9]{4,6}$ && $VALUE -gt 1024 ]] && ! is_zero3 &&
        ! [[ " ${all[*]//-/_} " == *" __gkd_logits_topk"* || " ${all[*]//-/_} " == *" __sft_alpha"* ]]; then
        value_of teacher_model "${all[@]}" # whose head ours fills up where it is shorter; Liger's doesn't
        if [ "$(vocabulary "${VALUE:-$MODEL}")" = "$(vocabulary "$MODEL")" ]; then speed+=(--use_liger_kernel true); fi
      fi
    fi
    if [ -n "$colocate" ]; then
      speed+=(--sleep_level 2) # training sends new weights before each rollout: none need be kept in the host's memory
    elif [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
      ENVIRONMENT+=(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) # rows of all lengths fragment it
    fi
    value_of vllm_mode "${all[@]}"
    if [ -n "$VALUE" ] && is_zero3; then speed+=(--move_model_batches 16); fi # else all weights are gathered at once
    echo "for speed: ${speed[*]} (PLAIN=1 leaves it out)"
  fi
  for word in "${USER_ARGS[@]}"; do # the trainer goes by steps where it is told both
    case ${word//-/_} in __num_train_epochs) epochs=1 ;; __max_steps) epochs='' ;; esac
  done
  plugin_list
  LINE=(
    --external_plugins "${EXTERNAL[@]}" "${device[@]}" "${RUN_ARGS[@]}" "$@" "${speed[@]}" "${BATCH_ARGS[@]}" "${USER_ARGS[@]}"
    ${epochs:+--max_steps -1}
  )
  refuse_lost_steps "$full"
  DISK_FACTOR=1.1
  # Three checkpoints exist while one is saved. DeepSpeed's have weights, a 16-bit and a 32-bit copy and two moments.
  if [ -n "$full" ]; then DISK_FACTOR=$([ -n "$ZERO" ] && echo 25 || echo 19); fi
}

# plugin_list: sets EXTERNAL, our plugins and the user's, each once.
plugin_list() { mapfile -t EXTERNAL < <(printf '%s\n' "${PLUGINS[@]}" "${USER_PLUGINS[@]}" | awk 'NF && !seen[$0]++'); }

# wants_hub ARGS...: is a data set, a reward or reference model no file or folder here, so that ms-swift would fetch it?
wants_hub() {
  local word
  flags_of '@(*dataset|reward_model|ref_model)' "$@"
  for word in "${FLAGS[@]}"; do
    [[ $word == --* ]] || [ -e "$word" ] || [ -e "${word%#*}" ] || return 0
  done
  return 1
}
at_most() { echo $(($2 > $1 ? $1 : $2 > 0 ? $2 : 1)); }
is_zero() { [[ $1 =~ ^0*\.?0*$ && $1 == *0* ]]; }
# is_zero3: does ZERO split the weights up?
is_zero3() { [ "$ZERO_STAGE" = 3 ]; }
vocabulary() { grep -so '"vocab_size": *[0-9]*' "$1/config.json" | sort -u || true; }
is_multimodal() { grep -qs '"vision_config"' "$MODEL/config.json"; }

# refuse_lost_steps FULL: refuse full training of 16-bit weights without a float32 copy, at a rate whose steps they'd round away.
refuse_lost_steps() {
  local rate
  [ -n "$1" ] && [ -z "$ZERO" ] || return 0
  value_of learning_rate "${LINE[@]}"
  rate=$VALUE
  value_of torch_dtype "${LINE[@]}"
  [[ $VALUE =~ ^b?float16$ ]] && awk -v rate="$rate" 'BEGIN { exit !(rate < 1e-5) }' || return 0
  die "--torch_dtype $VALUE would round steps of --learning_rate $rate away: leave it out, or set DEEPSPEED=zero2"
}

# preflight KIND CHECKS...: refuse bad input before anything is written (see prunekit/training/preflight.py): KIND (sft, rlhf,
# export) says what ms-swift does with LINE. Sets MODEL_TYPE, TEACHER_TYPE, TEMPLATE, ENGINE_LENGTH, FREE_PORTS, keeps LINE
# within the model's positions, and names a LoRA's targets there that all-linear passes over. What an interrupted run of this
# OUTPUT left running is ended here: it may hold the port or the GPUs. Where rows are texts, {"text": ...}, TEXT_ARGS and
# their plugin join LINE.
preflight() {
  OUTPUT=${OUTPUT%/} # a launcher's own default
  local kind=$1 found name value overwrite=$OVERWRITE
  local -a targets
  shift
  if [ -d "$OUTPUT.run" ]; then
    claim_work
    [ -n "$RESTART" ] || ! is_published || overwrite=1
  fi
  [ -z "$REUSE" ] || overwrite=1 # run_swift looks at what is there
  found=$(python -m prunekit.training.preflight --model "$MODEL" --out "$OUTPUT" ${overwrite:+--overwrite} --checkpoint "$CHECKPOINT" \
    --gpu-memory "$(gpu_memory)" ${MODEL_TYPE:+--model-type "$MODEL_TYPE"} ${TEMPLATE:+--template "$TEMPLATE"} "$@" \
    --swift "$kind" -- "${LINE[@]}")
  ENGINE_LENGTH=''
  while IFS='=' read -r name value; do
    case $name in # libraries may print lines of their own
      MODEL_TYPE) MODEL_TYPE=${MODEL_TYPE:-$value} ;;
      TEACHER_TYPE) TEACHER_TYPE=${TEACHER_TYPE:-$value} ;;
      TEMPLATE) export TEMPLATE=${TEMPLATE:-$value} ;; # to the launchers that this one calls, too
      TARGET_MODULES)
        read -ra targets <<< "$value"
        [ -z "$value" ] || LINE+=(--target_modules "${targets[@]}")
        ;;
      TEXTS) [ -z "$value" ] || LINE=("${TEXT_ARGS[@]}" "${LINE[@]}" --external_plugins "${EXTERNAL[@]}" "$ROOT/plugins/texts.py") ;;
      MAX_LENGTH) [ -z "$value" ] || LINE+=(--max_length "$value") ;;
      COMPLETION_LENGTH) [ -z "$value" ] || LINE+=(--max_completion_length "$value") ;;
      ENGINE_LENGTH) ENGINE_LENGTH=$value ;;
      FREE_PORTS) FREE_PORTS=$value ;;
    esac
  done <<< "$found"
  if [[ " ${LINE[*]//-/_} " == *" __vllm_mode colocate "* && " ${LINE[*]//-/_} " != *" __vllm_max_model_len"* && -n $ENGINE_LENGTH ]]; then
    LINE+=(--vllm_max_model_len "$ENGINE_LENGTH")
  fi
  [ "$kind" = export ] || tell_memory
  [ -z "$CHECK" ] || exit 0
}

# tell_memory: say how much of each GPU's memory a training by LINE will take (see prunekit/memory.py). It stops nothing.
tell_memory() {
  local megabytes
  [ -n "$MEMORY" ] && [ -n "$CUDA_VISIBLE_DEVICES" ] && is_main_node || return 0
  megabytes=$(($(gpu_memory) * 1048576 / 1000000))
  value_of rlhf_type "${LINE[@]}"
  CUDA_VISIBLE_DEVICES='' python -m prunekit.memory --line --stage "${VALUE:-sft}" --model "$MODEL" --gpus "$WORLD" \
    --gpu-memory "${megabytes}e-3" -- "${LINE[@]}" || echo "memory: not counted, see above; the training goes on" >&2
}

setup_wandb() {
  export WANDB_PROJECT WANDB_DIR=${WANDB_DIR:-$(dirname "$OUTPUT")}
  [ -n "$WANDB_RUN_GROUP" ] && export WANDB_RUN_GROUP
  mkdir -p "$WANDB_DIR"
  local offline
  offline=$(python -m prunekit.training.tracking)
  if [ -n "$offline" ]; then
    export WANDB_MODE=offline
    echo "$offline"
  fi
}

# end_group PGID: ask a process group to stop, then, after PATIENCE tenths of a second, make it.
PATIENCE=50
end_group() {
  kill -TERM -- "-$1" 2>/dev/null || kill -TERM "$1" 2>/dev/null || return 0 # just started, it has no group yet
  for _ in $(seq "$PATIENCE"); do
    # its dead don't count: in a container nobody may collect them
    grep -qsE "\) [^ZX] [0-9]+ $1 " /proc/[0-9]*/stat || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

# run_group COMMAND...: run in a process group of its own, so that ending it ends all of it: the swift command is
# only a wrapper, and the trainer behind it would outlive it. In ENVIRONMENT. Sets GROUP_PID.
groups=()
run_group() {
  env "$RUN_MARK" "${ENVIRONMENT[@]}" setsid "$@" 9>&- &
  GROUP_PID=$!
  groups+=("$GROUP_PID")
}
# run_to_end COMMAND...: the same, and wait for it. Its exit code.
run_to_end() {
  local code=0
  run_group "$@"
  wait "$GROUP_PID" || code=$?
  end_group "$GROUP_PID" # what the trainer left behind
  unset 'groups[-1]'
  return "$code"
}
end_groups() {
  local code=$? group
  trap '' INT TERM HUP # a second Ctrl-C must not leave half of it running
  for group in "${groups[@]}" $(jobs -pr); do end_group "$group"; done # none that ended: others may have its number
  if [ "$code" -eq 2 ] && [ -n "$MADE" ] && [ ! -e "$WORK/command.sh" ]; then # refused: as if it had never been
    rm -f "$WORK/lock-$NODE_RANK" "$WORK/launcher-$NODE_RANK"
    find "$MADE" -depth -type d -empty -delete 2>/dev/null || true
  elif [ "$code" -ne 0 ] && [ -n "$WORK" ]; then
    touch "$WORK/failed-$NODE_RANK" 2>/dev/null || true # to nodes that wait for this one
  fi
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
  local folder=$OUTPUT.run node=$NODE_RANK owner code=0
  if [ ! -e "$folder" ]; then
    MADE=$folder
    while [ ! -e "$(dirname "$MADE")" ]; do MADE=$(dirname "$MADE"); done
  fi
  if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ] && ! ls "$folder"/lock-* &>/dev/null; then
    die "$folder is in the way, and no run's: move it, or choose another OUTPUT"
  fi
  mkdir -p "$folder"
  exec 9>>"$folder/lock-$node"
  flock -n -E 75 9 2>/dev/null || code=$?
  if [ "$code" -ne 0 ]; then
    [ "$code" -eq 75 ] || die "$folder: no file can be locked there (Lustre needs -o flock): choose an OUTPUT elsewhere"
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

# alike LINE: refuse a node that would train by another line than the first, as with GPUs of other memory or without flash
# attention: torchrun would take what each says, and batches would differ from node to node.
alike() {
  local file=$WORK/command.sh
  for _ in $(seq 600); do # it may be at its checks yet
    [ ! -e "$file" ] || break
    sleep 1
  done
  [ ! -e "$file" ] || [ "$(tail -n 1 "$file")" = "$1" ] ||
    die "node $NODE_RANK would train by another line than $file, the first node's: have nodes alike, or name what differs" \
      "(DEEPSPEED, --per_device_train_batch_size, --attn_impl, ...): $1"
}

# look_at_run KIND ARGS...: sets COMMAND, ms-swift's, and what tells it from the run in $WORK (or with REUSE from $OUTPUT, if
# that is what is there: FROM): TYPED, how it is typed, SAME, if so was that, MADE_FROM, and CHANGED, what of this was another.
look_at_run() {
  local found
  COMMAND=(swift "$1" --model "$MODEL" --model_type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"} "${@:2}")
  TYPED=$(quoted "${COMMAND[@]}")
  if [[ -n ${HEAD_RATES:-} && $TYPED == *_heads" "* || -n ${HEAD_RATES:-} && $TYPED == *" head_rates "* ]]; then
    TYPED="HEAD_RATES=$(printf %q "$HEAD_RATES") $TYPED" # of these optimizers a setting, too
  fi
  FROM=$WORK
  [ -z "$REUSE" ] || [ -e "$WORK/command.sh" ] || [ ! -e "$OUTPUT" ] || FROM=$OUTPUT
  found=$(python -m prunekit.checkpoint.provenance --of "$FROM" -- "${COMMAND[@]:2}")
  MADE_FROM=$(sed -n 's/^MADE_FROM=//p' <<< "$found")
  CHANGED=$(sed -n 's/^CHANGED=//p' <<< "$found")
  SAME=''
  if [ ! -e "$FROM/command.sh" ] || [ "$(tail -n 1 "$FROM/command.sh")" = "$TYPED" ]; then SAME=1; fi
}

# refuse_another_run: refuse to resume a run in $WORK that isn't the one that look_at_run was told of.
refuse_another_run() {
  [ -z "$CHANGED" ] || die "$WORK holds an interrupted run $CHANGED: put that back, or set RESTART=1 to forget it"
  if [ -n "${ZERO:-}" ] && [ -e "$WORK/world" ] && [ "$(< "$WORK/world")" != "$WORLD" ]; then
    die "$WORK holds a run of $(< "$WORK/world") processes, and DeepSpeed resumes with no other number: name as many GPUs, or set RESTART=1"
  fi
  [ -n "$SAME" ] ||
    die "$WORK holds an interrupted run with other settings: repeat those (its command.sh), or set RESTART=1 to forget it"
}

# run_swift KIND ARGS...: run ms-swift in $WORK, resuming an interrupted run of the same settings. If SERVER is set
# (what start_server takes), that runs beside it. PORTS are flags that may be others when a run goes on.
SERVER=() PORTS=()
run_swift() {
  local resume=''
  look_at_run "$@"
  if [ "$FROM" = "$OUTPUT" ]; then
    if [ -z "$RESTART$OVERWRITE" ]; then
      rm -rf "$WORK"
      [ -n "$SAME" ] && [ -z "$CHANGED" ] || die "$OUTPUT was made ${CHANGED:-with other settings}: set RESTART=1 to make it anew"
      echo "$OUTPUT is there already"
      exit 0
    fi
    SAME=1 CHANGED=''
  fi
  [ -z "$REUSE" ] || OVERWRITE=1
  if [ -z "$RESTART" ] && [ -n "$SAME" ] && [ -z "$CHANGED" ] && is_published; then # killed while cleaning up
    if is_main_node; then clean_up; fi
    exit 0
  elif is_published; then
    [ -n "$OVERWRITE" ] || die "$OUTPUT: exists; choose another OUTPUT or pass --overwrite"
    RESTART=1
  fi
  if [ -n "$RESTART" ]; then
    if is_main_node; then
      empty_work
      rm -f "$WORK"/{publishing,command.sh,made_from.json}
    fi
  else
    is_main_node || alike "$TYPED"
    refuse_another_run
    resume=$(python -m prunekit.training.publish --run "$WORK" --find-resume)
    if [ "$resume" = ended ]; then
      echo "all steps are taken, in $WORK"
      return
    fi
  fi
  if is_main_node; then
    echo "$MADE_FROM" > "$WORK/made_from.json.new"
    mv "$WORK/made_from.json.new" "$WORK/made_from.json"
    printf '%s\n' "# $STAGE, run in $PWD" "$TYPED" > "$WORK/command.sh.new"
    mv "$WORK/command.sh.new" "$WORK/command.sh"
    echo "$WORLD" > "$WORK/world"
  fi
  # Offloading builds an optimizer for the CPU; a build that was killed leaves a lock on which the next would wait for ever.
  if ! [[ ${ZERO:-} =~ ^(zero[0-3])?$ ]]; then
    python -m prunekit.training.stale_locks
  fi
  if [ ${#SERVER[@]} -gt 0 ]; then start_server "${SERVER[@]}"; fi
  COMMAND+=("${PORTS[@]}")
  echo "+ $(quoted "${COMMAND[@]}")"
  if [ -n "$resume" ]; then
    echo "resuming from $resume"
    COMMAND+=(--resume_from_checkpoint "$resume")
  fi
  run_to_end "${COMMAND[@]}" ||
    fail "$STAGE failed (exit code $?): its messages are above; the same command goes on from its last checkpoint"
}

# training sft|rlhf FUNCTION: call it with the whole line of a training by LINE.
training() { "$2" "$1" --run_name "${RUN_NAME:-$STAGE-$(basename "$OUTPUT")}" "${LINE[@]}" --output_dir "$WORK"; }

# train sft|rlhf: train $MODEL in $OUTPUT.run by LINE and publish $OUTPUT.
train() {
  claim_work
  setup_wandb
  training "$1" run_swift
  if is_main_node; then publish; fi
}

# export_merged: merge $ADAPTER into $MODEL by LINE and publish $OUTPUT.
export_merged() {
  claim_work
  rm -rf "$WORK/merged"
  run_swift export "${LINE[@]}" --output_dir "$WORK/merged"
  publish --weights "$WORK/merged"
}

# publish ARGS...: turn what a run wrote into $OUTPUT, whole or not at all, and clean up.
publish() {
  publish_with -m prunekit.training.publish --run "$WORK" "$@" --base "$MODEL" --out "$OUTPUT" --stage "$STAGE" \
    --checkpoint "$CHECKPOINT"
}

# publish_with ARGS...: the same, by Python with these arguments.
publish_with() {
  begin_publishing
  python "$@" ${OVERWRITE:+--overwrite}
  clean_up
}

begin_publishing() {
  { stat -c %i "$OUTPUT" 2>/dev/null || echo none; } > "$WORK/publishing.new"
  mv "$WORK/publishing.new" "$WORK/publishing"
}

# is_published: is $OUTPUT another folder than when this run began to publish?
is_published() {
  [ -e "$WORK/publishing" ] && [ -e "$OUTPUT" ] && [ "$(stat -c %i "$OUTPUT")" != "$(< "$WORK/publishing")" ]
}

clean_up() {
  if [ -e "$OUTPUT/logging.jsonl" ]; then
    python -m prunekit.report "$OUTPUT" || echo "warning: no figures for $OUTPUT: the message is above" >&2
  fi
  if [ -n "$KEEP_RUN" ]; then rm -f "$WORK/publishing"; else remove_work; fi
  echo "$STAGE: wrote $OUTPUT"
}

# forget FOLDER FILE: remove a folder, and last the FILE in it that says what it is of: were this killed, it would say so.
forget() {
  [ ! -d "$1" ] || find "$1" -mindepth 1 -maxdepth 1 ! -name "$2" -exec rm -rf {} +
  rm -rf "$1"
}

# empty_work: remove all that is large from $WORK. Were this killed, what is left would still say whose it was.
empty_work() {
  find "$WORK" -mindepth 1 -maxdepth 1 ! -name 'lock-*' ! -name 'launcher-*' ! -name publishing ! -name command.sh \
    ! -name made_from.json -exec rm -rf {} +
}

remove_work() {
  local gone=$OUTPUT.partial-$$-run # whoever makes OUTPUT the next time removes that, too
  empty_work
  exec 9>&- # NFS keeps a file that is open, and its folder
  mv -T "$WORK" "$gone" # at once: a half of it would be no run's, and in the way of the same command
  rm -rf "$gone"
}
