"""What a teacher says of each token, on the disk: distilling from that needs no teacher in memory.

    python -m prunekit.training.teacher_cache runs/cache

Says what a cache holds; `CACHE=runs/cache bash distil.sh` fills it. That calls this with --teacher and its line for
ms-swift behind `--`: it then refuses a cache of another teacher or of other settings, exit code 2, and answers

    MARK=       a file that is there once the cache was filled with these data sets

Of every token that is to be learnt it keeps the teacher's k likeliest and the mass of all others (`TopK`): 26 bytes at
k = 8 and the 151,936 tokens of Qwen3. A row is known by all that the teacher was shown, token ids, labels and patches
of images (`row_key`): whatever changes it, its text, an image's bytes, template or tokenizer, makes another row of it,
and a row that isn't there is an error, never nonsense. So rows need no numbers, and data sets can share a cache.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunekit.arguments import Parser, split_arguments
from prunekit.checkpoint import fingerprint, open_checkpoint, read_json, write_json
from prunekit.checkpoint.provenance import CACHE_SETTINGS as SETTINGS
from prunekit.checkpoint.provenance import contents, made_from
from prunekit.errors import PruneKitError, run_script
from prunekit.msswift.line import parse

if TYPE_CHECKING:
    from .distillation_loss import TopK

KEY_BYTES = 16
SHARD_TOKENS = 2**20  # written at once: tens of megabytes
FILL_AGAIN = "fill it again: REFILL=1"
FORM = ("max_length", "truncation_strategy", "template", "system", "columns", "split_dataset_ratio", "loss_scale")


@dataclass(frozen=True)
class Settings:
    """How a cache was filled. vocabulary: of the teacher's logits; teacher: its fingerprint."""

    teacher: str
    vocabulary: int
    top_k: int
    temperature: float

    @property
    def index_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def token_bytes(self) -> int:
        return -(-self.top_k * (self.index_bits + 8) // 8)


def row_key(encoded: Mapping[str, Any]) -> bytes:
    """16 bytes by which an encoded row is known: of all that a template made of it for a model, labels included."""
    seen = {name: value for name, value in encoded.items() if name not in ("length", "_extra_kwargs")}
    text = json.dumps(seen, sort_keys=True, default=_array_digest)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _array_digest(value: Any) -> list[Any]:
    """dtype, shape and a hash of a tensor or an array, however deep it lies; of anything else torch's TypeError."""
    import torch

    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    return [str(tensor.dtype), [*tensor.shape], hashlib.blake2b(tensor.flatten().view(torch.uint8).numpy()).hexdigest()]


def pack(top: "TopK", settings: Settings) -> np.ndarray:
    """uint8 (N, token_bytes), of N tokens: k ids, and by fourth roots in 8 bits the probabilities of all but the first
    and of the tail. That of the first is what they leave of 1."""
    ids = top.indices.cpu().numpy().astype(">u4")
    assert ids.shape[1] == settings.top_k
    shares = np.concatenate([top.log_probs[:, 1:].cpu().numpy(), top.log_tail[:, None].cpu().numpy()], 1)
    # No share is 0: of what a teacher holds for impossible reverse KL would be infinite.
    small = np.clip(np.rint(255 * np.exp(shares / 4)), 1, 255).astype(np.uint8)
    bits = np.unpackbits(ids[..., None].view(np.uint8), axis=-1)[..., 32 - settings.index_bits :]
    wide = bits.reshape(len(ids), settings.top_k * settings.index_bits)
    both = np.concatenate([wide, np.unpackbits(small, axis=-1).reshape(len(ids), 8 * settings.top_k)], 1)
    return np.packbits(both, axis=-1)


def unpack(cells: np.ndarray, settings: Settings) -> "TopK":
    """What `pack` packed, on the CPU; its probabilities and the tail are 1 together."""
    import torch

    from .distillation_loss import TopK

    number, wide = settings.top_k, settings.top_k * settings.index_bits
    bits = np.unpackbits(cells, axis=-1).reshape(len(cells), 8 * settings.token_bytes)
    ids = np.zeros((len(cells), number, 32), np.uint8)
    ids[..., 32 - settings.index_bits :] = bits[:, :wide].reshape(len(cells), number, settings.index_bits)
    indices = torch.from_numpy(np.packbits(ids, axis=-1).view(">u4")[..., 0].astype(np.int64))
    roots = np.packbits(bits[:, wide : wide + 8 * number], axis=-1)
    small = torch.from_numpy(roots.astype(np.float32) / 255) ** 4
    others, tail = small[:, :-1], small[:, -1]
    least = others[:, 0] if number > 1 else torch.full_like(tail, 255.0**-4)
    first = (1 - small.sum(-1)).maximum(least)
    shares = torch.cat([first[:, None], others, tail[:, None]], -1)
    logs = (shares / shares.sum(-1, keepdim=True)).log()
    return TopK(indices, logs[:, :-1], logs[:, -1])


def check_settings(folder: Path, wanted: Mapping[str, Any]) -> Settings:
    """A cache's settings. PruneKitError unless it is one, and one of the `wanted` settings."""
    if not (folder / SETTINGS).is_file():
        raise PruneKitError(f"{folder}: no teacher's cache ({SETTINGS}); CACHE={folder} bash distil.sh fills one")
    found = read_json(folder / SETTINGS)
    try:
        settings = Settings(**found)
    except TypeError:
        raise PruneKitError(f"{folder / SETTINGS}: isn't a cache's; remove the folder and fill it again") from None
    for name, value in wanted.items():
        if found[name] != value:
            raise PruneKitError(
                f"{folder}: filled with another {name.replace('_', ' ')} ({found[name]}, not {value}): choose another "
                f"CACHE, or remove it"
            )
    return settings


def _is_new(folder: Path) -> bool:
    """False for a cache, True for what may become one; PruneKitError for what is something else."""
    # Looked at before the settings: another process may be just now beginning this cache.
    used = folder.exists() and (not folder.is_dir() or any(each.suffix != ".new" for each in folder.iterdir()))
    if (folder / SETTINGS).is_file():
        return False
    if used:
        raise PruneKitError(f"{folder}: is in use, and no teacher's cache; choose another CACHE")
    return True


def mark_of(swift: argparse.Namespace, line: list[str]) -> str:
    """The name of a file that says that a cache was filled by such a line, with these data in this form.

    What it doesn't see, an image's bytes or a template that ms-swift registers, is seen when a row is looked up.
    """
    found = made_from(line)
    data = {name: contents(found.get(name)) for name in ("dataset", "val_dataset")}
    form = {name: str(vars(swift).get(name)) for name in FORM}
    return f"filled-{hashlib.sha256(json.dumps([data, form], sort_keys=True).encode()).hexdigest()[:16]}"


class TeacherCache:
    """A folder of shards: `NAME.safetensors` with `keys` (rows, 16), `ends` (rows) into `tokens` (N, token_bytes).

    Shards are written whole or not at all, and never changed; any number of processes may fill a cache at once.
    """

    def __init__(self, folder: Path, settings: Settings | None = None):
        """Open a cache, or with `settings` begin one. PruneKitError if it is another's or if a shard is torn."""
        self.folder = folder
        if settings is not None and _is_new(folder):
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f".{secrets.token_hex(8)}.new"  # of this process: others may begin the same cache
            write_json(draft, asdict(settings))
            draft.replace(folder / SETTINGS)
        self.settings = check_settings(folder, asdict(settings) if settings else {})
        self._places: dict[bytes, tuple[Any, int, int]] = {}
        self._new: dict[bytes, np.ndarray] = {}
        self.tokens = self._waiting = 0  # written, and not yet
        for shard in sorted(folder.glob("*.safetensors")):
            self._read(shard)

    def _read(self, shard: Path) -> None:
        from safetensors import SafetensorError, safe_open

        again = f"remove it, and {FILL_AGAIN}"
        try:
            file = safe_open(shard, "np")
            keys, ends, tokens = file.get_tensor("keys"), file.get_tensor("ends"), file.get_slice("tokens")
            shape = tuple(tokens.get_shape())
        except (SafetensorError, OSError) as error:
            raise PruneKitError(f"{shard}: a torn shard ({error}): {again}") from None
        fits = len(keys) == len(ends) and shape == (int(ends[-1]), self.settings.token_bytes)
        if not fits or (np.diff(ends, prepend=0) < 0).any():
            raise PruneKitError(f"{shard}: isn't of this cache: {again}")
        starts = [0, *ends[:-1].tolist()]
        for key, start, end in zip(keys, starts, ends.tolist(), strict=True):
            self._places[key.tobytes()] = (tokens, start, end)
        self.tokens += shape[0]

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._new

    def add(self, key: bytes, top: "TopK") -> None:
        """Keep what the teacher says of a row; `flush` writes it."""
        if key not in self:
            self._new[key] = pack(top, self.settings)
            self._waiting += len(self._new[key])
            if self._waiting >= SHARD_TOKENS:
                self.flush()

    def flush(self) -> None:
        """Write what was added to a shard of its own, synced to the disk."""
        if not self._new:
            return
        from safetensors.numpy import save_file

        cells = list(self._new.values())
        shard = {
            "keys": np.frombuffer(b"".join(self._new), np.uint8).reshape(-1, KEY_BYTES),
            "ends": np.cumsum([len(each) for each in cells]),
            "tokens": np.concatenate(cells),
        }
        name = secrets.token_hex(8)
        partial = self.folder / f".{name}.new"
        try:
            save_file(shard, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.folder / f"{name}.safetensors")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._new, self._waiting = {}, 0
        self._read(self.folder / f"{name}.safetensors")

    def look_up(self, keys: Iterable[bytes], rows: Iterable[str] = ()) -> "TopK":
        """All tokens of these rows, one row behind the other. PruneKitError for one that isn't there.

        rows: what to call them in an error; not looked at before there is one.
        """
        cells = []
        for number, key in enumerate(keys):
            if key not in self._places:
                name = next(islice(rows, number, None), f"row {key.hex()}")
                raise PruneKitError(
                    f"{self.folder}: has no {name} as it is now: the row, an image, the template, the tokenizer or "
                    f"--max_length is another than when it was filled: put that back, or {FILL_AGAIN}"
                )
            tokens, start, end = self._places[key]
            cells.append(tokens[start:end])
        return unpack(np.concatenate(cells), self.settings)


def main() -> None:
    own, line = split_arguments()
    parser = Parser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--teacher", type=Path)
    args = parser.parse_args(own)
    if args.teacher:
        swift = parse("rlhf", line)
        if not _is_new(args.cache):
            teacher = fingerprint(open_checkpoint(args.teacher))
            found = {"teacher": teacher, "top_k": swift.gkd_logits_topk, "temperature": swift.temperature}
            check_settings(args.cache, found)
        print(f"MARK={args.cache / mark_of(swift, line)}")
        return
    cache = TeacherCache(args.cache)
    size = sum(shard.stat().st_size for shard in args.cache.glob("*.safetensors"))
    print(
        f"{len(cache):,} rows, {cache.tokens:,} tokens of {cache.settings.token_bytes} bytes, {size / 1e6:,.1f} MB; "
        f"top {cache.settings.top_k} at temperature {cache.settings.temperature:g}"
    )


if __name__ == "__main__":
    run_script(main)
