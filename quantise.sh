#!/usr/bin/env bash
# Quantise a checkpoint for serving: the text layers' weights in FP8, INT8 or 4 bits, as vLLM and transformers load them.
#   In:   $MODEL (a checkpoint, text or vision-language), and for METHOD=gptq $DATASET (messages, like those you serve)
#   Out:  $OUTPUT (a folder to serve and to measure; no stage cuts or trains it: quantise last)
#         The vision tower, embeddings, head and routers of experts stay as they are (docs/quantise.md).
#   Cost: fp8, int8, int4: minutes, no data, a CPU does. gptq: about a forward pass of DATASET's first rows and a solve a
#         layer, on a GPU, or slowly on a CPU. bnb and block-fp8 are ms-swift's own and need a GPU; not run on one yet.
#   The first four need llm-compressor: bash lib/llm_compressor.sh (30 MB, once).
#   MODEL=checkpoints/rl OUTPUT=checkpoints/rl-fp8 bash quantise.sh
#   MODEL=checkpoints/rl OUTPUT=checkpoints/rl-int4 METHOD=gptq DATASET=data/train.jsonl bash quantise.sh --calib-tokens 131072
#   MODEL=checkpoints/rl OUTPUT=checkpoints/rl-int4 METHOD=int4 bash quantise.sh --dry-run     # says what it would do
source "$(dirname "$0")/lib/common.sh"

MODEL=${MODEL:-checkpoints/rl}
DATASET=${DATASET:-data/train.jsonl}
OUTPUT=${OUTPUT:-checkpoints/quantised}

METHOD=${METHOD:-fp8}
# fp8         weights a row, activations a token: GPUs since Ada and Hopper compute in it, older ones store it
# int8        the same in whole numbers: GPUs since Turing, and CPUs
# int4        weights alone, in groups of 128 inputs: the smallest, for few rows at once
# gptq        the same, rounded so that your rows' outputs change least
# bnb         weights alone, NF4, by bitsandbytes
# block-fp8   blocks of 128 x 128, as DeepSeek's and Qwen's own FP8 releases

need METHOD 'fp8|int8|int4|gptq|bnb|block-fp8' "choose fp8, int8, int4, gptq, bnb or block-fp8"
one_node "quantising takes one: unset NNODES"
case $METHOD in
  bnb | block-fp8)
    [ -n "$GPUS" ] || die "METHOD=$METHOD needs a GPU, and GPUS names none: fp8, int8, int4 and gptq do without"
    case $METHOD in
      bnb) ARGS=(--quant_method bnb --quant_bits 4 --bnb_4bit_quant_type nf4) ;;
      block-fp8) ARGS=(--quant_method fp8) ;;
    esac
    ARGS+=(--torch_dtype "$COMPUTE" --safe_serialization true)
    plugin_list
    LINE=(--external_plugins "${EXTERNAL[@]}" "${ARGS[@]}" "${USER_ARGS[@]}")
    preflight export --disk-factor 2.2
    claim_work
    rm -rf "$WORK/quantised"
    unset NPROC_PER_NODE # one process quantises
    run_swift export "${LINE[@]}" --output_dir "$WORK/quantised"
    publish_with -m prunekit.quantise --model "$MODEL" --out "$OUTPUT" --method "$METHOD" --written "$WORK/quantised"
    ;;
  *)
    ARGS=(--model "$MODEL" --out "$OUTPUT" --method "$METHOD")
    [ -z "$GPUS" ] || ARGS+=(--device cuda)
    if [ "$METHOD" = gptq ]; then
      ARGS+=(--calib "$DATASET" ${DTYPE:+--dtype "$DTYPE"} ${MODEL_TYPE:+--model-type "$MODEL_TYPE"} ${TEMPLATE:+--template "$TEMPLATE"})
    fi
    export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$ROOT/.venv-llm-compressor
    # In this process's place: a signal ends it at once
    exec python -m prunekit.quantise "${ARGS[@]}" ${OVERWRITE:+--overwrite} ${CHECK:+--dry-run} "${USER_ARGS[@]}"
    ;;
esac
