#!/usr/bin/env bash
# The whole loop on the embedded model, on a CPU: sets itself up, then knocks out, prunes, recovers, distils, merges
# KV heads down to one, adds a LoRA, merges it, and finishes with RL. Minutes; ends with a table and pictures.
#   Out:  runs/demo/summary.json, runs/demo/*.png, every stage's checkpoint, runs/demo/logs
#   bash demo.sh                  an interrupted demo goes on where it was; `rm -r runs/demo` starts afresh
#   QUICK=1 bash demo.sh          every stage for a few steps only: to see that all of it works
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash lib/setup.sh
PATH=$PWD/.venv/bin:$PATH

RUN=${RUN:-runs/demo}
BASE=${BASE:-examples/tiny_ocr/model}
QUICK=${QUICK:-}
KNOCKOUT_STEPS=${KNOCKOUT_STEPS:-$([ -n "$QUICK" ] && echo 2 || echo 12)}
RECOVER_STEPS=${RECOVER_STEPS:-$([ -n "$QUICK" ] && echo 2 || echo 60)}
DISTIL_STEPS=${DISTIL_STEPS:-$([ -n "$QUICK" ] && echo 2 || echo 30)}
LORA_STEPS=${LORA_STEPS:-$([ -n "$QUICK" ] && echo 2 || echo 100)}
RL_STEPS=${RL_STEPS:-$([ -n "$QUICK" ] && echo 2 || echo 40)}
ROWS=${ROWS:-$([ -n "$QUICK" ] && echo 20 || echo 500)}  # held-out words to evaluate on
DROP=${DROP:-5}                                          # layers to drop, the cheapest by the knockouts

