#!/usr/bin/env bash
# Reinforcement learning under reward plugins: GRPO with GSPO's sequence-level importance sampling.
#   In:   $MODEL (a checkpoint), $DATASET (messages JSONL with the truth in a column of its own: solution)
#   Out:  $OUTPUT (a checkpoint), with logging.jsonl, command.sh and curves.png of the run
#   Cost: as full_run.sh, plus generation: with GPUS vLLM shares them (colocate) and takes 0.4 of their memory. With DEEPSPEED=
#         its weights are float32, too: ms-swift gives vLLM the type of the weights that are trained.
#   Not run on a GPU yet: on CPUs with vLLM's CPU build only (docs/gpu.md).
#   MODEL=checkpoints/merged DATASET=data/rl.jsonl OUTPUT=checkpoints/rl bash rl_run.sh --max_steps 200
#   ALGORITHM=GDPO bash rl_run.sh
#   ALGORITHM=OPD TEACHER=Qwen3-VL-8B-Instruct MODEL=checkpoints/merged bash rl_run.sh
#   The rewards are tried first, on right, wrong and hostile answers (python -m prunekit.tryout --help); TRYOUT=0: they aren't.
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/merged}
DATASET=${DATASET:-data/rl.jsonl}
VAL_DATASET=${VAL_DATASET:-}
OUTPUT=${OUTPUT:-checkpoints/rl}
ALGORITHM=${ALGORITHM:-GSPO} # one of the arrays below: GSPO, GDPO, CHORD, DAPO, DR_GRPO, CISPO, OPD
CHORD_DATASET=${CHORD_DATASET:-data/train.jsonl}
TEACHER=${TEACHER:-checkpoints/base} # of OPD
TRYOUT=${TRYOUT-1}

PLUGINS+=(
  "$ROOT/plugins/ocr_rewards.py" # add your own here: every plugin goes into one list
  "$ROOT/plugins/guarded_rewards.py"
)
REWARDS=(ocr_cer ocr_prefix ocr_perfect ocr_rambling)
REWARD_WEIGHTS=(1 0.5 1 0.5)
REWARD_COLUMNS=(solution) # columns of the data set that the rewards read
TRYOUT_ARGS=(--truth "${REWARD_COLUMNS[0]:-solution}") # --answer '<answer>{}</answer>', if answers have a form

# Group Sequence Policy Optimization (Zheng et al. 2025): several minibatches a rollout, or nothing is ever clipped.
GSPO=(
  --importance_sampling_level sequence
  --epsilon 3e-4
  --epsilon_high 4e-4
  --beta 0
)
# shellcheck disable=SC2034  # used by name: ALGORITHM
# GDPO: every reward is normalised by itself before they are added, so that a rare one is not drowned.
GDPO=(
  "${GSPO[@]}"
  --scale_rewards gdpo
)
# shellcheck disable=SC2034
# CHORD (Zhang et al. 2025): an SFT loss on expert rows, fading out, beside the policy's own.
CHORD=(
  --importance_sampling_level token
  --beta 0
  --loss_type grpo
  --chord_sft_dataset "$CHORD_DATASET"
  --chord_sft_per_device_train_batch_size 4
  --chord_mu_peak 0.5
  --chord_mu_valley 0.05
  --chord_mu_warmup_steps 0
  --chord_mu_decay_steps 200
  --chord_enable_phi_function false
)

# shellcheck disable=SC2034
# DAPO (Yu et al. 2025): clipped higher above than below, all tokens weigh the same, groups without spread are drawn again,
# and answers that were cut don't count.
DAPO=(
  --loss_type dapo
  --epsilon 0.2
  --epsilon_high 0.28
  --beta 0
  --dynamic_sample true
  --max_resample_times 3
  --overlong_filter true
)
# shellcheck disable=SC2034
# Dr. GRPO (Liu et al. 2025): neither by an answer's length nor by a group's spread, which favour long wrong answers and easy or
# hopeless rows.
DR_GRPO=(
  --loss_type dr_grpo
  --scale_rewards none
  --beta 0
)
# shellcheck disable=SC2034
# CISPO (MiniMax-M1, 2025): the ratio's weight is clipped, not the step: no token loses its gradient.
CISPO=(
  --loss_type cispo
  --epsilon_high 5.0
  --beta 0
)
# shellcheck disable=SC2034
# On-policy distillation (Agarwal et al. 2024) with rewards: how much likelier the teacher finds each token is added to the
# answer's advantage. For a pruned model, whose teacher knows what it has lost.
OPD=(
  --teacher_model "$TEACHER"
  --teacher_kl_coef 1.0             # what the teacher's word weighs, against advantages of about 1
  --beta 0
)

