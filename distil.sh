#!/usr/bin/env bash
# Distil a stronger or unpruned teacher into a pruned model: GKD, on the student's own answers (on-policy).
#   In:   $MODEL (the student), $TEACHER (same tokenizer), $DATASET (prompts; answers only matter below LMBDA=1)
#   Out:  $OUTPUT (a checkpoint), with logging.jsonl, command.sh and curves.png of the run
#         CACHE=runs/cache: what the teacher says of the answers in DATASET is kept there, once (26 bytes a token), and no
#         teacher is in memory; the next distillation from it finds it there. Off-policy, so LMBDA=0.
#   Cost: as full_run.sh, plus the teacher's weights and generation. Two or more GPUs: a vLLM rollout server takes
#         $ROLLOUT_GPUS of $GPUS (a quarter) and training the others; one GPU, or ROLLOUT_GPUS=: vLLM shares what trains;
#         no GPU: transformers generates.
#         Of several nodes the first has the server, and the others train on all their GPUs.
#         With DEEPSPEED= student and teacher are float32, and so is a vLLM that shares the GPU.
#   Not run on a GPU yet: on CPUs with vLLM's CPU build only (docs/gpu.md).
#   MODEL=checkpoints/recovered TEACHER=checkpoints/base GPUS=0,1,2,3 ROLLOUT_GPUS=3 bash distil.sh --max_steps 500
#   MODEL=checkpoints/recovered TEACHER=checkpoints/base CACHE=runs/cache bash distil.sh --max_steps 500
source "$(dirname "$0")/lib/common.sh"
PLUGINS+=("$ROOT/plugins/distillation.py") # our loss for ms-swift's, which is blind outside --gkd_logits_topk

MODEL=${MODEL:-checkpoints/recovered}
TEACHER=${TEACHER:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/distilled}

CACHE=${CACHE:-}                    # a folder for what the teacher says, instead of the teacher
REFILL=${REFILL:-}                  # 1: look through all rows again, though CACHE was filled with these data: images changed
# Share of steps on the student's own answers; 0: the data set's, and no server
LMBDA=${LMBDA:-$([ -n "$CACHE" ] && echo 0 || echo 1)}
value_of lmbda --lmbda "$LMBDA" "${USER_ARGS[@]}"
LMBDA=$VALUE
# 1: reverse KL, 0: forward KL, between: generalised Jensen-Shannon. Off-policy forward KL learns more (docs/training.md)
BETA=${BETA:-$(is_zero "$LMBDA" && echo 0 || echo 1)}
ROLLOUT_GPUS=${ROLLOUT_GPUS-auto}   # auto: the last quarter of GPUS, with PLAIN=1 the last; empty: vLLM shares all of them
ROLLOUT_PORT=${ROLLOUT_PORT:-}      # default: one that is free
ROLLOUT_DEADLINE=${ROLLOUT_DEADLINE:-900} # seconds until the server must answer

need_switch REFILL
case $CACHE in *://* | '['*) die "CACHE=$CACHE: give a folder; a teacher's server is --teacher_model_server" ;; esac
value_of teacher_model_server "${USER_ARGS[@]}"
SERVED=$VALUE
[ -z "$CACHE" ] || [ -z "$SERVED" ] || die "CACHE=$CACHE: --teacher_model_server $SERVED is another teacher: leave one out"
TEACHER_ARGS=() FOLDER=(--teacher "$TEACHER")
if [ -n "$CACHE" ]; then
  TEACHER_ARGS=(--teacher_model_server "$CACHE" --gkd_logits_topk 8)
elif [ -n "$SERVED" ]; then
  TEACHER_ARGS=(--gkd_logits_topk 8) FOLDER=()
else
  TEACHER_ARGS=(--teacher_model "$TEACHER")
fi
ARGS=(
  "${TEACHER_ARGS[@]}"
  --dataset "$DATASET"
  --val_dataset "$VAL_DATASET"
  --lmbda "$LMBDA"
  --beta "$BETA"
  --temperature "$([ -n "$SERVED" ] && echo 1 || echo 0.9)" # 1 is what a server answers at
  --max_length 4096                 # of a prompt
  --truncation_strategy delete      # another row in its place: cut from the left, an image would lose its tokens
  --max_completion_length 512
  --max_steps 1000
  --learning_rate 2e-5
  --warmup_ratio 0.05
  --eval_steps "$([ -n "$GPUS" ] && [ -z "$PLAIN" ] && echo 500 || echo 100)" # an evaluation answers all of VAL_DATASET
  --save_steps 100
  --logging_steps 5
)

need_number ROLLOUT_DEADLINE 1
[ -z "$ROLLOUT_PORT" ] || need_number ROLLOUT_PORT 1 65535
[ "$ROLLOUT_GPUS" = auto ] || need_gpus ROLLOUT_GPUS
if is_zero "$LMBDA"; then # nothing is generated
  ROLLOUT_GPUS=''
elif [ -n "$CACHE" ]; then
  die "CACHE=$CACHE has what the teacher says of the data's answers, and LMBDA=$LMBDA wants the student's own: leave one out"
