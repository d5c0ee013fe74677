"""Which parameters of a checkpoint suffered most from its last cuts: a regex of their names, to train them first.

    python -m prunekit.critical checkpoints/narrow

By pruning_info.json, of all surgery since the last training: the layers on both sides of removed ones, the attention of
all layers if heads were cut or merged, their MLPs if neurons were.
"""

import re
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import HISTORY, Checkpoint, history, layer_numbers, open_checkpoint
from prunekit.errors import PruneKitError, run_script


def _beside(gone: list[int], before: int) -> tuple[set[int], list[int]]:
    """(new numbers of the layers next to removed ones, old numbers of those that are left)."""
    left = [number for number in range(before) if number not in gone]
    return {new for new, old in enumerate(left) if old - 1 in gone or old + 1 in gone}, left


def critical_parameters(checkpoint: Checkpoint) -> str:
    """The regex. PruneKitError if nothing was cut since the last training."""
    family, row = checkpoint.family, checkpoint.family.text
    cuts: list[dict[str, Any]] = []
    for entry in history(checkpoint.path):
        if entry.get("stage") not in ("pack", "unpack"):  # which change nothing
            cuts = [*cuts, entry] if entry.get("removed") else []
    if not cuts:
        raise PruneKitError(
            f"{checkpoint.path}: nothing was cut from it since it was trained; recover it by full_run.sh"
        )
    layers: dict[str, set[int]] = {stack: set() for stack in family.stacks}
    blocks: set[str] = set()
    for entry in cuts:
        removed = entry["removed"]
        for stack, counted in (("text", "num_hidden_layers"), ("vision", "vision_depth")):
            if gone := removed.get(stack):
                if max(gone) >= (before := entry.get(f"{counted}_before") or 0):
                    raise PruneKitError(
                        f"{checkpoint.path}: {HISTORY} has {stack} layer {max(gone)} of {before} removed; mend it"
                    )
                beside, left = _beside(gone, before)
                layers[stack] = beside | {left.index(old) for old in layers[stack] if old in left}
        if removed.keys() & {"heads", "kv_heads"}:
            blocks |= {name.partition(".")[0] for name in (row.q, row.o)}
        if removed.keys() & {row.width, row.experts, "experts"}:
            blocks |= {name.partition(".")[0] for name in row.mlp}
    parts = []
    for stack, numbers in layers.items():
        layer_numbers(checkpoint, stack)
        if numbers:
            parts.append(rf"{family.stacks[stack].prefix}(?:{'|'.join(map(str, sorted(numbers)))})\.")
    if blocks:
        parts.append(rf"{row.prefix}\d+\.(?:{'|'.join(map(re.escape, sorted(blocks)))})\.")
    if not parts:
        raise PruneKitError(f"{checkpoint.path}: {HISTORY} doesn't say where it was cut; use full_run.sh")
    return "^(?:" + "|".join(parts) + ")"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder")
    print(critical_parameters(open_checkpoint(parser.parse_args().folder)))


if __name__ == "__main__":
    run_script(main)
