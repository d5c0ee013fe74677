#!/usr/bin/env bash
# The whole loop on the embedded model, on a CPU: sets itself up, then knocks out, prunes, recovers, distils, merges
# KV heads down to one, halves the vocabulary, adds a LoRA, merges it, and finishes with RL. Minutes; ends with a table and
# pictures.
#   Out:  runs/demo/report/report.html, runs/demo/summary.json, runs/demo/*.png, every stage's checkpoint, runs/demo/logs
#   bash demo.sh                  an interrupted demo goes on where it was; `rm -r runs/demo` starts afresh
#   QUICK=1 bash demo.sh          every stage for a few steps only: to see that all of it works
# shellcheck disable=SC2046  # lasting prints several words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash lib/setup.sh
PATH=$PWD/.venv/bin:$PATH

RUN=${RUN:-runs/demo}
BASE=${BASE:-examples/tiny_vl/model}
QUICK=${QUICK:-}
steps() { if [ -n "$QUICK" ]; then echo 2; else echo "$1"; fi; }
ROWS=${ROWS:-$([ -n "$QUICK" ] && echo 24 || echo 400)} # held-out questions, of eight skills by turns
CARD_ROWS=$([ -n "$QUICK" ] && echo 24 || echo 80)
VAL_ROWS=$([ -n "$QUICK" ] && echo 80 || echo 160)
DISTIL_ROWS=$([ -n "$QUICK" ] && echo 64 || echo 1280) # 40 steps of 32
HEAL_TOKENS=$([ -n "$QUICK" ] && echo 1000 || echo 12000) # of training rows, to heal the seams on
# What to drop, by hand after a look at the ranking: cheap layers, and a DeepStack tap with its merger. It could be
# --from-ranking runs/demo/knockout/ranking.json --max-layers 4, too.
read -ra DROP <<< "${DROP:---text 4 6 --vision 5 7 --drop-taps 1}"

