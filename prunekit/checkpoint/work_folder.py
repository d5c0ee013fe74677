"""Folders of work in progress that the same command continues: one process at a time, one set of settings."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

from .atomic import write_json
from .folder import fingerprint
from .format import named, read_json

__all__ = ["claim_folder", "fingerprint"]  # which settings hold, as what they depend on

OWN = re.compile(r"lock|settings\.json|\.settings\.json\.(?:\d+\.)?new")  # all that a claim by itself writes


@contextlib.contextmanager
def claim_folder(out: Path, settings: dict[str, Any], what: str) -> Iterator[None]:
    """Make or take over OUT for work of these settings; it is ours for the time of the block.

    Raises PruneKitError if it holds anything else, work of other settings, or if another process is at it. Such a
    refusal, or one that the block raises before it wrote anything, leaves nothing of the claim.
    """
    named(out)
    _check_settings(out, settings, what)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PruneKitError(f"{out}: another {what} is running there; choose another OUT") from None
        except OSError:
            raise PruneKitError(
                f"{out}: no file can be locked there (Lustre needs -o flock): choose an OUT elsewhere"
            ) from None
        _check_settings(out, settings, what)  # written meanwhile
        write_json(out / "settings.json", settings)
        try:
            yield
        except PruneKitError:
            if out.exists() and all(OWN.fullmatch(path.name) for path in out.iterdir()):
                for path in out.iterdir():
                    path.unlink()
                with contextlib.suppress(OSError):  # a parent that others use by now
                    for folder in made:
                        folder.rmdir()
            raise


def _number(out: Path) -> str:
    try:
        return str(out.stat().st_ino)
    except OSError:
        return "none"


def begin_publishing(folder: Path, out: Path) -> None:
    """Keep in a folder of work which folder OUT is, before it is replaced by what the work has made."""
    draft = folder / "publishing.new"
    draft.write_text(_number(out))
    draft.replace(folder / "publishing")


def is_published(folder: Path, out: Path) -> bool:
    """Whether OUT is what this work has made: another folder than when it began to publish."""
    try:
        before = (folder / "publishing").read_text()
    except OSError:
        return False
    return _number(out) not in ("none", before)


def remove_work(folder: Path, out: Path) -> None:
    """Remove a folder of work at once: a half of it would be no work's, and in the way of the same command."""
    gone = out.with_name(f"{out.name}.partial-{os.getpid()}-run")  # whoever makes OUT the next time removes that, too
    folder.rename(gone)
    shutil.rmtree(gone)


def _check_settings(out: Path, settings: dict[str, Any], what: str) -> None:
    if (file := out / "settings.json").exists():
        if read_json(file) != settings:
            raise PruneKitError(
                f"{out}: holds a {what} of another model, other data or other settings; choose another OUT or remove it"
            )
    elif out.exists() and not (out.is_dir() and all(OWN.fullmatch(path.name) for path in out.iterdir())):
        raise PruneKitError(f"{out}: is in use, and no {what}; choose another OUT")
