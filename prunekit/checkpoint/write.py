"""Checkpoints, written: the kernel moves the bytes of tensors that surgery left as they were."""

import contextlib
import ctypes
import errno
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

from .atomic import check_out, new_folder, write_json
from .folder import INDEX
from .format import DTYPE_BYTES, Checkpoint, Tensor
from .records import copy_files, history, side_files, write_records
from .sizes import statistics

WRITE_BYTES = 2**17  # larger writes made Linux 6.18's ext4 several times slower


def _start_writeback(file: int) -> None:
    """Have the kernel put on the disk what is written so far, without waiting: little is left for fsync at the end."""
    if start := getattr(ctypes.CDLL(None), "sync_file_range", None):
        start(file, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # the whole file, SYNC_FILE_RANGE_WRITE


def _copy_range(source: int, target: int, start: int, count: int, name: Path) -> None:
    """Append bytes [start, start + count) of one open file to another, inside the kernel where that is possible."""
    in_kernel = True
    while count:
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, 2**25), offset_src=start)
            except OSError as error:
                if error.errno not in (
                    errno.EXDEV,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                    errno.EPERM,
                ):
                    raise
                in_kernel = False
                continue
        else:
            done = os.write(target, os.pread(source, min(count, WRITE_BYTES), start))
        if not done:
            raise PruneKitError(f"{name}: became shorter while it was read; copy or download it again")
        start, count = start + done, count - done
        if in_kernel:
            _start_writeback(target)


def _write_all(target: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(target, view[:WRITE_BYTES]) :]


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    runs: list[list] = []  # [file or what computes, start, bytes]: neighbours in the source become one copy
    for tensor in tensors.values():
        if tensor.compute:
            runs.append([tensor.compute, 0, tensor.nbytes])
        elif runs and runs[-1][0] == tensor.file and sum(runs[-1][1:]) == tensor.start:
            runs[-1][2] += tensor.nbytes
        else:
            runs.append([tensor.file, tensor.start, tensor.nbytes])
    with contextlib.ExitStack() as stack:
        target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, target)
        sources: dict[Path, int] = {}
        with contextlib.suppress(OSError):  # room in one piece, where the file system can: a faster write
            os.posix_fallocate(target, 0, 8 + len(head) + position)
        _write_all(target, struct.pack("<Q", len(head)) + head)
        for what, start, count in runs:
            if callable(what):
                data = what()
                if len(data) != count:
                    raise ValueError(f"computed {len(data)} bytes for a tensor of {count}")
                _write_all(target, data)
                _start_writeback(target)
                continue
            if what not in sources:
                sources[what] = os.open(what, os.O_RDONLY)
                stack.callback(os.close, sources[what])
            _copy_range(sources[what], target, start, count, what)


def _into_shards(tensors: dict[str, Tensor], max_shard_bytes: int | None) -> list[dict[str, Tensor]]:
    """Group tensors into output files: as in the input, or as full as `max_shard_bytes` allows."""
    groups: list[dict[str, Tensor]] = []
    last_file, filled = None, 0
    for name, tensor in tensors.items():
        full = tensor.file != last_file if max_shard_bytes is None else filled + tensor.nbytes > max_shard_bytes
        if not groups or (full and groups[-1]):
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        last_file, filled = tensor.file, filled + tensor.nbytes
    # Wide dtypes first, as safetensors itself does, so that every tensor is aligned.
    return [dict(sorted(group.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype])) for group in groups]


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int | None = None) -> None:
    """Write tensors as model.safetensors, or as shards with an index. Sharded as the input unless a size is given."""
    shards = _into_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    entry: dict[str, Any],
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    extra_files: Iterable[Path] = (),
    fallback: Path | None = None,
) -> None:
    """Write `checkpoint` to OUT, atomically, with its side files, its history plus `entry`, and a README.md of these.

    `checkpoint.path` is the folder that side files come from, but for what is anew in `checkpoint.files`; those missing
    there come from `fallback`, whose history is then the one that goes on. Raises PruneKitError as `new_folder` does.
    """
    files = (side_files(fallback) if fallback else {}) | side_files(checkpoint.path)
    files |= {file.name: file for file in map(Path, extra_files)}
    files = {name: file for name, file in files.items() if name not in checkpoint.files}
    anew = {name: content for name, content in checkpoint.files.items() if content is not None}
    entries = [*history(fallback or checkpoint.path), entry]
    numbers = statistics(checkpoint)
    need = checkpoint.nbytes + sum(file.stat().st_size for file in files.values()) + 2**20
    need += sum(map(len, anew.values()))
    check_out(out, checkpoint.path, *([fallback] if fallback else []), overwrite=overwrite)
    with new_folder(out, overwrite, need) as folder:
        write_weights(folder, checkpoint.tensors, max_shard_bytes)
        write_json(folder / "config.json", checkpoint.config)
        copy_files(files, folder)
        for name, content in anew.items():
            (folder / name).write_bytes(content)
        write_records(folder, checkpoint.config, numbers, entries)
