"""Prefill and decoding of causal models, measured side by side.

    python -m prunekit.serving.speed < job.json > result.json

`measure_speed` starts this once for each model and round, in turns, so that a busy moment hits all alike and a model's
memory is its own process's.
"""

import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import family_of, positions, text_value
from prunekit.surgery.vocabulary_files import ids_in

from .run import answer, peak_memory

REPEATS = 3  # of a prefill, and of the tokens decoded behind one, within a round


@dataclass(frozen=True)
class Pace:
    """What is timed: a prompt of `prompt` random tokens is read, `tokens` more are decoded with a KV cache."""

    prompt: int
    tokens: int
    sizes: tuple[int, ...] = (1, 32)  # rows
    rounds: int = 2
    device: str | None = None
    dtype: str | None = None
    parts: bool = False  # also which share of the time is spent where, at the first of the sizes


def choose_pace(checkpoints: list[Checkpoint], prompt: int | None, tokens: int | None, **more: Any) -> Pace:
    """By default 256 tokens and 32 more, or as many as the models' positions take. PruneKitError for more than that."""
    limit = min(positions(checkpoint.config) for checkpoint in checkpoints)
    tokens = tokens or max(1, min(32, limit // 4, limit - (prompt or 0)))
    prompt = prompt or max(1, min(256, limit - tokens))
    if prompt + tokens > limit:
        raise PruneKitError(
            f"--prompt-tokens {prompt} and --decode-tokens {tokens}: the models have {limit} positions; choose fewer"
        )
    return Pace(prompt, tokens, **more)


def measure_speed(folders: list[Path], pace: Pace, quiet: bool | None = None) -> list[dict[str, Any]]:
    """A row for each folder: load_seconds, peak_memory (bytes), machine, dtype, and of each batch size the best round's

    prefill (s), decode (s a token), prefill_rate and decode_rate (tokens/s of all rows); `parts` if the pace has them,
    as `time_parts` says. What can't be measured (too little memory, say) has an `error` instead.
    """
    from tqdm import tqdm

    from .measure import measure_once

    rows: list[dict[str, Any]] = [{} for _ in folders]
    turns = [number for _ in range(pace.rounds) for number in range(len(folders))]
    for number in tqdm(turns, desc="speed", leave=False, disable=quiet):
        row = rows[number]
        if "error" in row:
            continue
        # In one dtype: which one is chosen by default depends on a model's size
        dtype = pace.dtype or next((known["dtype"] for known in rows if "dtype" in known), None)
        job = {"folder": str(folders[number]), **asdict(pace), "dtype": dtype}
        try:
            found = measure_once(job, "prunekit.serving.speed")
        except PruneKitError as error:
            rows[number] = {"error": str(error)}
            continue
        row |= {key: found[key] for key in ("machine", "dtype")}
        row["load_seconds"] = min(row.get("load_seconds", 1e9), found["load_seconds"])
        row["peak_memory"] = max(row.get("peak_memory", 0), found["peak_memory"])
        row |= {"parts": found["parts"]} if "parts" in found else {}
        best = row.setdefault("batches", {})
        for size, times in found["batches"].items():
            known = best.setdefault(size, times)
            best[size] = {key: min(known[key], times[key]) for key in ("prefill", "decode")}
    for row in rows:
        for size, times in row.get("batches", {}).items():
            times["prefill_rate"] = int(size) * pace.prompt / times["prefill"]
            times["decode_rate"] = int(size) / times["decode"]
    return rows


def _words(config: dict[str, Any], size: int, length: int) -> np.ndarray:
    """Random token ids (size, length), none of them one that the config or its family names, for an image, say."""
    vocabulary = text_value(config, "vocab_size") or config.get("vocab_size") or 100
    named = ids_in(config) | set(family_of(config).token_ids.values())
    plain = [token for token in range(min(vocabulary, 20_000)) if token not in named]
    return np.random.default_rng(0).choice(plain, size=(size, length))


def time_model(model, ids, tokens: int) -> dict[str, float]:
    """Seconds that a model takes to read `ids` (rows, length), and for each of `tokens` behind them: medians."""
    prefills, decodes = [], []
    for repeat in range(REPEATS + 1):  # the first one doesn't count
        start = _now(model)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        middle = _now(model)
        _decode(model, out, tokens)
        end = _now(model)
        if repeat:
            prefills.append(middle - start)
            decodes.append((end - middle) / tokens)
    return {"prefill": float(np.median(prefills)), "decode": float(np.median(decodes))}


def _now(model) -> float:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _decode(model, out, tokens: int) -> None:
    for _ in range(tokens):
        word = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=word, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)


def time_parts(model, checkpoint: Checkpoint, ids, tokens: int) -> dict[str, dict[str, float]]:
    """Of what `time_model` times the share that each part takes: `prefill` and `decode`, by part, together 1.

    Parts: `attention` and `mlp` of the text layers, what else these `layers` do, the output `head`, and the `rest`. On
    a GPU their kernels are waited for one by one: where they are small, launching them counts with them.
    """
    from prunekit.checkpoint import heads
    from prunekit.model.parts import LayerParts
    from prunekit.model.replay import find_stack

    row = checkpoint.family.text
    owner, name = find_stack(model, row)
    layers, block = list(getattr(owner, name)), row.mlp[-1].rpartition(".")[0]
    modules = {
        "layers": layers,
        "attention": [LayerParts(layer, row, heads(checkpoint)).attention for layer in layers],
        "mlp": [layer.get_submodule(block) for layer in layers] if block else [],
        "head": [model.get_output_embeddings()],
    }
    spent, begun = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def watch(part: str, module) -> list[Any]:
        def before(*_) -> None:
            begun[part] = _now(model)

        def after(*_) -> None:
            spent[part] += _now(model) - begun[part]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    hooks = [hook for part, found in modules.items() for module in found for hook in watch(part, module)]
    prefill: dict[str, float] = {}
    decode: dict[str, float] = {}
    for repeat in range(REPEATS + 1):  # the first one doesn't count
        out = None
        for total in (prefill, decode):
            spent |= dict.fromkeys(spent, 0.0)
            start = _now(model)
            if out is None:
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            else:
                _decode(model, out, tokens)
            for part, seconds in (spent | {"all": _now(model) - start}).items():
                total[part] = total.get(part, 0.0) + (seconds if repeat else 0.0)
    for hook in hooks:
        hook.remove()
    for total in (prefill, decode):
        everything = total.pop("all")
        total["rest"] = everything - total["layers"] - total["head"]
        total["layers"] -= total["attention"] + total["mlp"]
        total |= {part: max(0.0, seconds) / everything for part, seconds in total.items()}
    return {"prefill": prefill, "decode": decode}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load and time one folder as `job` says: a Pace's fields, and the folder."""
    import torch

    from prunekit.checkpoint import open_checkpoint
    from prunekit.model.load import load_model

    checkpoint, start = open_checkpoint(job["folder"], quantised=True), time.perf_counter()
    model = load_model(checkpoint, job["device"], job["dtype"])
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "batches": {}}
    with torch.inference_mode():
        for size in job["sizes"]:
            ids = torch.from_numpy(_words(checkpoint.config, size, job["prompt"])).to(model.device)
            result["batches"][str(size)] = time_model(model, ids, job["tokens"])
            if job.get("parts") and "parts" not in result:
                result["parts"] = time_parts(model, checkpoint, ids, job["tokens"])
    on_gpu = model.device.type == "cuda"
    result["machine"] = torch.cuda.get_device_name(model.device) if on_gpu else _processor(torch.get_num_threads())
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    return result | {"peak_memory": peak_memory(str(model.device) if on_gpu else "cpu")}


def _processor(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    answer(measure)
