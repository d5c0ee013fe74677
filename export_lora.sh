#!/usr/bin/env bash
# Merge a LoRA adapter into its base: a plain checkpoint that loads with no peft installed.
#   In:   $MODEL (the checkpoint the adapter was trained on), $ADAPTER (what lora.sh wrote)
#   Out:  $OUTPUT (a checkpoint); the zeros of a sparse $MODEL are kept if the adapter learned with keep_zeros
#   MODEL=checkpoints/mqa ADAPTER=checkpoints/lora OUTPUT=checkpoints/merged bash export_lora.sh
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/recovered}
ADAPTER=${ADAPTER:-checkpoints/lora}
OUTPUT=${OUTPUT:-checkpoints/merged}

ARGS=(
  --adapters "$ADAPTER"
  --torch_dtype "$COMPUTE"
  --merge_lora true
  --safe_serialization true
)

one_node "merging takes one: unset NNODES"
plugin_list
LINE=(--external_plugins "${EXTERNAL[@]}" "${ARGS[@]}" "${USER_ARGS[@]}")
preflight export --adapter "$ADAPTER" --disk-factor 2.2
export_merged