ARGS=(
  --reward_funcs "${REWARDS[@]}"
  --reward_weights "${REWARD_WEIGHTS[@]}"
  --num_generations 8               # the generation batch must divide by it
  --max_length 4096                 # of a prompt: a photo in full size has 16384 tokens
  --truncation_strategy delete      # another row in its place: cut from the left, an image would lose its tokens
  --max_completion_length 512
  --temperature 1.0
  --learning_rate 1e-6
  --warmup_ratio 0.05
  --max_steps 500
  --per_device_eval_batch_size 8    # num_generations must divide that, times the GPUs
  --save_steps 100
  --logging_steps 1
  --log_completions true
)
if [ -n "$GPUS" ]; then
  ARGS+=(
    --use_vllm true
    --vllm_mode colocate
    --vllm_gpu_memory_utilization 0.4
    --sleep_level 1
  )
fi

[[ $ALGORITHM =~ ^(GSPO|GDPO|CHORD|DAPO|DR_GRPO|CISPO|OPD)$ ]] ||
  die "unknown ALGORITHM $ALGORITHM: GSPO, GDPO, CHORD, DAPO, DR_GRPO, CISPO or OPD"
need_switch TRYOUT
declare -n ALGORITHM_ARGS=$ALGORITHM
DATA_ARGS=(--dataset "$DATASET" --split_dataset_ratio 0)
if [ -n "$VAL_DATASET" ]; then DATA_ARGS=(--dataset "$DATASET" --val_dataset "$VAL_DATASET"); fi

# try_rewards: stop before the first step where the rewards have faults. A run that goes on was tried when it began.
try_rewards() {
  local code=0
  [ -n "$TRYOUT" ] && { [ -n "$RESTART" ] || [ ! -e "$OUTPUT.run/command.sh" ]; } || return 0
  [ -z "$REUSE" ] || [ ! -e "$OUTPUT" ] || return 0
  python -m prunekit.tryout --swift "${TRYOUT_ARGS[@]}" -- "${LINE[@]}" || code=$?
  [ "$code" -ne 3 ] || die "the rewards have faults (above): mend them, or go on as they are by TRYOUT=0"
  [ "$code" -eq 0 ] || exit "$code"
}

DEFAULT_BATCH=32 # answers of an optimizer step, to 4 prompts
if [ $((DEFAULT_BATCH % WORLD)) -ne 0 ]; then DEFAULT_BATCH=$((8 * WORLD)); fi # whole groups on three GPUs, too
share_batch 8 "${ARGS[@]}" "${USER_ARGS[@]}" >/dev/null
# Four steps a rollout: with one, no ratio ever leaves 1, and nothing is clipped. It counts the accumulated ones.
value_of generation_batch_size "${ARGS[@]}" "${USER_ARGS[@]}"
if [ "$ALGORITHM" != CHORD ] && [ -z "$VALUE" ]; then ALGORITHM_ARGS+=(--steps_per_generation $((4 * ACCUMULATION))); fi
settle grpo 8 --rlhf_type grpo "${DATA_ARGS[@]}" "${FULL_ARGS[@]}" "${ALGORITHM_ARGS[@]}" "${ARGS[@]}"
preflight rlhf --needed-columns "${REWARD_COLUMNS[@]}" --disk-factor "$DISK_FACTOR"
if [ "$ALGORITHM" = OPD ]; then LINE=(--teacher_model_type "$TEACHER_TYPE" "${LINE[@]}"); fi
try_rewards
train rlhf
