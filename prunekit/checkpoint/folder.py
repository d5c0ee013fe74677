"""Checkpoint folders: read lazily, write atomically, tell their story.

A checkpoint is a Hugging Face folder with config.json and safetensors. Reading parses headers only. Surgery makes
a new `Checkpoint` whose tensors still point at the bytes of the old files (renamed, dropped, or computed), and
`write_checkpoint` has the kernel move these bytes. Nothing here imports torch, but for `Checkpoint.read`.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shlex
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from prunekit import errors
from prunekit.errors import PruneKitError
from prunekit.families import Family, check_config, configs, family_of, text_value
from prunekit.rules import LAYER, NUMBERS, OBJECT, REAL, TEXT, Items, Keys, Values, check, whole

from .card import HISTORY, ROWS, model_card

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # what the safetensors library accepts
MAX_AXES = 64  # of a tensor, as numpy and torch have them
MAX_SIDE_FILE = 256 * 2**20
SAMPLES, SAMPLE_BYTES = 4, 2**12  # what a fingerprint reads of a tensor
MAX_NAME = 200  # bytes, of OUT: file systems take 255, and folders of work are named OUT.partial-...
WRITE_BYTES = 2**17  # larger writes made Linux 6.18's ext4 several times slower
BUFFERS = re.compile(r"(?:.*\.)?(?:position_ids|inv_freq|attn\.(?:masked_)?bias)$")  # saved, but no parameters
NOT_CARRIED = re.compile(
    r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|distcp)$|.*\.index\.json$|\..*|README\.md$"
    rf"|config\.json$|{re.escape(HISTORY)}$|trainer_state\.json$|args\.json$|latest$|zero_to_(?:fp32|torch)\.py$"
    r"|logging\.jsonl$|command\.sh$|sparsity\.json$|(?:curves|sparsity|quality|heads)\.png$"  # a stage's own records: later stages have theirs
)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are: [start, start + nbytes) of a file, or what computes them."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    compute: Callable[[], bytes | memoryview] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config and the whereabouts of its tensors, by name, in the order of files and offsets."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @cached_property
    def family(self) -> Family:
        """The row of `families.FAMILIES`; PruneKitError for an unknown model_type."""
        return family_of(self.config)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

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
    return memoryview(out).cast("B")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file's content; PruneKitError if it can't be read or parsed."""
    try:
        return json.loads(path.read_bytes())
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


def _shards(path: Path, config: dict[str, Any]) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's map from tensor to file if there is an index."""
    if (path / "model.safetensors").exists():
        return ["model.safetensors"], None
    if (path / INDEX).exists():
        index = read_json(path / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise PruneKitError(f"{path / INDEX}: has no weight_map; download it again, or remove it")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise PruneKitError(f"{path / INDEX}: {shard!r} isn't the name of a safetensors file in the folder")
        return sorted(set(weight_map.values())), weight_map
    names = sorted(
        file.name for file in path.glob("*.safetensors") if not file.name.startswith(("consolidated", "adapter_"))
    )
    for name in names:
        if numbered := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.safetensors)", name):
            stem, _, total, suffix = numbered.groups()
            names = sorted(f"{stem}-{number:05}-of-{total}{suffix}" for number in range(1, int(total) + 1))
            break
    if not names:
        if pickles := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*")):
            cls = (config.get("architectures") or ["AutoModel"])[0]
            code = f"from transformers import {cls} as M; p = {str(path)!r}; M.from_pretrained(p).save_pretrained(p)"
            raise PruneKitError(
                f"{path}: weights are pickles only ({pickles[0].name}); convert them: python -c {shlex.quote(code)}"
            )
        raise PruneKitError(f"{path}: no *.safetensors here; give a Hugging Face checkpoint folder")
    return names, None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, sharded or not, with or without an index. Reads headers, no weights.

    A name like `org/model` that is no folder is looked up in the local hub cache; nothing is downloaded.
    Raises PruneKitError for everything that can't be cut safely: damaged or missing shards, an index that doesn't
    fit them, pickles, adapters, quantised weights.
    """
    path = _from_hub_cache(path) if not _named(path).exists() else Path(path)
    if (path / "adapter_config.json").exists():
        raise PruneKitError(f"{path}: a LoRA adapter, not a checkpoint; merge it first with export_lora.sh")
    config = read_config(path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part.get("quantization_config") or part.get("compression_config")):
            raise PruneKitError(f"{path}: quantised weights can't be cut; start from the unquantised checkpoint")
    names, weight_map = _shards(path, config)
    if missing := [name for name in names if not (path / name).is_file()]:
        raise PruneKitError(f"{path}: {missing[0]} is missing (1 of {len(missing)}); copy or download it again")
    tensors: dict[str, Tensor] = {}
    for shard in names:
        for name, tensor in read_header(path / shard).items():
            if weight_map is not None and name not in weight_map:
                raise PruneKitError(f"{path / INDEX}: doesn't name {name}, which {shard} holds; make the index anew")
            if weight_map is None and name in tensors:
                raise PruneKitError(f"{path}: {name} is in {tensors[name].file.name} and in {shard}; remove one file")
            if weight_map is None or weight_map[name] == shard:
                tensors[name] = tensor
    if absent := [name for name in weight_map or () if name not in tensors]:
        raise PruneKitError(f"{path / INDEX}: names {absent[0]}, which {weight_map[absent[0]]} doesn't hold")
    checkpoint = Checkpoint(path, config, tensors)
    _check_agreement(checkpoint)
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, checked as far as that can be without its tensors (`families.check_config`)."""
    if not (folder / "config.json").is_file():
        raise PruneKitError(f"{folder}: no config.json here; give a Hugging Face checkpoint folder")
    config = read_json(folder / "config.json")
    try:
        check_config(config)
    except PruneKitError as error:
        raise PruneKitError(f"{folder / 'config.json'}: {error}") from None
    return config


