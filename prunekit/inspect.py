"""What a checkpoint folder holds: layers, heads, parameters, KV bytes per token, history.

    python -m prunekit.inspect checkpoints/pruned [--json]

It reads no weights.
"""

import json
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import history, open_checkpoint, statistics
from prunekit.checkpoint.card import ROWS
from prunekit.errors import run_script


def describe(numbers: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """A table of one checkpoint's `statistics` and its history."""
    lines = [f"{label:16}{numbers[key]:>16,}" for label, key in ROWS.items() if numbers[key] is not None]
    lines += [f"  {part:14}{count:>16,}" for part, count in numbers["parameters_by_component"].items() if count]
    for entry in entries:
        lines.append(f"{entry.get('time', '')}  {entry.get('stage', '?')}  from {entry.get('input', '?')}")
        lines += [f"    {key} {entry[key]}" for key in ("removed", "settings", "metrics") if entry.get(key)]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.folder, quantised=True)
    numbers, entries = statistics(checkpoint), history(checkpoint.path)
    if arguments.json:
        print(json.dumps({"model_type": checkpoint.family.model_type, **numbers, "history": entries}, indent=2))
    else:
        print(f"{checkpoint.path}: {checkpoint.family.model_type}")
        print(describe(numbers, entries))


if __name__ == "__main__":
    run_script(main)
