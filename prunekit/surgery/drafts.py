"""Layers that predict further tokens (MTP), which have the sizes that the config says of the text layers.

transformers leaves them out when it loads a model, so that no fit sees them: where text layers change their shapes,
they go, or what reads them would find shapes that the config doesn't tell.
"""

import re
from typing import Any

from prunekit.checkpoint import Outline
from prunekit.families import configs


def draft_tensors(checkpoint: Outline) -> list[str]:
    """A checkpoint's tensors that only predict further tokens."""
    prefix = checkpoint.family.drafts
    return [name for name in checkpoint.tensors if prefix and re.match(prefix, name)]


def drop_drafts(checkpoint: Outline, config: dict[str, Any], shapes: dict[str, Any]) -> list[str]:
    """Take them out of what a plan makes of a checkpoint, its config and its tensors; returns what to tell a user."""
    names, count = draft_tensors(checkpoint), checkpoint.family.draft_count or ""
    for name in names:
        shapes.pop(name, None)
    for part in configs(config, checkpoint.family.text):
        if part.get(count):
            part[count] = 0
    if not names:
        return []
    return [f"the {len(names)} tensors that predict further tokens (MTP) go: their shapes are those of the text layers"]
