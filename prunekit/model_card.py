"""The README.md of a checkpoint folder: a hub model card drawn from its history, config and `statistics`.

Takes plain values and imports neither torch nor `checkpoint`, which writes it.
"""

import json
import re
from typing import Any

ROWS = {
    "text layers": "num_hidden_layers",
    "vision blocks": "vision_depth",
    "attention heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "head dim": "head_dim",
    "MLP neurons": "neurons",
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
USE = """from transformers import {loader}

model = {loader}.from_pretrained("this/folder", dtype="auto")"""


def model_card(
    config: dict[str, Any], numbers: dict[str, Any], entries: list[dict[str, Any]], use: str | None = None
) -> str:
    """The card's text, from config.json, `statistics` and the history, oldest entry first.

    `use` is how to load what isn't loaded by transformers alone; `{loader}` in it is the class that would.
    """
    architecture = (re.findall(r"\w+", str(config.get("architectures") or "")) or ["AutoModel"])[0]
    ending = next((ending for ending in TASKS if architecture.endswith(ending)), None)
    task, loader = TASKS[ending] if ending else (None, architecture)
    first = entries[0] if entries else {}
    # A folder may be called like a hub model (checkpoints/base); a place in the hub's cache can't be mistaken.
    hub = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", str(first.get("input")))
    tags = ["prune-kit", *(["pruned"] if any(entry.get("removed") for entry in entries) else [])]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"tags: [{', '.join(tags)}]",
            *([f"pipeline_tag: {task}"] if task else []),
            *([f"base_model: {hub[1]}/{hub[2]}"] if hub else []),
            "---",
            "",
            f"# {config['model_type']}, by Prune-Kit",
            "",
            f"Made from {_code(first.get('input', 'unknown'))}.",
            "",
            "|  | before | now | change |",
            "|---|---:|---:|---:|",
            *_rows(first, numbers),
            "",
            "KV bytes/token count two bytes a number, whatever the dtype.",
            "",
            "## Stages",
            "",
            *(f"{number}. {_line(entry)}" for number, entry in enumerate(entries, 1)),
            "",
            "## Use",
            "",
            "```python",
            (use or USE).replace("{loader}", loader),
            "```",
            "",
        ]
    )


def _rows(first: dict[str, Any], numbers: dict[str, Any]) -> list[str]:
    rows = [(label, first.get(f"{key}_before"), numbers[key]) for label, key in ROWS.items()]
    parts = first.get("parameters_by_component_before") or {}
    rows += [
        (f"parameters: {part}", parts.get(part), count)
        for part, count in numbers["parameters_by_component"].items()
    ]
    lines = []
    for label, old, new in rows:
        known = type(old) is int
        change = f"{(new - old) / old:+.1%}" if known and old and new != old else ""
        if new is not None and (new or old):
            lines.append(f"| {label} | {f'{old:,}' if known else '?'} | {new:,} | {change} |")
    return lines


def _line(entry: dict[str, Any]) -> str:
    what = [f"{_code(entry.get('stage', '?'))} of {_code(entry.get('input', '?'))}"]
    for key in ("removed", "settings", "metrics", "time", "versions"):
        if value := entry.get(key):
            what.append(f"{key} {_code(value)}")
    return "; ".join(what)


def _code(value: Any) -> str:
    """Any value as one line of code, which nothing in it can end: not a backtick, not a line end."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {json.dumps(item, ensure_ascii=False)}" for key, item in value.items())
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