def _check_agreement(checkpoint: Checkpoint) -> None:
    """PruneKitError if a count in the config isn't that of the tensors, so that nothing later meets such a number."""
    family, row, file = checkpoint.family, checkpoint.family.text, checkpoint.path / "config.json"
    for stack in family.stacks:
        layer_numbers(checkpoint, stack)
    said, *again = configs(checkpoint.config, row)
    sizes = (family.hidden, family.heads, family.kv_heads, family.head_dim)
    for key in filter(None, sizes):
        if any(key in said and key in part and said[key] != part[key] for part in again):
            raise PruneKitError(f"{file}: says {key} twice, and not the same; mend it or download it again")
    shapes = _said_shapes(checkpoint)
    layers = re.compile(rf"{row.prefix}\d+\.(.+?)(?:\.weight)?")
    tables = [(re.compile(name), text_value(checkpoint.config, key), key) for name, key in family.tables.items()]
    for name, tensor in checkpoint.tensors.items():
        shape, keys = None, ""
        if match := layers.fullmatch(name):
            shape, keys = shapes.get(re.sub(r"\.experts\.\d+\.", ".experts.", match[1]), (None, ""))
            if shape and len(tensor.shape) == 3:  # all experts in one, which releases turn one way or the other
                shape = (tensor.shape[0], *(shape if shape == tensor.shape[1:] else shape[::-1]))
        elif table := next((table for table in tables if table[1] and table[0].fullmatch(name)), None):
            shape, keys = (table[1], said[family.hidden]), f"{table[2]}, {family.hidden}"
        if shape and tensor.shape != shape:
            raise PruneKitError(
                f"{checkpoint.path}: {name} is {list(tensor.shape)}, by config.json ({keys}) it would be {list(shape)}; mend "
                "config.json or download it again"
            )
    if family.taps:
        blocks, part = len(layer_numbers(checkpoint, "vision")), configs(checkpoint.config, family.vision)[0]
        taps = part.get(family.taps.key, list(family.taps.default))
        if not isinstance(taps, list) or taps != [block for block in range(blocks) if block in taps]:
            raise PruneKitError(f"{file}: {family.taps.key} {taps} isn't a rising list of the blocks 0 to {blocks - 1}")
        mergers = {
            match[1] for name in checkpoint.tensors if (match := re.match(rf"{family.taps.mergers}(\d+)\.", name))
        }
        if mergers != {str(number) for number in range(len(taps))}:
            raise PruneKitError(
                f"{file}: {family.taps.key} has {len(taps)} taps, the weights hold {len(mergers)} mergers; mend it"
            )


