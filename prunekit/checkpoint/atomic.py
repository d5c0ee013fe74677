"""Files and folders that are either whole or absent, or as before: locks, folders beside OUT, and the swap."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

from .format import named

MAX_NAME = 200  # bytes, of OUT: file systems take 255, and folders of work are named OUT.partial-...
MANY = 1000  # files, from which on flushing each takes longer than flushing all there is: 3 ms a picture


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers does: two spaces, a line end. It is whole or as before, whatever happens.

    What is no file (/dev/stdout, a pipe) gets the text and stays: root could replace it for all of the machine.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")  # of this process: another may write the same file
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    special = path.parent == Path("/dev") or path.exists() and not path.is_file()
    target, mode = (path, "a") if special else (draft, "w")
    with target.open(mode, encoding="utf-8", errors="backslashreplace") as file:  # lone surrogates, as JSON has them
        file.write(text)
    if not special:
        draft.replace(path)


def _is_checkpoint_like(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or any(folder.glob("*.safetensors")))


def check_out(
    out: str | Path, *inputs: Path, overwrite: bool = False, kind: str = "checkpoint",
    is_kind: Callable[[Path], bool] = _is_checkpoint_like,
) -> Path:  # fmt: skip
    """OUT as a path, if it may be written: new, empty, or (with `overwrite`) a checkpoint that is no input.

    Or something else that may be replaced: `kind` says what in a word, `is_kind` tells it.
    """
    out = named(out)
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise PruneKitError(f"{out}: is or holds the input {path}; choose another OUT")
    if not out.name or out.name == "..":
        raise PruneKitError(f"{out}: no name for a folder to write; choose another OUT")
    if len(os.fsencode(out.name)) > MAX_NAME:
        raise PruneKitError(f"{out}: its name is too long for what is made beside it; use at most {MAX_NAME} bytes")
    parent = next(folder for folder in out.absolute().parents if folder.exists() or folder.is_symlink())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PruneKitError(f"{out}: can't be written: {parent} is no folder that you may write to; choose another OUT")
    if out.is_mount():  # nothing can be renamed to it
        raise PruneKitError(f"{out}: is where a disk is mounted; choose a folder in it")
    if out.is_dir() and not any(out.iterdir()):
        if out.is_symlink() and not overwrite:
            raise PruneKitError(f"{out}: is a link; give the folder that it leads to, {os.path.realpath(out)}")
        return out
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise PruneKitError(f"{out}: exists; choose another OUT or pass --overwrite")
        if not is_kind(out):
            raise PruneKitError(f"{out}: holds no {kind}, so it isn't overwritten; choose another OUT")
    return out


def _lock(folder: Path) -> int | None:
    """An exclusive lock on a folder, held until the descriptor is closed or the process dies; None if it's taken."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        # Not lockable: gone meanwhile, no folder, or a file system without locks, where nobody knows if it's in use.
        with contextlib.suppress(OSError):
            if not leftover.is_symlink() and (descriptor := _lock(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(descriptor)


def _make_partial(out: Path) -> tuple[Path, int | None]:
    while True:
        partial = out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        partial.mkdir()
        # Another process's clean-up may take the folder for a leftover before the lock is held: then try again.
        try:
            descriptor = _lock(partial)
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks, where no clean-up is made either
            return partial, None
        if descriptor is not None and partial.exists():
            return partial, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _sync_file_system(folder: Path) -> bool:
    """Flush all of the file system that the folder is on (Linux syncfs); False where that can't be done."""
    flush = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return flush is not None and flush(descriptor) == 0
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    paths = [*folder.rglob("*"), folder]
    if len(paths) > MANY and _sync_file_system(folder):
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where kernel or file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _swap_in(partial: Path, out: Path, overwrite: bool) -> None:
    try:
        if out.is_symlink() or not overwrite or not out.exists():
            if out.is_symlink() and overwrite:
                out.unlink()
            partial.rename(out)  # onto an empty folder too, but never onto a used one
        elif _exchange(partial, out):
            _discard(partial)
        else:
            old = out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
            out.rename(old)
            partial.rename(out)
            _discard(old)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise PruneKitError(f"{out}: came into being meanwhile; choose another OUT or pass --overwrite") from error
        raise


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


@contextlib.contextmanager
def scratch_folder(out: str | Path) -> Iterator[Path]:
    """A folder `OUT.partial-…` beside OUT for the time of the block. What killed processes left for OUT is removed.

    Folders that are made for it to be in stay only if something else is in them at the end.
    Raises PruneKitError if it can't be made, or if the disk fills up in the block.
    """
    out = Path(out)
    made = [folder for folder in out.parents if not folder.exists()]
    partial = descriptor = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial, descriptor = _make_partial(out)
        yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PruneKitError(
                f"{out}: the disk is full; nothing was left there; make room or choose another disk"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise PruneKitError(f"{out}: can't be written ({error.strerror}: {error.filename})") from error
        raise
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def check_room(out: str | Path, need_bytes: int) -> None:
    """PruneKitError if fewer bytes are free where OUT is to be. What killed processes left for OUT is removed."""
    _remove_leftovers(Path(out))
    _check_free(Path(out), need_bytes)


def _check_free(out: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    if free < need_bytes:
        raise PruneKitError(
            f"{out}: needs {_size(need_bytes)}, {_size(free)} are free; make room or choose another disk"
        )


@contextlib.contextmanager
def new_folder(out: str | Path, overwrite: bool = False, need_bytes: int = 0, **kind: Any) -> Iterator[Path]:
    """Write a folder that is either whole or absent.

    Yields an empty folder `OUT.partial-…` beside OUT. When the block ends well, its files are on the disk (fsync) and
    it is renamed to OUT; when it raises, it is removed. A killed process leaves its folder: the next call for the same
    OUT removes it. Raises PruneKitError if OUT is used and `overwrite` is false, if fewer than `need_bytes` are free,
    if the disk fills up, or OUT can't be written. `kind` goes to `check_out`.
    """
    out = check_out(out, overwrite=overwrite, **kind)
    with scratch_folder(out) as partial:
        _check_free(out, need_bytes)
        yield partial
        _sync(partial)
        _swap_in(partial, out, overwrite)
        parent = os.open(out.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