export WANDB_PROJECT=${WANDB_PROJECT:-prune-kit-demo} WANDB_DIR=${WANDB_DIR:-$RUN} WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-demo}
export GPUS=${GPUS:-} DATASET=$RUN/data/train.jsonl VAL_DATASET=$RUN/data/val.jsonl
export CPU_PROCESSES=${CPU_PROCESSES:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$RUN/logs" "$RUN/seconds"
if [ -z "${WANDB_MODE:-}" ] && [ -z "${WANDB_API_KEY:-}" ] && ! grep -qs 'api.wandb.ai' "${NETRC:-$HOME/.netrc}"; then
  export WANDB_MODE=offline
  echo "W&B: no key found, so runs are kept offline in $WANDB_DIR/wandb"
fi

# What a tiny model needs on a CPU instead of the launchers' defaults for a real one on GPUs.
TINY=(
  --per_device_train_batch_size 32
  --per_device_eval_batch_size 150
  --gradient_accumulation_steps 1
  --learning_rate 1e-3
  --logging_steps 5
)
started=$SECONDS
# A stage outlives no demo: killed together, they go on together.
TIED=()
if setpriv --pdeathsig TERM true 2>/dev/null; then TIED=(setpriv --pdeathsig TERM); fi

# stage NAME RESULT COMMAND...: run a stage unless its RESULT is there, which is whole or absent.
stage() {
  local name=$1 result=$2 begun=$SECONDS
  shift 2
  if [ -e "$result" ]; then
    printf '%-22s done already\n' "$name"
    return
  fi
  printf '%-22s ' "$name"
  if [ "$(type -t "$1")" = file ]; then set -- "${TIED[@]}" "$@"; fi
  if ! "$@" > "$RUN/logs/$name.log" 2>&1; then
    printf 'failed: the end of %s says why\n\n' "$RUN/logs/$name.log"
    tail -n 20 "$RUN/logs/$name.log"
    exit 1
  fi
  echo $((SECONDS - begun)) > "$RUN/seconds/$name"
  printf '%4d s   %s\n' $((SECONDS - begun)) "$(python -m prunekit.summary --line "$result")"
}
# recover NAME INPUT STEPS: full_run.sh on INPUT.
recover() {
  stage "$1" "$RUN/$1" env MODEL="$RUN/$2" OUTPUT="$RUN/$1" bash full_run.sh "${TINY[@]}" --max_steps "$3" --eval_steps "$3" --save_steps "$3"
}

stage data "$RUN/data" python examples/tiny_ocr/tiny_ocr.py data --out "$RUN/data"

# The ranking grows with every run, so it is no sign of a finished sweep.
knock_out() {
  "${TIED[@]}" bash knockout_check.sh "${TINY[@]}" --learning_rate 3e-4 --max_steps "$KNOCKOUT_STEPS" --eval_steps "$KNOCKOUT_STEPS" &&
    touch "$RUN/knockout/done"
}
MODEL=$BASE OUTPUT=$RUN/knockout JOBS=2 CPU_PROCESSES=1 stage knockout "$RUN/knockout/done" knock_out

stage pruned "$RUN/pruned" \
  python manual_select.py --model "$BASE" --out "$RUN/pruned" --from-ranking "$RUN/knockout/ranking.json" \
  --max-layers "$DROP" --keep-above 0 --max-fraction 0.5
recover recovered pruned "$RECOVER_STEPS"

MODEL=$RUN/recovered TEACHER=$BASE OUTPUT=$RUN/distilled stage distilled "$RUN/distilled" bash distil.sh \
  "${TINY[@]}" --learning_rate 3e-4 --max_completion_length 16 --max_steps "$DISTIL_STEPS" --eval_steps "$DISTIL_STEPS" --save_steps "$DISTIL_STEPS"

stage kv2 "$RUN/kv2" python kv_cut.py --model "$RUN/distilled" --out "$RUN/kv2" --kv-heads 2
recover kv2-recovered kv2 "$RECOVER_STEPS"
stage mqa "$RUN/mqa" python kv_cut.py --model "$RUN/kv2-recovered" --out "$RUN/mqa" --kv-heads 1
recover mqa-recovered mqa "$((RECOVER_STEPS * 2))"

MODEL=$RUN/mqa-recovered OUTPUT=$RUN/lora DATASET=$RUN/data/lora_train.jsonl VAL_DATASET=$RUN/data/cyrillic_val.jsonl \
  stage lora "$RUN/lora" bash lora.sh "${TINY[@]}" --learning_rate 2e-3 --lora_dropout 0 \
  --max_steps "$LORA_STEPS" --eval_steps "$LORA_STEPS" --save_steps "$LORA_STEPS"
MODEL=$RUN/mqa-recovered ADAPTER=$RUN/lora OUTPUT=$RUN/merged stage merged "$RUN/merged" bash export_lora.sh

MODEL=$RUN/merged DATASET=$RUN/data/rl_train.jsonl OUTPUT=$RUN/rl stage rl "$RUN/rl" bash rl_run.sh \
  "${TINY[@]}" --learning_rate 1e-4 --max_completion_length 16 --max_steps "$RL_STEPS" --save_steps "$RL_STEPS"

# Two measurements side by side, one a core.
measure() {
  "${TIED[@]}" python -m prunekit.evaluate --batch-size 128 --max-new-tokens 24 --plugins plugins/*.py --limit "$ROWS" \
    --rewards ocr_cer ocr_prefix=0.5 ocr_perfect ocr_rambling=0.5 "$@"
}
measure_all() {
  local models=("$BASE") first
  for name in "${CHECKPOINTS[@]}"; do models+=("$RUN/$name"); done
  measure --model "${models[@]}" --dataset "$RUN/data/test.jsonl" --json "$RUN/evaluation/test.json" &
  first=$!
  measure --model "$RUN/mqa-recovered" "$RUN/merged" "$RUN/rl" --dataset "$RUN/data/cyrillic_val.jsonl" "$RUN/data/rl_val.jsonl" \
    --json "$RUN/evaluation/skills.json" && wait "$first" && touch "$RUN/evaluation/done"
}
CHECKPOINTS=(pruned recovered distilled kv2 kv2-recovered mqa mqa-recovered merged rl)
mkdir -p "$RUN/evaluation"
stage evaluation "$RUN/evaluation/done" measure_all

STAGES=(base="$BASE")
for name in "${CHECKPOINTS[@]}"; do STAGES+=("$name=$RUN/$name"); done
echo
python -m prunekit.summary --out "$RUN" --seconds "$RUN/seconds" --evaluation "$RUN"/evaluation/*.json --stages "${STAGES[@]}"
echo
echo "pictures: $RUN/stages.png $RUN/knockout/ranking.png $RUN/*/curves.png      numbers: $RUN/summary.json"
echo "in all: $((SECONDS - started)) s"
