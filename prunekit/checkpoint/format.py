"""What a checkpoint is made of: JSON and safetensors files, tensors and where their bytes lie.

Reading parses headers only. Nothing here imports torch, but for `Checkpoint.read`.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit.arguments import check_home
from prunekit.errors import PruneKitError
from prunekit.families import Family, family_of

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip

TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

MAX_HEADER = 100_000_000  # what the safetensors library accepts

MAX_AXES = 64  # of a tensor, as numpy and torch have them


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor without its bytes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Tensor(Shape):
    """Where a tensor's bytes are: [start, start + nbytes) of a file, or what computes them."""

    file: Path
    start: int
    compute: Callable[[], bytes | memoryview] | None = None


@dataclass(frozen=True)
class Outline:
    """A config and the shapes of its tensors: sizes can be told of it, but only a `Checkpoint` can be written."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Shape]

    @cached_property
    def family(self) -> Family:
        """The row of `families.FAMILIES`; PruneKitError for an unknown model_type."""
        return family_of(self.config)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint(Outline):
    """A folder's config and the whereabouts of its tensors, by name, in the order of files and offsets."""

    tensors: dict[str, Tensor]
    files: dict[str, bytes | None] = field(default_factory=dict)  # side files that surgery changed; None: left out

    def shapes(self) -> dict[str, Shape]:
        """Those of its tensors, by name: what an `Outline` begins with."""
        return {name: Shape(tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def read_bytes(self, name: str) -> bytearray:
        """One tensor's bytes as they are on disk."""
        tensor = self.tensors[name]
        data = bytearray(tensor.nbytes)
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            if file.readinto(data) != len(data):
                raise PruneKitError(f"{tensor.file}: shorter than its header says; copy or download it again")
        return data

    def read_array(self, name: str):
        """One floating tensor's values as a numpy array: float64 where it is F64, else float32."""
        import numpy as np

        tensor, data = self.tensors[name], self.read_bytes(name)
        if tensor.dtype == "BF16":
            array = (np.frombuffer(data, "<u2").astype("u4") << 16).view("f4")
        else:
            array = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype])
        return array.astype("f8" if tensor.dtype == "F64" else "f4", copy=False).reshape(tensor.shape)

    def read(self, name: str):
        """One tensor's values as a torch tensor of its own dtype (a private copy)."""
        import torch

        tensor, data = self.tensors[name], self.read_bytes(name)
        dtypes = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"} | TORCH_DTYPES
        dtype = getattr(torch, dtypes.get(tensor.dtype) or tensor.dtype.replace("I", "int").replace("U", "uint"))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(tensor.shape)


def float_bytes(array, dtype: str, name: str = "") -> memoryview:
    """A float32 or float64 array as bytes of a floating safetensors dtype, rounded to nearest even.

    Raises PruneKitError if a finite value becomes infinite in that dtype.
    """
    import numpy as np

    flat = array.reshape(-1)
    out = np.empty(flat.size, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
    for start in range(0, flat.size, 2**22):  # in pieces: no second copy of a large tensor in between
        piece = flat[start : start + 2**22]
        with np.errstate(over="ignore"):
            rounded = piece.astype("f4") if dtype == "BF16" else piece.astype(out.dtype)
        if dtype == "BF16":
            bits = rounded.view("u4")
            upper = bits + (((bits >> 16) & 1) + 0x7FFF).astype("u4") >> 16
            rounded = (upper << 16).view("f4")
            out[start : start + 2**22] = np.where(np.isnan(piece), 0x7FC0, upper)
        else:
            out[start : start + 2**22] = rounded
        if (np.isinf(rounded) & np.isfinite(piece)).any():
            raise PruneKitError(f"{name}: has values too large for {TORCH_DTYPES[dtype]}; choose another dtype")
    return out.data.cast("B")


def read_json(path: Path, **how: Any) -> Any:
    """A JSON file's content; PruneKitError if it can't be read or parsed. `how` goes to json.loads."""
    try:
        return json.loads(path.read_bytes(), **how)
    except FileNotFoundError as error:
        raise PruneKitError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PruneKitError(f"{path}: can't be read as JSON ({error})") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_tensor(name: str, entry: Any, file: Path) -> tuple[Tensor, int, int]:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has dtype {dtype!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_AXES else [-1]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{name} has a bad shape or bad offsets")
    tensor = Tensor(dtype, tuple(shape), file, begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} has {end - begin} bytes where its shape {shape} and {dtype} need {tensor.nbytes}")
    return tensor, begin, end


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises PruneKitError for anything but a whole, well-formed file: one that is cut short, or whose offsets overlap,
    leave gaps or don't fit the shapes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= MAX_HEADER:
                raise ValueError("no safetensors header")
            if 8 + length > size:
                raise ValueError("it ends inside its header")
            raw = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        raw.pop("__metadata__", None)
        entries = [(name, *_parse_tensor(name, entry, file)) for name, entry in raw.items()]
    except OSError as error:
        raise PruneKitError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"no {error} in an entry" if isinstance(error, KeyError) else error
        raise PruneKitError(f"{file}: not a readable safetensors file ({detail}); copy or download it again") from error
    tensors, position = {}, 0
    for name, tensor, begin, end in sorted(entries, key=lambda entry: entry[2:]):
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise PruneKitError(f"{file}: bytes of tensors {what} before {name}; copy or download the file again")
        tensors[name] = replace(tensor, start=8 + length + begin)
        position = end
    if 8 + length + position != size:
        raise PruneKitError(
            f"{file}: {size} bytes where its header says {8 + length + position}: it is "
            f"{'cut short' if size < 8 + length + position else 'too long'}; copy or download it again"
        )
    return tensors


def named(path: str | Path) -> Path:
    """The path, if its name can be written into JSON and cards; raises as `check_home`, too."""
    check_home(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PruneKitError(f"{ascii(str(path))}: a name that isn't UTF-8; rename it, or make a link") from None
    return Path(path)
