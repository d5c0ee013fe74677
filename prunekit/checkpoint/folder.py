"""Hugging Face folders, opened: config, shards and index, checked before they are counted on; their fingerprints."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError
from prunekit.families import check_config, say_counts

from .agreement import check_agreement, is_tied
from .format import Checkpoint, Tensor, named, read_header, read_json
from .quantised import BITMASK, check_quantisation, quantisation

INDEX = "model.safetensors.index.json"

SAMPLES, SAMPLE_BYTES = 4, 2**12  # what a fingerprint reads of a tensor


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


def open_checkpoint(path: str | Path, quantised: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, sharded or not, with or without an index. Reads headers, no weights.

    A name like `org/model` that is no folder is looked up in the local hub cache; nothing is downloaded.
    Raises PruneKitError for everything that can't be cut safely: damaged or missing shards, an index that doesn't
    fit them, pickles, adapters, and quantised weights, unless `quantised`: who asks for these only looks at them.
    """
    path = _from_hub_cache(path) if not named(path).exists() else Path(path)
    if (path / "adapter_config.json").exists():
        raise PruneKitError(f"{path}: a LoRA adapter, not a checkpoint; merge it first with export_lora.sh")
    config = read_config(path)
    if (found := quantisation(config)) is not None:
        if found.get("quant_method") == BITMASK:
            raise PruneKitError(f"{path}: is packed; unpack it: python -m prunekit.packed unpack {path} --out OUT")
        if not quantised:
            raise PruneKitError(f"{path}: quantised weights can't be cut; start from the unquantised checkpoint")
        check_quantisation(config)
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
    if absent := [(name, shard) for name, shard in (weight_map or {}).items() if name not in tensors]:
        raise PruneKitError(f"{path / INDEX}: names {absent[0][0]}, which {absent[0][1]} doesn't hold")
    checkpoint = Checkpoint(path, config, tensors)
    check_agreement(checkpoint)
    _check_tied(checkpoint)
    return checkpoint


def _check_tied(checkpoint: Checkpoint) -> None:
    """PruneKitError for a saved head that differs from the embedding that the config ties it to.

    transformers takes what is saved (modeling_utils.py, tie_weights), vLLM the embedding.
    """
    family = checkpoint.family
    if not (family.causal and is_tied(checkpoint)):
        return
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if re.fullmatch(family.vocabulary, name)}
    heads = {name for name in tensors if re.fullmatch(family.tied, name)}
    for head, embedding in itertools.product(heads, tensors.keys() - heads):
        one, other = tensors[head], tensors[embedding]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            continue
        with one.file.open("rb") as file, other.file.open("rb") as another:
            same = _samples(one, file.fileno()) == _samples(other, another.fileno())
        if not same:
            raise PruneKitError(
                f"{checkpoint.path}: config.json ties {head} to {embedding}, the weights hold another, which only "
                'transformers would use: set "tie_word_embeddings": false there'
            )


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, checked as far as that can be without its tensors (`families.check_config`)."""
    if not (folder / "config.json").is_file():
        raise PruneKitError(f"{folder}: no config.json here; give a Hugging Face checkpoint folder")
    config = read_json(folder / "config.json")
    try:
        if isinstance(config, dict):
            say_counts(config)
        check_config(config)
    except PruneKitError as error:
        raise PruneKitError(f"{folder / 'config.json'}: {error}") from None
    return config


def _from_hub_cache(name: str | Path) -> Path:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            return Path(snapshot_download(str(name), local_files_only=True))
        raise PruneKitError(f"{name}: no such folder, and not in the hub cache; fetch it: hf download {name}")
    raise PruneKitError(f"{name}: no such folder")


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
                files[tensor.file] = stack.enter_context(tensor.file.open("rb")).fileno()
            for sample in _samples(tensor, files[tensor.file]):
                digest.update(sample)
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor, file: int) -> list[bytes]:
    """Of a tensor's bytes in an open file: all of a small one, SAMPLES blocks of a larger one, evenly spread."""
    starts, length = [0], tensor.nbytes
    if length > SAMPLES * SAMPLE_BYTES:
        last, length = tensor.nbytes - SAMPLE_BYTES, SAMPLE_BYTES
        starts = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return [os.pread(file, length, tensor.start + start) for start in starts]
