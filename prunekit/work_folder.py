"""Folders of work in progress that the same command continues: one process at a time, one set of settings."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import Checkpoint, write_json
from .errors import PruneKitError


def claim_folder(out: Path, settings: dict[str, Any], what: str) -> TextIO:
    """Make or take over OUT for work of these settings; it is ours while the returned file is open.

    Raises PruneKitError if it holds anything else, work of other settings, or if another process is at it.
    """
    settings_file = out / "settings.json"
    own = {"lock", ".settings.json.new"}  # all that a process killed at its very start leaves
    known = not out.exists() or settings_file.exists()
    if not known and (not out.is_dir() or {path.name for path in out.iterdir()} - own):
        raise PruneKitError(f"{out}: is in use, and no {what}; choose another OUT")
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PruneKitError(f"{out}: another {what} is running there; choose another OUT") from None
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise PruneKitError(
            f"{out}: holds a {what} of another model or other settings; choose another OUT or remove it"
        )
    write_json(settings_file, settings)
    return lock


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another by config, tensors and the time its files were written, reading no weights."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    parts = [
        json.dumps(checkpoint.config, sort_keys=True),
        *(f"{name}{t.shape}" for name, t in checkpoint.tensors.items()),
    ]
    parts += [f"{file.name}{file.stat().st_size}{file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