elif [ -n "$GPUS" ] && [ -n "$ROLLOUT_GPUS" ] && [[ $GPUS == *,* || $ROLLOUT_GPUS != auto ]]; then
  count=$(tr , '\n' <<< "$GPUS" | wc -l)
  servers=1
  if [ -z "$PLAIN" ] && [ "$count" -ge 8 ]; then servers=$((count / 4)); fi # one keeps many waiting
  [ "$ROLLOUT_GPUS" != auto ] || ROLLOUT_GPUS=$(tr , '\n' <<< "$GPUS" | tail -n "$servers" | paste -sd,)
  training_gpus=$(tr , '\n' <<< "$GPUS" | grep -vxFf <(tr , '\n' <<< "$ROLLOUT_GPUS") | paste -sd, || true)
  [ -n "$training_gpus" ] || die "ROLLOUT_GPUS=$ROLLOUT_GPUS leaves no GPU of $GPUS for training: name fewer, or none"
  value_of vllm_mode "${USER_ARGS[@]}"
  [ "$VALUE" != colocate ] || die "--vllm_mode colocate: set ROLLOUT_GPUS= (empty) instead, or a server has GPUs for nothing"
  flags_of 'vllm_server_@(base_url|host|port|group_port)' "${USER_ARGS[@]}"
  [ ${#FLAGS[@]} -eq 0 ] || die "${FLAGS[0]}: the server is distil.sh's own (ROLLOUT_PORT=); for one of yours set ROLLOUT_GPUS= (empty)"
  engines=$(tr , '\n' <<< "$ROLLOUT_GPUS" | wc -l)
  value_of vllm_tensor_parallel_size "${USER_ARGS[@]}" # GPUs of an engine
  if [[ $VALUE =~ ^[1-9][0-9]{0,3}$ ]]; then
    [ $((engines % VALUE)) -eq 0 ] || die "--vllm_tensor_parallel_size $VALUE: ROLLOUT_GPUS=$ROLLOUT_GPUS can't be shared out by so many: name others"
    engines=$((engines / VALUE))
  fi
  ARGS+=(--use_vllm true --vllm_mode server --vllm_server_host 127.0.0.1)
  if is_main_node; then use_gpus "$training_gpus"; else use_gpus "$GPUS"; fi
  WORLD=$(($(tr , '\n' <<< "$training_gpus" | wc -l) + count * (NNODES - 1)))
elif [ -n "$GPUS" ]; then
  ROLLOUT_GPUS=''
  ARGS+=(--use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.3 --sleep_level 1)
else
  ROLLOUT_GPUS=''
fi

settle gkd 4 --rlhf_type gkd "${FULL_ARGS[@]}" "${ARGS[@]}"
if [ -n "$CHECK" ] && [ -n "$CACHE" ]; then # a check ends before fill_cache would refuse it
  python -m prunekit.training.teacher_cache "$CACHE" --teacher "$TEACHER" -- "${LINE[@]}" >/dev/null
fi
preflight rlhf "${FOLDER[@]}" --disk-factor "$DISK_FACTOR" --free-ports 2 ${ROLLOUT_PORT:+--port "$ROLLOUT_PORT"}
[ -n "$CACHE$SERVED" ] || LINE=(--teacher_model_type "$TEACHER_TYPE" "${LINE[@]}")

if [ -n "$ROLLOUT_GPUS" ]; then
  ROLLOUT_PORT=${ROLLOUT_PORT:-${FREE_PORTS%,*}}
  PORTS=(--vllm_server_port "$ROLLOUT_PORT" --vllm_server_group_port "${FREE_PORTS#*,}") # the latter brings the weights
  ROLLOUT_ARGS=(
    --torch_dtype "$COMPUTE"
    --vllm_data_parallel_size "$engines"
    --vllm_gpu_memory_utilization 0.9
    ${ENGINE_LENGTH:+--vllm_max_model_len "$ENGINE_LENGTH"}
  )
  # Those for vLLM, and those by which a question is written, which the server does.
  asks='system|max_pixels|model_kwargs|agent_template|norm_bbox|use_chat_template|template_backend|response_prefix'
  asks+='|enable_thinking|preserve_thinking|new_special_tokens|rope_scaling'
  flags_of "@(vllm_!(mode|server_*)|$asks)" "${USER_ARGS[@]}"
  if is_main_node; then
    SERVER=(
      "http://127.0.0.1:$ROLLOUT_PORT/health/" "$ROLLOUT_DEADLINE"
      env -u NPROC_PER_NODE -u NNODES -u PYTORCH_CUDA_ALLOC_CONF CUDA_VISIBLE_DEVICES="$ROLLOUT_GPUS"
      swift rollout --model "$MODEL" --model_type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"}
      --external_plugins "${EXTERNAL[@]}" --host 127.0.0.1 --port "$ROLLOUT_PORT" "${ROLLOUT_ARGS[@]}" "${FLAGS[@]}"
    )
  fi
fi

# fill_cache: have the teacher say of all rows what the training will ask, unless CACHE has it.
fill_cache() {
  local mark
  mark=$(python -m prunekit.training.teacher_cache "$CACHE" --teacher "$TEACHER" -- "${LINE[@]}" | sed -n 's/^MARK=//p')
  [ ! -e "$mark" ] || [ -n "$REFILL" ] || return 0
  claim_work
  if [ -z "$RESTART" ] && [ -e "$WORK/command.sh" ]; then # refused before the filling, not after it
    training rlhf look_at_run
    [ -e "$CACHE/cache.json" ] || CHANGED='' # by a cache that was removed
    refuse_another_run
  fi
  FLAGS=("${LINE[@]}")
  is_zero3 || flags_of '!(deepspeed)' "${LINE[@]}" # no other ZeRO has a model answer that isn't trained
  run_to_end env PRUNEKIT_FILL_CACHE="$CACHE" swift rlhf --model "$TEACHER" --model_type "$TEACHER_TYPE" \
    ${TEMPLATE:+--template "$TEMPLATE"} "${FLAGS[@]}" --report_to none --output_dir "$WORK/filling" ||
    fail "CACHE=$CACHE isn't filled (exit code $?): the messages are above; the same command goes on"
  rm -rf "$WORK/filling"
  if is_main_node; then touch "$mark"; fi
  python -m prunekit.training.teacher_cache "$CACHE"
}
if [ -n "$CACHE" ]; then fill_cache; fi
train rlhf
