#!/usr/bin/env bash
# Distil a stronger or unpruned teacher into a pruned model: GKD, on the student's own answers (on-policy).
#   In:   $MODEL (the student), $TEACHER (same tokenizer), $DATASET (prompts; answers only matter below LMBDA=1)
#   Out:  $OUTPUT (a checkpoint), with logging.jsonl, command.sh and curves.png of the run
#   Cost: as full_run.sh, plus the teacher's weights and generation. Two or more GPUs: a vLLM rollout server takes
#         $ROLLOUT_GPUS of $GPUS and training the others; one GPU: vLLM shares it; none: transformers generates.
#   MODEL=checkpoints/recovered TEACHER=checkpoints/base GPUS=0,1,2,3 ROLLOUT_GPUS=3 bash distil.sh --max_steps 500
source "$(dirname "$0")/lib/common.sh"
PLUGINS+=("$ROOT/plugins/distillation.py") # our loss for ms-swift's, which is blind outside --gkd_logits_topk

MODEL=${MODEL:-checkpoints/recovered}
TEACHER=${TEACHER:-checkpoints/base}
DATASET=${DATASET:-data/train.jsonl}
VAL_DATASET=${VAL_DATASET:-data/val.jsonl}
OUTPUT=${OUTPUT:-checkpoints/distilled}

LMBDA=${LMBDA:-1}                   # share of steps on the student's own answers; 0: the data set's
BETA=${BETA:-1}                     # 1: reverse KL, 0: forward KL, between: generalised Jensen-Shannon
ROLLOUT_GPUS=${ROLLOUT_GPUS-${GPUS##*,}}
ROLLOUT_PORT=${ROLLOUT_PORT:-8000}
ROLLOUT_DEADLINE=${ROLLOUT_DEADLINE:-900} # seconds until the server must answer

ARGS=(
  --lmbda "$LMBDA"
  --beta "$BETA"
  --temperature 0.9
  --max_completion_length 512
  --max_steps 1000
  --learning_rate 2e-5
  --warmup_ratio 0.05
  --per_device_train_batch_size 1
  --gradient_accumulation_steps 16
  --max_length 4096
  --eval_steps 100
  --save_steps 100
  --logging_steps 5
)
[ -n "$GPUS" ] && ARGS+=(--gkd_logits_topk 64) # all logits of a 150k vocabulary run out of memory at length
ROLLOUT_ARGS=(
  --vllm_data_parallel_size "$(tr , '\n' <<< "$ROLLOUT_GPUS" | wc -l)"
  --vllm_gpu_memory_utilization 0.9
  --vllm_max_model_len 8192
)

CHECKED=(--teacher "$TEACHER" --dataset "$DATASET" --val-dataset "$VAL_DATASET" --disk-factor 11)
[[ $GPUS == *,* ]] && CHECKED+=(--port "$ROLLOUT_PORT")
preflight "${CHECKED[@]}" "$@"

if [[ $GPUS == *,* ]]; then
  training_gpus=$(comm -23 <(tr , '\n' <<< "$GPUS" | sort) <(tr , '\n' <<< "$ROLLOUT_GPUS" | sort) | sort -n | paste -sd,)
  [ -n "$training_gpus" ] || die "ROLLOUT_GPUS=$ROLLOUT_GPUS leaves no GPU of $GPUS for training: name fewer"
  SERVER=(
    "http://127.0.0.1:$ROLLOUT_PORT/health/" "$ROLLOUT_DEADLINE"
    env -u NPROC_PER_NODE CUDA_VISIBLE_DEVICES="$ROLLOUT_GPUS"
    swift rollout --model "$MODEL" --model_type "$MODEL_TYPE" ${TEMPLATE:+--template "$TEMPLATE"}
    --external_plugins "${PLUGINS[@]}" --host 127.0.0.1 --port "$ROLLOUT_PORT" "${ROLLOUT_ARGS[@]}"
  )
  use_gpus "$training_gpus"
  ARGS+=(--use_vllm true --vllm_mode server --vllm_server_host 127.0.0.1 --vllm_server_port "$ROLLOUT_PORT")
elif [ -n "$GPUS" ]; then
  ARGS+=(--use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.3 --sleep_level 1)
fi

train rlhf --rlhf_type gkd --teacher_model "$TEACHER" --teacher_model_type "$TEACHER_TYPE" \
  --dataset "$DATASET" --val_dataset "$VAL_DATASET" "${FULL_ARGS[@]}" "${ARGS[@]}" "$@"
