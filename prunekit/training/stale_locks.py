"""Remove the locks that killed compilations of DeepSpeed's CPU optimizer left: the next would wait on them for ever.

    python -m prunekit.training.stale_locks

The launchers call this where it is used (zero2_offload, zero3_offload). A lock that a process of this machine holds
stays, and so does a young one, which a process of another that shares the folder may hold.
"""

import contextlib
import os
import time
from pathlib import Path

CACHE = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(CACHE) / "torch_extensions")
YOUNG = 600  # seconds


def _held(lock: Path) -> bool:
    """Has any process of this machine that file open?"""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if descriptor.samefile(lock):
                return True
    return False


def remove_stale_locks(root: Path = EXTENSIONS, older: float = 0) -> None:
    """Those in the folder of torch's extensions that are so many seconds old."""
    for lock in root.rglob("cpu_adam/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime >= older and not _held(lock):
                lock.unlink()


if __name__ == "__main__":
    remove_stale_locks(older=YOUNG)
