"""How long rows, answers and vLLM's engine may be: one place decides, from the merged flags and the model's config."""

from dataclasses import dataclass
from typing import Any

from prunekit.errors import PruneKitError
from prunekit.families import family_of, positions

PROMPT = 4096  # tokens, where a stage that generates says nothing: ms-swift's own choice is all positions of the model
ENGINE_RESERVE = 2.5 * 2**30  # bytes of vLLM's profile run and graphs; an estimate


@dataclass(frozen=True)
class Lengths:
    """Tokens; None: the flags are right as they are (or there is no engine)."""

    max_length: int | None = None
    completion: int | None = None
    engine: int | None = None


def engine_positions(config: dict[str, Any]) -> int | None:
    """The longest row that vLLM takes for this model, which it refuses to be told a larger one of; None: any.

    As vLLM derives it: the positions, times the factor of a scaled RoPE (YaRN's counts from the original positions;
    LongRoPE's, Llama 3's and Gemma 3's positions are scaled already).
    """
    length = positions(config, 0) or None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not length or not isinstance(rope, dict) or family_of(config).positions_scaled:
        return length
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind in ("su", "longrope", "llama3") or not isinstance(factor, int | float):
        return length
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or length
    return int(length * factor)


def choose_lengths(
    config: dict[str, Any],
    max_length: int | None,
    completion: int | None = None,
    vllm: bool = False,
    engine: int | None = None,
) -> Lengths:
    """What --max_length, --max_completion_length and vLLM's max_model_len must be.

    A generating stage (`completion`: tokens of an answer) needs room for an answer after the longest prompt. Without
    vLLM only learned positions bind: rotary ones go on. With vLLM the engine holds one prompt and one answer, and no
    more: its KV cache must have room for a whole row before it starts. `engine` is the user's own max_model_len, which
    counts. Raises PruneKitError if the model can't have that one.
    """
    learned = (positions(config, 0) or None) if family_of(config).learned_positions else None
    limit = engine_positions(config) if vllm else learned
    if vllm and engine:
        if limit and engine > limit:
            raise PruneKitError(f"--vllm_max_model_len {engine}: the model has {limit} positions; give at most these")
        limit = engine
    if completion is None:
        too_long = limit is not None and max_length is not None and max_length > limit
        return Lengths(max_length=limit if too_long else None)
    prompt, answer = max_length or PROMPT, completion
    if limit:
        answer = min(answer, limit // 2)
        prompt = min(prompt, limit - answer)
    return Lengths(
        prompt if prompt != max_length and (limit or vllm) else None,
        answer if answer != completion else None,
        (engine or prompt + answer) if vllm else None,
    )


def engine_bytes(weights: int, kv_bytes_per_token: int, length: int, gpus: int = 1) -> float:
    """Bytes of memory that a vLLM engine takes on each of `gpus` at least: its weights and one row's KV cache.

    vLLM starts only if the cache holds one row of max_model_len. Weights are those in 16 bits. Without ENGINE_RESERVE.
    """
    return (weights + kv_bytes_per_token * length) / gpus


def check_engine(
    weights: int,
    kv_bytes_per_token: int,
    length: int,
    gpu: float,
    utilization: float,
    gpus: int = 1,
) -> str | None:
    """A warning if an engine may not start in this share of a GPU's bytes; PruneKitError if it can't."""
    need, have = engine_bytes(weights, kv_bytes_per_token, length, gpus), gpu * utilization
    if need + ENGINE_RESERVE <= have:
        return None
    fits = int((have - ENGINE_RESERVE - weights / gpus) * gpus / kv_bytes_per_token) if kv_bytes_per_token else 0
    sizes = (
        f"vLLM needs {need / 2**30:.1f} GiB for weights and one row of {length} tokens, and some GiB to work; "
        f"--vllm_gpu_memory_utilization {utilization:g} of {gpu / 2**30:.0f} GiB is {have / 2**30:.1f}"
    )
    mend = f"give a --max_length that is {length - fits} shorter, or more memory" if fits > 0 else "give it more memory"
    if need > have:
        raise PruneKitError(f"{sizes}: {mend}, or more GPUs to each engine (--vllm_tensor_parallel_size)")
    return f"{sizes}: if it doesn't start, {mend}"
