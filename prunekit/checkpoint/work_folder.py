"""Folders of work in progress that the same command continues: one process at a time, one set of settings."""

import contextlib
import fcntl
import re
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


def _check_settings(out: Path, settings: dict[str, Any], what: str) -> None:
    if (file := out / "settings.json").exists():
        if read_json(file) != settings:
            raise PruneKitError(
                f"{out}: holds a {what} of another model, other data or other settings; choose another OUT or remove it"
            )
    elif out.exists() and not (out.is_dir() and all(OWN.fullmatch(path.name) for path in out.iterdir())):
        raise PruneKitError(f"{out}: is in use, and no {what}; choose another OUT")
