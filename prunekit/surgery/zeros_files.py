"""Checkpoints with zeros, as small as their zeros allow: a bit says of each weight whether its value follows.

A packed folder is the checkpoint's but for its tensors NAME that gain by it: NAME.bitmask, uint8 (weights / 8,), the
first weight in the lowest bit; NAME.compressed, the values whose bits aren't all 0, in order and in their dtype; and
NAME.shape. That is compressed-tensors' sparse-bitmask, which it has dropped, without offsets of rows. The files are
safetensors that end in .packed, so that no runtime takes them for weights: transformers would only warn of a form that
it doesn't know, and fill in random ones. All is done a tensor at a time, and exact to the bit (a negative zero is a
value).
"""

import copy
import math
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prunekit.checkpoint import (
    DTYPE_BYTES,
    INDEX,
    TORCH_DTYPES,
    Checkpoint,
    Tensor,
    check_out,
    copy_files,
    history,
    history_entry,
    new_folder,
    open_checkpoint,
    read_config,
    read_header,
    side_files,
    statistics,
    write_checkpoint,
    write_json,
    write_records,
    write_weights,
)
from prunekit.checkpoint.agreement import check_agreement
from prunekit.checkpoint.quantised import BITMASK
from prunekit.errors import PruneKitError

from .zeros_weights import Weight, choose_weights

SUFFIX = ".packed"
PARTS = ("bitmask", "compressed", "shape")
USE = "# packed: no runtime loads this; the checkpoint again, exact to the bit:\n# {command}"
COMMAND = "python -m prunekit.packed unpack this/folder --out checkpoints/sparse"
ZSTD_LEVEL = 3
CSR_INDEX = 4  # bytes of a column's number, and of a row's start
SCALE = 4  # bytes of an INT8 output's scale


