"""The README.md of a checkpoint folder: a hub model card drawn from its history, config and `statistics`.

Takes plain values and imports neither torch nor `checkpoint`, which writes it.
"""

import json
import re
from typing import Any

from prunekit.rules import REAL

HISTORY = "pruning_info.json"

ROWS = {
    "text layers": "num_hidden_layers",
    "vision blocks": "vision_depth",
    "attention heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "head dim": "head_dim",
    "MLP neurons": "neurons",
    "experts": "num_experts",
    "vocabulary": "vocab_size",
    "parameters": "parameters",
    "KV bytes/token": "kv_bytes_per_token",
    "bytes on disk": "bytes",
}
TASKS = {  # by the end of an architecture's name: the hub's name for the task, and the class that loads it
    "ForConditionalGeneration": ("image-text-to-text", "AutoModelForImageTextToText"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
}
METRICS = (  # of all that a stage measured, what says how good the model is; of an eval_ and a plain one, the first
    "eval_token_acc", "eval_reward", "eval_f1", "eval_loss", "token_acc", "exact_match", "reward", "f1",
    "held_out_loss",
    "loss", "same_best",
)  # fmt: skip
MOST_METRICS = 3
USE = """from transformers import {loader}

model = {loader}.from_pretrained("this/folder", dtype="auto")"""
USE_ADAPTER = """from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("its/base", dtype="auto")
model = PeftModel.from_pretrained(base, "this/folder")"""


def model_card(
    config: dict[str, Any],
    numbers: dict[str, Any],
    entries: list[dict[str, Any]],
    use: str | None = None,
    adapter: dict[str, Any] | None = None,
) -> str:
    """The card's text, from config.json, `statistics` and the history, oldest entry first.

    `use` is how to load what isn't loaded by transformers alone; `{loader}` in it is the class that would. `adapter` is
    the adapter_config.json of a LoRA, if the folder holds one instead of a model; all else is then its base's.
    """
    architecture = (re.findall(r"\w+", str(config.get("architectures") or "")) or ["AutoModel"])[0]
    ending = next((ending for ending in TASKS if architecture.endswith(ending)), None)
    task, loader = TASKS[ending] if ending else (None, architecture)
    first = entries[0] if entries else {}
    # A folder may be called like a hub model (checkpoints/base); a place in the hub's cache can't be mistaken.
    hub = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", str(first.get("input")))
    tags = [
        "prune-kit",
        *(["lora"] if adapter else []),
        *(["pruned"] if any(entry.get("removed") for entry in entries) else []),
    ]
    return "\n".join(
        [
            *_front_matter("peft" if adapter else "transformers", tags, task, hub and f"{hub[1]}/{hub[2]}"),
            f"# {'A LoRA for ' if adapter else ''}{config['model_type']}, by Prune-Kit",
            "",
            *([_lora(adapter, entries), ""] if adapter else []),
            f"Made from {code_span(first.get('input', 'unknown'))}.",
            "",
            "|  | before | now | change |",
            "|---|---:|---:|---:|",
            *_rows(first, numbers),
            "",
            "KV bytes/token count two bytes a number, whatever the dtype.",
            "",
            "## Stages",
            "",
            *_stages(entries),
            "",
            "## Use",
            "",
            "```python",
            (use or (USE_ADAPTER if adapter else USE)).replace("{loader}", loader),
            "```",
            "",
        ]
    )


def _front_matter(library: str, tags: list[str], task: str | None, base: str | None) -> list[str]:
    from huggingface_hub import ModelCardData  # half of what a script without torch takes to start

    data = ModelCardData(library_name=library, tags=tags, pipeline_tag=task, base_model=base)
    return ["---", data.to_yaml(), "---", ""]


def _lora(adapter: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    rank, alpha = (code_span(adapter.get(key, "?")) for key in ("r", "lora_alpha"))
    base = code_span(entries[-1].get("input", "unknown")) if entries else "an unknown base"
    return f"Rank {rank}, alpha {alpha}, for {base}, whose sizes follow. `export_lora.sh` merges it into that."


def _rows(first: dict[str, Any], numbers: dict[str, Any]) -> list[str]:
    rows = [(label, first.get(f"{key}_before"), numbers[key]) for label, key in ROWS.items()]
    parts = first.get("parameters_by_component_before")
    parts = parts if isinstance(parts, dict) else {}
    rows += [
        (f"parameters: {part}", parts.get(part), count) for part, count in numbers["parameters_by_component"].items()
    ]
    lines = []
    for label, old, new in rows:
        known = type(old) is int and type(new) is int
        change = f"{(new - old) / old:+.1%}" if known and old and new != old else ""
        if new is not None and (new or old):
            lines.append(f"| {label} | {f'{old:,}' if known else '?'} | {new:,} | {change} |")
    return lines


def _stages(entries: list[dict[str, Any]]) -> list[str]:
    """A table with a row a stage, and what they warned of."""
    lines = [
        "|  | stage | of | removed | parameters | KV bytes/token | measured |",
        "|---:|---|---|---|---:|---:|---|",
    ]
    warnings = []
    for number, entry in enumerate(entries, 1):
        texts = [entry.get("stage", "?"), entry.get("input", "?"), removed_said(entry.get("removed"))]
        cells = [code_span(text).replace("|", "\\|") if text else "" for text in texts]  # even in code it ends a cell
        cells += [_count(entry.get(key)) for key in ("parameters", "kv_bytes_per_token")]
        lines.append(f"| {number} | {' | '.join(cells)} | {measured_said(entry.get('metrics'))} |")
        said = entry.get("warnings")
        warnings += [f"Stage {number}: {code_span(warning)}" for warning in (said if isinstance(said, list) else ())]
    lines += ["", f"Settings, all metrics, versions and times: `{HISTORY}`."]
    return lines + [line for warning in warnings for line in ("", warning)]


def removed_said(removed: Any) -> str:
    """What a history entry says was removed, in words."""
    parts = []
    for key, value in removed.items() if isinstance(removed, dict) else ():
        pairs = isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        if key == "taps" and pairs:  # (before, now): what moved, and what went with its merger
            value = [f"{a} to {b}" if b is not None else f"{a} gone" for a, b in value if a != b]
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        parts.append(f"{key} {value:,}" if type(value) is int else f"{key} {value}")
    return "; ".join(parts)


def measured_said(metrics: Any) -> str:
    """The few of an entry's metrics that say how good the model is."""
    if not isinstance(metrics, dict):
        return ""
    names = [name for name in METRICS if REAL.holds(metrics.get(name))]
    names = [name for name in names if f"eval_{name}" not in names]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names[:MOST_METRICS])


def _count(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "?"


def code_span(value: Any) -> str:
    """Any value as one line of code, which nothing in it can end: not a backtick, not a line end."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {json.dumps(item, ensure_ascii=False)}" for key, item in value.items())
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