export WANDB_PROJECT=${WANDB_PROJECT:-prune-kit-demo} WANDB_DIR=${WANDB_DIR:-$RUN} WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-demo}
unset NNODES NODE_RANK MASTER_ADDR MASTER_PORT # it runs on one machine
export GPUS=${GPUS:-} DATASET=$RUN/data/train.jsonl VAL_DATASET=$RUN/data/val.jsonl#$VAL_ROWS
export CPU_PROCESSES=${CPU_PROCESSES:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$RUN/logs" "$RUN/seconds"
offline=$(python -m prunekit.training.tracking)
if [ -n "$offline" ]; then
  export WANDB_MODE=offline
  echo "$offline"
fi

# What a tiny model needs on a CPU instead of the launchers' defaults for a real one on GPUs.
# As many rows a step on any number of GPUs as on a CPU: 32, and 16 in knockouts, of which two run side by side if they can.
COUNT=$([ -n "$GPUS" ] && tr , '\n' <<< "$GPUS" | wc -l || echo "$CPU_PROCESSES")
JOBS=2 EACH=1
if [ -n "$GPUS" ]; then
  JOBS=$((COUNT % 2 ? 1 : 2))
  EACH=$((COUNT / JOBS))
fi
TINY=(
  --per_device_train_batch_size $((COUNT < 32 ? 32 / COUNT : 1))
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
# lasting STEPS: flags for a run of so many steps, evaluated and saved at its end.
lasting() { echo --max_steps "$(steps "$1")" --eval_steps "$(steps "$1")" --save_steps "$(steps "$1")"; }
# recover NAME INPUT STEPS LEARNING_RATE: full_run.sh on INPUT.
recover() {
  MODEL=$RUN/$2 OUTPUT=$RUN/$1 stage "$1" "$RUN/$1" bash full_run.sh "${TINY[@]}" $(lasting "$3") --learning_rate "$4"
}

stage data "$RUN/data" python examples/tiny_vl/tiny_vl.py data --out "$RUN/data" ${QUICK:+--share 0.2}

# The ranking grows with every run, so it is no sign of a finished sweep.
knock_out() {
  "${TIED[@]}" bash knockout_check.sh "${TINY[@]}" --per_device_train_batch_size $((EACH < 16 ? 16 / EACH : 1)) --learning_rate 2e-4 --max_steps "$(steps 10)" --eval_steps "$(steps 5)" &&
    touch "$RUN/knockout/done"
}
MODEL=$BASE OUTPUT=$RUN/knockout BY=skill FINALISTS=$(steps 3) GREEDY=$(steps 4) JOBS=$JOBS CPU_PROCESSES=1 stage knockout "$RUN/knockout/done" knock_out

stage pruned "$RUN/pruned" python manual_select.py --model "$BASE" --out "$RUN/pruned" "${DROP[@]}" \
  --heal --calib "$RUN/data/train.jsonl" --calib-tokens "$HEAL_TOKENS"
recover recovered pruned 40 1e-4

# What the base says of these rows is kept, and would teach the next student, too.
MODEL=$RUN/recovered TEACHER=$BASE CACHE=$RUN/cache DATASET=$DATASET#$DISTIL_ROWS OUTPUT=$RUN/distilled stage distilled "$RUN/distilled" \
  bash distil.sh "${TINY[@]}" $(lasting 40) --learning_rate 1e-4

# In one go: for the same steps in all, cutting to 2 heads first and recovering in between came out no better (docs/kv.md).
# Rows are said once: this model has never seen a conversation of two turns.
stage mqa "$RUN/mqa" python kv_cut.py --model "$RUN/distilled" --out "$RUN/mqa" --kv-heads 1 \
  --calib "$RUN/data/train.jsonl" --calib-tokens "$HEAL_TOKENS" --refine "$(steps 160)" --repeat 0
# Half of the tokens, which these data hardly use: 3% of the parameters for nothing that would be seen (docs/vocabulary.md).
stage vocabulary "$RUN/vocabulary" python vocab_cut.py --model "$RUN/mqa" --out "$RUN/vocabulary" --keep-share 0.5 \
  --calib "$RUN/data/train.jsonl" "$RUN/data/lora_train.jsonl"
recover mqa-recovered vocabulary 560 4e-4

MODEL=$RUN/mqa-recovered OUTPUT=$RUN/lora DATASET=$RUN/data/lora_train.jsonl VAL_DATASET=$RUN/data/cyrillic_val.jsonl \
  stage lora "$RUN/lora" bash lora.sh "${TINY[@]}" $(lasting 200) --learning_rate 1e-3 --lora_dropout 0
MODEL=$RUN/mqa-recovered ADAPTER=$RUN/lora OUTPUT=$RUN/merged stage merged "$RUN/merged" bash export_lora.sh

MODEL=$RUN/merged DATASET=$RUN/data/rl_mixed.jsonl VAL_DATASET='' OUTPUT=$RUN/rl stage rl "$RUN/rl" bash rl_run.sh \
  "${TINY[@]}" --max_steps "$(steps 60)" --save_steps "$(steps 60)" --learning_rate 1e-4 --max_completion_length 16

# Two measurements side by side, one a core.
measure() {
  "${TIED[@]}" python -m prunekit.evaluate --batch-size 128 --max-new-tokens 24 --plugins plugins/*.py --limit "$ROWS" \
    --rewards ocr_cer ocr_prefix=0.5 ocr_perfect ocr_rambling=0.5 "$@"
}
measure_all() {
  local models=("$BASE") first name # stage's own name stays
  for name in "${CHECKPOINTS[@]}"; do models+=("$RUN/$name"); done
  measure --by skill --model "${models[@]}" --dataset "$RUN/data/test.jsonl" --json "$RUN/evaluation/test.json" &
  first=$!
  measure --model "$RUN/mqa-recovered" "$RUN/merged" "$RUN/rl" --dataset "$RUN/data/cyrillic_val.jsonl" "$RUN/data/rl_val.jsonl" \
    --json "$RUN/evaluation/skills.json" && wait "$first" && touch "$RUN/evaluation/done"
}
CHECKPOINTS=(pruned recovered distilled mqa vocabulary mqa-recovered merged rl)
mkdir -p "$RUN/evaluation"
stage evaluation "$RUN/evaluation/done" measure_all

stage card "$RUN/report" python -m prunekit.card "$RUN/rl" --base "$BASE" --out "$RUN/report" --dataset "$RUN/data/test.jsonl" \
  --by skill --limit "$CARD_ROWS" --batch-size 128 --max-new-tokens 24 --rounds 1 --prompt-tokens 64 --decode-tokens 16 ${QUICK:+--no-speed}

STAGES=(base="$BASE")
for name in "${CHECKPOINTS[@]}"; do STAGES+=("$name=$RUN/$name"); done
echo
python -m prunekit.summary --out "$RUN" --seconds "$RUN/seconds" --evaluation "$RUN"/evaluation/*.json --stages "${STAGES[@]}"
echo
echo "pictures: $RUN/stages.png $RUN/knockout/*.png $RUN/*/curves.png      numbers: $RUN/summary.json"
echo "the report card, one page to show: $RUN/report/report.html"
echo "in all: $((SECONDS - started)) s"
