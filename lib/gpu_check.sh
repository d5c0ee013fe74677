#!/usr/bin/env bash
# A quarter of an hour on a machine with GPUs: does what runs there really run? Ends with a table, fit to be sent to us.
#   In:   nothing: rendered words, and a small model of random weights with a real one's head sizes; or your own $MODEL,
#         to see that it fits, and $DATASET, $VAL_DATASET and $RL_DATASET
#   Out:  $RUN/table.txt, $RUN/*.log; exit code 0: all is well, 1: a row failed, 2: there is no GPU
#   bash lib/gpu_check.sh
#   MODEL=Qwen3-VL-8B-Instruct GPUS=0,1,2,3 bash lib/gpu_check.sh zero2 zero3 rl     only these rows (see docs/gpu.md)
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit

GPUS=${GPUS-${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -o '^[0-9]\+' | paste -sd,)}}
RUN=${RUN:-runs/gpu_check}
MINUTES=${MINUTES:-10} # that a row may take
for name in "$@"; do
  [[ ' cuda plain full_run ddp zero2 zero3 zero2_offload distil_colocate distil_server distil_cache rl scan heal kv evaluate ' == *" $name "* ]] ||
    { echo "error: $name: no row of the check (see docs/gpu.md)" >&2; exit 2; }
done
[ -n "$GPUS" ] || { echo "error: no GPU here (nvidia-smi names none): nothing to check" >&2; exit 2; }
if [ -e "$RUN" ]; then
  [ -e "$RUN/table.txt" ] || { echo "error: $RUN: exists, and is no check of this kind; choose another RUN" >&2; exit 2; }
  rm -r "$RUN"
fi
active=${VIRTUAL_ENV:-$root/.venv}
if [ ! -x "$active/bin/swift" ]; then
  bash "$root/lib/setup.sh" || exit $?
  active=$root/.venv
fi
PATH=$active/bin:$PATH
mkdir -p "$RUN" || exit 2
export WANDB_MODE=offline GPUS
one=${GPUS%%,*}

gpus() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits -i "$GPUS"; }
packages() {
  python - <<'END'
from importlib.metadata import PackageNotFoundError, version

import torch

print(f"CUDA {torch.version.cuda}, NCCL", ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "none")
for name in ("torch", "transformers", "ms-swift", "vllm", "deepspeed", "liger-kernel", "flash-attn", "kernels"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "-")
END
}

# row NAME COMMAND...: one line of the table; the command's messages go to $RUN/NAME.log. A row that needs another GPU
# than there is, or wasn't asked for, isn't run.
asked=" $* "
failed=0
row() {
  local name=$1 begun=$SECONDS code=0 sampler
  shift
  [ "$asked" = '  ' ] || [[ $asked == *" $name "* ]] || return 0
  while gpus memory.used | sort -n | tail -n 1; do sleep 1; done > "$RUN/$name.memory" 2>/dev/null &
  sampler=$!
  timeout -k 30 $((MINUTES * 60)) "$@" > "$RUN/$name.log" 2>&1 < /dev/null || code=$?
  kill "$sampler" && wait "$sampler" 2>/dev/null
  [ "$code" -eq 0 ] || failed=1
  printf '%-18s %-8s %5d s %8s MiB   %s\n' "$name" "$([ "$code" -eq 0 ] && echo ok || echo failed)" $((SECONDS - begun)) \
    "$(sort -n "$RUN/$name.memory" | tail -n 1)" "$RUN/$name.log" | tee -a "$RUN/table.txt"
  rm -f "$RUN/$name.memory"
}

{
  echo "Prune-Kit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo '?'), $(date -u +%F), $(uname -sr), $(python -V)"
  gpus index,name,driver_version,memory.total
  packages | paste -sd' ' | fold -sw 110
  echo
  printf '%-18s %-8s %7s %12s   %s\n' what how time 'peak of a GPU' log
} | tee "$RUN/table.txt"

prepare() { python "$@" > "$RUN/prepare.log" 2>&1 || { cat "$RUN/prepare.log" >&2; exit 1; }; }
if [ -z "${DATASET:-}" ]; then
  prepare "$root/examples/tiny_ocr/tiny_ocr.py" data --out "$RUN/data"
  for name in train val rl_train; do head -n 128 "$RUN/data/$name.jsonl" > "$RUN/$name.jsonl"; done
  DATASET=$RUN/train.jsonl VAL_DATASET=$RUN/val.jsonl RL_DATASET=$RUN/rl_train.jsonl
fi
if [ -z "${MODEL:-}" ]; then
  MODEL=$RUN/model
  prepare "$root/lib/gpu_check_model.py" "$MODEL"
fi
export MODEL TEACHER=$MODEL DATASET VAL_DATASET=${VAL_DATASET:-$DATASET}
short=(--max_steps 2 --save_steps 2 --eval_steps 2 --logging_steps 1 --learning_rate 1e-5)
answers=("${short[@]}" --eval_strategy no --max_completion_length 32)

row cuda python "$root/lib/check_cuda.py"
row plain env OUTPUT="$RUN/plain" GPUS="$one" DEEPSPEED= PLAIN=1 bash "$root/full_run.sh" "${short[@]}"
row full_run env OUTPUT="$RUN/full_run" GPUS="$one" bash "$root/full_run.sh" "${short[@]}"
if [[ $GPUS == *,* ]]; then
  row ddp env OUTPUT="$RUN/ddp" DEEPSPEED= bash "$root/full_run.sh" "${short[@]}"
fi
row zero2 env OUTPUT="$RUN/zero2" DEEPSPEED=zero2 bash "$root/full_run.sh" "${short[@]}"
row zero3 env OUTPUT="$RUN/zero3" DEEPSPEED=zero3 bash "$root/full_run.sh" "${short[@]}"
row zero2_offload env OUTPUT="$RUN/zero2_offload" DEEPSPEED=zero2_offload bash "$root/full_run.sh" "${short[@]}"
row distil_colocate env OUTPUT="$RUN/distil_colocate" GPUS="$one" bash "$root/distil.sh" "${answers[@]}"
if [[ $GPUS == *,* ]]; then
  row distil_server env OUTPUT="$RUN/distil_server" bash "$root/distil.sh" "${answers[@]}"
fi
row distil_cache env OUTPUT="$RUN/distil_cache" CACHE="$RUN/cache" bash "$root/distil.sh" "${short[@]}"
row rl env OUTPUT="$RUN/rl" DATASET="${RL_DATASET:-$DATASET}" VAL_DATASET= bash "$root/rl_run.sh" "${answers[@]}"
row scan env OUTPUT="$RUN/scan" MODE=scan GREEDY=2 bash "$root/knockout_check.sh"
on_one() { row "$1" env CUDA_VISIBLE_DEVICES="$one" python "${@:2}"; }
calib=(--calib "$DATASET" --calib-tokens 2048)
on_one heal "$root/manual_select.py" --model "$MODEL" --out "$RUN/healed" --text 1 --heal "${calib[@]}"
on_one kv "$root/kv_cut.py" --model "$MODEL" --out "$RUN/merged" --kv-heads 1 --refine 5 "${calib[@]}"
on_one evaluate -m prunekit.evaluate --model "$MODEL" --dataset "$VAL_DATASET" --limit 16
echo
echo "the table: $RUN/table.txt"
exit "$failed"
