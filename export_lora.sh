#!/usr/bin/env bash
# Merge a LoRA adapter into its base: a plain checkpoint that loads with no peft installed.
#   In:   $MODEL (the checkpoint the adapter was trained on), $ADAPTER (what lora.sh wrote)
#   Out:  $OUTPUT (a checkpoint); the zeros of a sparse $MODEL are kept if the adapter learned with keep_zeros
#   MODEL=checkpoints/mqa ADAPTER=checkpoints/lora OUTPUT=checkpoints/merged bash export_lora.sh
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/recovered}
ADAPTER=${ADAPTER:-checkpoints/lora}
OUTPUT=${OUTPUT:-checkpoints/merged}

# Merged as precisely as the base is kept: GPUs' bfloat16 would round every weight of a float32 or float16 one.
dtype=$(grep -so '"\(torch_\)\?dtype": *"[a-z0-9]*"' "$MODEL/config.json" | head -n 1 | cut -d '"' -f 4 || true)
[[ -z $DTYPE && -n $GPUS && $dtype =~ ^float(16|32)$ ]] || dtype=$COMPUTE
ARGS=(
  --adapters "$ADAPTER"
  --torch_dtype "$dtype"
  --merge_lora true
  --safe_serialization true
)

one_node "merging takes one: unset NNODES"
plugin_list
LINE=(--external_plugins "${EXTERNAL[@]}" "${ARGS[@]}" "${USER_ARGS[@]}")
preflight export --adapter "$ADAPTER" --disk-factor 2.2
export_merged