def _said_shapes(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, int], str]]:
    """Of each projection of a text layer: its shape by the config, and the keys that say so."""
    family, row = checkpoint.family, checkpoint.family.text
    query, kv, dim = heads(checkpoint)
    config = configs(checkpoint.config, row)[0]
    hidden, head_dim = config[family.hidden], family.head_dim or family.hidden
    said: dict[str, tuple[tuple[int, int], str]] = {row.o: ((hidden, query * dim), f"{family.heads}, {head_dim}")}
    if row.qkv:
        said[row.qkv] = (((query + 2 * kv) * dim, hidden), f"{family.heads}, {family.hidden}")
    else:
        said[row.q] = ((query * dim, hidden), f"{family.heads}, {head_dim}")
        keys = f"{family.kv_heads or family.heads}, {head_dim}"
        said |= dict.fromkeys((row.k, row.v), ((kv * dim, hidden), keys))
    block = row.mlp[-1].rpartition(".")[0]
    for key, names in {
        row.width: row.mlp,
        row.experts: [name.replace(block, f"{block}.experts", 1) for name in row.mlp],
    }.items():
        if key:
            neurons = config.get(key) or 4 * hidden
            said |= dict.fromkeys(names, ((neurons, hidden), f"{key}, {family.hidden}"))
            said[names[-1]] = ((hidden, neurons), f"{key}, {family.hidden}")
    if row.inputs_first:
        said = {name: (shape[::-1], keys) for name, (shape, keys) in said.items()}
    return said


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one model from another: 16 hex digits of its config and of every tensor's name, dtype, shape and samples.

    A tensor of at most 16 KiB is read whole, of a larger one four blocks of 4 KiB, evenly spread: a second for billions
    of parameters. The same wherever the folder lies, whenever its files were written and however they are sharded;
    another one after any cut, merge or training. (A few single weights of a large tensor can change unseen.)
    """
    config = {k: v for k, v in checkpoint.config.items() if k not in ("_name_or_path", "transformers_version")}
    return sampled_digest(config, checkpoint.tensors)


def sampled_digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """`fingerprint` of what is no checkpoint, such as an adapter."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with contextlib.ExitStack() as stack:
        files = {}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}\n{tensor.dtype} {tensor.shape}\n".encode())
            if tensor.file not in files:
                files[tensor.file] = stack.enter_context(tensor.file.open("rb"))
            starts, length = [0], tensor.nbytes
            if length > SAMPLES * SAMPLE_BYTES:
                last, length = tensor.nbytes - SAMPLE_BYTES, SAMPLE_BYTES
                starts = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
            for start in starts:
                digest.update(os.pread(files[tensor.file].fileno(), length, tensor.start + start))
    return digest.hexdigest()[:16]


def _from_hub_cache(name: str | Path) -> Path:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            return Path(snapshot_download(str(name), local_files_only=True))
        raise PruneKitError(f"{name}: no such folder, and not in the hub cache; fetch it: hf download {name}")
    raise PruneKitError(f"{name}: no such folder")


# --- writing ---------------------------------------------------------------------------------------------------------


def _is_checkpoint_like(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or any(folder.glob("*.safetensors")))