def _bits(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor's values as unsigned integers, flat."""
    data = checkpoint.read_bytes(name)
    return np.frombuffer(data, f"<u{DTYPE_BYTES[checkpoint.tensors[name].dtype]}")


def _bitmask(checkpoint: Checkpoint, name: str) -> memoryview:
    return np.packbits(_bits(checkpoint, name) != 0, bitorder="little").data


def _values(checkpoint: Checkpoint, name: str) -> memoryview:
    bits = _bits(checkpoint, name)
    return bits[bits != 0].data.cast("B")


def packed_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the packed folder; those that zeros make smaller are computed. Reads each weight once."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in tqdm(checkpoint.tensors.items(), desc="count zeros", leave=False, disable=None):
        count = math.prod(tensor.shape)
        stays = int(np.count_nonzero(_bits(checkpoint, name))) if tensor.dtype in TORCH_DTYPES else count
        shape = np.array(tensor.shape, "<i8").data.cast("B")
        parts = {
            f"{name}.bitmask": replace(
                tensor, dtype="U8", shape=(-(-count // 8),), compute=partial(_bitmask, checkpoint, name)
            ),
            f"{name}.compressed": replace(tensor, shape=(stays,), compute=partial(_values, checkpoint, name)),
            f"{name}.shape": replace(tensor, dtype="I64", shape=(len(tensor.shape),), compute=partial(bytes, shape)),
        }
        smaller = sum(part.nbytes for part in parts.values()) < tensor.nbytes
        tensors |= parts if smaller else {name: tensor}
    return tensors


def pack(checkpoint: Checkpoint, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the packed folder OUT, whole or not at all, with the history; returns its new entry.

    PruneKitError if no tensor has enough zeros (one of 16 in bf16, of 32 in fp32), or OUT can't be written.
    """
    check_out(out, checkpoint.path, overwrite=overwrite)
    tensors = packed_tensors(checkpoint)
    if tensors.keys() == checkpoint.tensors.keys():
        raise PruneKitError(f"{checkpoint.path}: too few zeros to gain by packing; sparsify.py makes more")
    numbers, size = statistics(checkpoint), sum(tensor.nbytes for tensor in tensors.values())
    entry = history_entry("pack", checkpoint.path, numbers, numbers) | {"packed_bytes": size}
    marked = {"quantization_config": {"quant_method": BITMASK, "tensors": len(tensors)}}
    with new_folder(out, overwrite, size + 2**20) as folder:
        write_weights(folder, tensors)
        for file in folder.glob("*.safetensors"):
            file.rename(file.with_suffix(SUFFIX))
        (folder / INDEX).unlink(missing_ok=True)
        write_json(folder / "config.json", checkpoint.config | marked)
        copy_files(side_files(checkpoint.path), folder)
        entries = [*history(checkpoint.path), entry]
        write_records(folder, checkpoint.config, numbers, entries, use=USE.format(command=COMMAND))
    return entry


def unpack(folder: Path, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the checkpoint OUT that a packed folder was made of, whole or not at all; returns its new entry.

    PruneKitError for a folder that isn't packed, or is damaged.
    """
    checkpoint, entries = open_packed(folder), history(folder)
    made = {key: value for key, value in (entries[-1] if entries else {}).items() if key != "packed_bytes"}
    made |= {"stage": "unpack", "input": str(folder), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    write_checkpoint(checkpoint, out, made, overwrite)
    return made


def open_packed(folder: Path) -> Checkpoint:
    """A packed folder's checkpoint, its tensors computed as they are read or written. Reads the bitmasks."""
    config = copy.deepcopy(read_config(folder))
    marked = config.pop("quantization_config", None)
    if not isinstance(marked, dict) or marked.get("quant_method") != BITMASK:
        raise PruneKitError(f"{folder}: isn't packed; pack a checkpoint with python -m prunekit.packed pack")
    found: dict[str, Tensor] = {}
    files = sorted(folder.glob(f"*{SUFFIX}"))
    for file in files:
        found |= read_header(file)
    if len(found) != marked.get("tensors"):
        raise PruneKitError(f"{folder}: a file is missing, or is another folder's; copy or download it again")
    packed, tensors = Checkpoint(folder, config, found, {file.name: None for file in files}), {}
    for name, tensor in tqdm(found.items(), desc="read bitmasks", leave=False, disable=None):
        stem, _, kind = name.rpartition(".")
        if not {f"{stem}.{part}" for part in PARTS} <= found.keys() or kind not in PARTS:
            tensors[name] = tensor
        elif kind == "compressed":  # these are among the others in the order that they had
            shape = tuple(int(n) for n in np.frombuffer(packed.read_bytes(f"{stem}.shape"), "<i8"))
            bits = np.frombuffer(packed.read_bytes(f"{stem}.bitmask"), np.uint8)
            if len(bits) != -(-math.prod(shape) // 8) or int(np.bitwise_count(bits).sum()) != math.prod(tensor.shape):
                raise PruneKitError(f"{folder}: {stem} has other bits than values; copy or download it again")
            tensors[stem] = replace(tensor, shape=shape, compute=partial(_dense, packed, stem, shape))
    checkpoint = replace(packed, tensors=tensors)
    check_agreement(checkpoint)
    return checkpoint


def _dense(packed: Checkpoint, stem: str, shape: tuple[int, ...]) -> memoryview:
    values = _bits(packed, f"{stem}.compressed")
    bits = np.frombuffer(packed.read_bytes(f"{stem}.bitmask"), np.uint8)
    dense = np.zeros(math.prod(shape), values.dtype)
    dense[np.unpackbits(bits, count=dense.size, bitorder="little").view(bool)] = values
    return dense.data.cast("B")


def file_sizes(path: str | Path, modules: str | None = None) -> dict[str, Any]:
    """Bytes of a checkpoint's weights in several forms, by their names, and what is zero of the chosen weights.

    INT8: the weights of projections, a scale for each output's, rounded to nearest; the rest as it is. zstd is of each
    tensor by itself. Reads each tensor a few times.
    """
    import pyarrow

    checkpoint = open_checkpoint(path)
    chosen = choose_weights(checkpoint, modules)
    codec = pyarrow.Codec("zstd", compression_level=ZSTD_LEVEL)

    def zstd(*parts: Any) -> int:
        return sum(len(codec.compress(part, asbytes=True)) for part in parts if len(part))

    sizes = dict.fromkeys(FORMS, 0)
    packed, zeros, zeros8 = packed_tensors(checkpoint), 0, 0
    for name, tensor in tqdm(checkpoint.tensors.items(), desc="compress", leave=False, disable=None):
        dense = checkpoint.read_bytes(name)
        sizes["dense"] += len(dense)
        sizes["dense, zstd"] += (whole := zstd(dense))
        if name in packed:
            sizes["bitmask"] += len(dense)
            sizes["bitmask, zstd"] += whole
        else:
            parts = [_bitmask(checkpoint, name), _values(checkpoint, name)]
            sizes["bitmask"] += sum(map(len, parts)) + 8 * len(tensor.shape)
            sizes["bitmask, zstd"] += zstd(*parts) + 8 * len(tensor.shape)
        if name not in chosen:
            for form in ("CSR", "INT8", "INT8, bitmask"):
                sizes[form] += len(dense)
            sizes["INT8, zstd"] += whole
            continue
        stays = int(np.count_nonzero(_bits(checkpoint, name)))
        outputs = math.prod(tensor.shape) // tensor.shape[chosen[name].inputs]
        sizes["CSR"] += stays * (DTYPE_BYTES[tensor.dtype] + CSR_INDEX) + (outputs + 1) * CSR_INDEX
        whole8 = _int8(checkpoint, name, chosen[name])
        stays8 = int(np.count_nonzero(whole8))
        scales = outputs * SCALE
        sizes["INT8"] += whole8.size + scales
        sizes["INT8, zstd"] += zstd(whole8.tobytes()) + scales
        sizes["INT8, bitmask"] += -(-whole8.size // 8) + stays8 + scales
        zeros, zeros8 = zeros + whole8.size - stays, zeros8 + whole8.size - stays8
    weights = sum(math.prod(checkpoint.tensors[name].shape) for name in chosen)
    return {"bytes": sizes, "weights": weights, "zeros": zeros / weights, "zeros_in_int8": zeros8 / weights}


FORMS = ("dense", "dense, zstd", "bitmask", "bitmask, zstd", "CSR", "INT8", "INT8, zstd", "INT8, bitmask")


def _int8(checkpoint: Checkpoint, name: str, weight: Weight) -> np.ndarray:
    """A weight in INT8, symmetric, with a scale for each output."""
    values = checkpoint.read_array(name)
    scale = np.abs(values).max(axis=weight.inputs, keepdims=True) / 127
    return np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