def _named(path: str | Path) -> Path:
    """The path, if its name can be written into JSON and cards."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PruneKitError(f"{ascii(str(path))}: a name that isn't UTF-8; rename it, or make a link") from None
    return Path(path)


def check_out(out: str | Path, *inputs: Path, overwrite: bool = False) -> Path:
    """OUT as a path, if it may be written: new, empty, or (with `overwrite`) a checkpoint that is none of the inputs."""
    out = _named(out)
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
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise PruneKitError(f"{out}: exists; choose another OUT or pass --overwrite")
        if not _is_checkpoint_like(out):
            raise PruneKitError(f"{out}: holds no checkpoint, so it isn't overwritten; choose another OUT")
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


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
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
    """A folder `OUT.partial-…` beside OUT for the time of the block. What killed processes left for this OUT is removed.

    Raises PruneKitError if it can't be made, or if the disk fills up in the block.
    """
    out = Path(out)
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


@contextlib.contextmanager
def new_folder(out: str | Path, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Write a folder that is either whole or absent.

    Yields an empty folder `OUT.partial-…` beside OUT. When the block ends well, its files are on the disk (fsync) and
    it is renamed to OUT; when it raises, it is removed. A killed process leaves its folder: the next call for the same
    OUT removes it. Raises PruneKitError if OUT is used and `overwrite` is false, if fewer than `need_bytes` are free,
    if the disk fills up, or OUT can't be written.
    """
    out = check_out(out, overwrite=overwrite)
    with scratch_folder(out) as partial:
        free = shutil.disk_usage(out.parent).free
        if free < need_bytes:
            raise PruneKitError(
                f"{out}: needs {_size(need_bytes)}, {_size(free)} are free; make room or choose another disk"
            )
        yield partial
        _sync(partial)
        _swap_in(partial, out, overwrite)
        parent = os.open(out.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


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
    runs: list[list] = []  # [file, start, bytes]: neighbours in the source become one copy
    for tensor in tensors.values():
        if tensor.compute:
            runs.append([tensor, 0, tensor.nbytes])
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
            if isinstance(what, Tensor):
                data = what.compute()
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
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers does: two spaces, a line end. It is whole or as before, whatever happens."""
    draft = path.with_name(f".{path.name}.new")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # lone surrogates, as JSON has them
    draft.replace(path)


def side_files(folder: Path) -> list[Path]:
    """Files that travel with the weights: tokenizer, processor, chat template, generation config, any other small one.

    Not: weights, pickles, subfolders, hidden files, a trainer's state, and what each stage writes anew.
    """
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not NOT_CARRIED.match(file.name) and file.stat().st_size <= MAX_SIDE_FILE
    )


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

    `checkpoint.path` is the folder that side files come from; files missing there come from `fallback`, whose history
    is then the one that goes on. Raises PruneKitError as `new_folder` does.
    """
    files = {file.name: file for folder in (fallback, checkpoint.path) if folder for file in side_files(folder)}
    files |= {file.name: file for file in map(Path, extra_files)}
    entries = [*history(fallback or checkpoint.path), entry]
    numbers = statistics(checkpoint)
    need = checkpoint.nbytes + sum(file.stat().st_size for file in files.values()) + 2**20
    check_out(out, checkpoint.path, *([fallback] if fallback else []), overwrite=overwrite)
    with new_folder(out, overwrite, need) as folder:
        write_weights(folder, checkpoint.tensors, max_shard_bytes)
        write_json(folder / "config.json", checkpoint.config)
        for file in files.values():
            shutil.copyfile(file, folder / file.name)
        write_records(folder, checkpoint.config, numbers, entries)


def write_records(
    folder: Path,
    config: dict[str, Any],
    numbers: dict[str, Any],
    entries: list[dict[str, Any]],
    use: str | None = None,
    adapter: dict[str, Any] | None = None,
) -> None:
    """What a stage tells of itself in the folder that it writes: history, model card, and the script's command line.

    A command.sh that is there already (a training's own) stays. `use` and `adapter` are `model_card`'s.
    """
    write_json(folder / HISTORY, {"history": entries})
    card = model_card(config, numbers, entries, use, adapter)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    if errors.command and not (folder / "command.sh").exists():
        (folder / "command.sh").write_text(errors.command, encoding="utf-8", errors="surrogateescape")


# --- history and statistics ------------------------------------------------------------------------------------------

_SIZES = dict.fromkeys(ROWS.values(), whole(0, 2**63)) | dict.fromkeys(("num_hidden_layers", "vision_depth"), LAYER)
_SIZES["parameters_by_component"] = Values(whole(0, 2**63))
ENTRY = Keys(  # what readers of a history count on, where it is there
    dict.fromkeys(("stage", "input", "time"), TEXT)
    | dict.fromkeys(("settings", "metrics", "versions"), OBJECT)
    | {"removed": Keys({"text": NUMBERS, "vision": NUMBERS})}
    | {"sparsity": Keys({"sparsity": REAL, "tensors": Values(REAL)}, ("sparsity", "tensors"))}
    | {f"{key}{when}": rule for key, rule in _SIZES.items() for when in ("", "_before")}
)


def history(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's pruning_info.json, oldest first; none if there is no such file."""
    file = Path(path) / HISTORY
    if not file.exists():
        return []
    content = read_json(file)
    check(content, Keys({"history": Items(ENTRY)}, ("history",)), file)
    return content["history"]


def append_history(folder: str | Path, entry: dict[str, Any]) -> None:
    """Add an entry to a folder's pruning_info.json, atomically."""
    write_json(Path(folder) / HISTORY, {"history": [*history(folder), entry]})


def history_entry(
    stage: str,
    input_path: str | Path,
    before: dict[str, Any],
    after: dict[str, Any],
    removed: Any = None,
    metrics: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What one stage did. `before` and `after` come from `statistics`; both are in it, `before` as `…_before`.

    `input_fingerprint` says which model it was made from, wherever that lies now; the model it made has none in its
    folder, which could not be trusted once someone changed the weights: it is taken from them when it is needed.
    """
    versions = {}
    for package in ("prunekit", "torch", "transformers", "ms-swift"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "stage": stage,
        "input": str(input_path),
        "input_fingerprint": fingerprint(open_checkpoint(input_path)),
        "removed": removed,
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        "metrics": metrics,
        "settings": settings,
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def layer_numbers(checkpoint: Checkpoint, stack: str) -> list[int]:
    """The numbers of a stack's layers, [0, …, n-1]; PruneKitError if config and tensors don't agree."""
    row = checkpoint.family.stacks[stack]
    parts = configs(checkpoint.config, row)
    pattern = re.compile(rf"{row.prefix}(\d{{1,9}})\.")
    found = sorted({int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name))})
    said = parts[0][row.count]
    if len(found) != said or found[-1] != said - 1:
        raise PruneKitError(
            f"{checkpoint.path}: config.json says {row.count} = {said}, the weights hold {stack} layers "
            f"{_ranges(found) or 'none'}; the folder is damaged, copy or download it again"
        )
    return found


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


class Heads(NamedTuple):
    """How many heads of queries, and of keys and values, a layer's attention has, and how wide each is."""

    query: int
    kv: int  # as many as of queries in families without shared KV heads
    dim: int


def heads(checkpoint: Checkpoint) -> Heads:
    """Those of the text stack."""
    family = checkpoint.family
    config = configs(checkpoint.config, family.text)[0]
    count = config[family.heads]
    kv_heads = (family.kv_heads and config.get(family.kv_heads)) or count
    head_dim = (family.head_dim and config.get(family.head_dim)) or family.head_dim_default
    return Heads(count, kv_heads, head_dim or config[family.hidden] // count)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head shares the embedding's weights, by config or else by the family's habit."""
    for part in (checkpoint.config, *configs(checkpoint.config, checkpoint.family.text)):
        if part.get("tie_word_embeddings") is not None:
            return part["tie_word_embeddings"]
    return checkpoint.family.tied_by_default


def statistics(checkpoint_or_path: Checkpoint | str | Path) -> dict[str, Any]:
    """Sizes of a checkpoint, from its headers alone.

    Returns parameters (tied weights counted once), parameters_by_component (text: the layers; vision: the whole tower;
    embedding: token embeddings and output head; other), bytes (of weights), num_hidden_layers, vision_depth (None
    without a vision tower), num_attention_heads, num_key_value_heads, head_dim, neurons (of an MLP, or of each expert),
    and kv_bytes_per_token: 2 (K and V) * layers * KV heads * head_dim * 2 bytes. The last counts bf16/fp16 whatever the weights' dtype, so that stages
    compare; for encoders it is 0.
    """
    checkpoint = (
        checkpoint_or_path if isinstance(checkpoint_or_path, Checkpoint) else open_checkpoint(checkpoint_or_path)
    )
    family = checkpoint.family
    patterns = {
        "vision": family.vision_prefix,
        "text": family.text.prefix + r"\d+\.",
        "embedding": family.embedding,
    }
    parts = dict.fromkeys(("text", "vision", "embedding", "other"), 0)
    tied = re.compile(family.tied) if is_tied(checkpoint) else None
    for name, tensor in checkpoint.tensors.items():
        if BUFFERS.match(name) or (tied and tied.fullmatch(name)):
            continue
        part = next((part for part, pattern in patterns.items() if pattern and re.match(pattern, name)), "other")
        parts[part] += math.prod(tensor.shape)
    layers = len(layer_numbers(checkpoint, "text"))
    of_text = heads(checkpoint)
    config = configs(checkpoint.config, family.text)[0]
    return {
        "parameters": sum(parts.values()),
        "parameters_by_component": parts,
        "bytes": checkpoint.nbytes,
        "num_hidden_layers": layers,
        "vision_depth": len(layer_numbers(checkpoint, "vision")) if family.vision else None,
        "num_attention_heads": of_text.query,
        "num_key_value_heads": of_text.kv,
        "head_dim": of_text.dim,
        "neurons": config.get(family.text.experts or family.text.width) or 4 * config[family.hidden],
        "kv_bytes_per_token": 2 * layers * of_text.kv * of_text.dim * 2 if family.causal else 0,
    }
