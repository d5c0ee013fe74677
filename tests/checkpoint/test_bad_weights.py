"""Damaged weights are refused by what reads them."""

import json
import struct

import pytest
from helpers.bad_input import BAD, DELETED, RAW, changed, link, put, words

from prunekit.checkpoint import INDEX


def header(entries, length=None, data=b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py", "sparsify.py"])
def test_a_damaged_header_is_refused(name, linked, tries):
    folder = linked("llama")
    whole = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    entries = json.loads(whole[8 : 8 + size])
    data = whole[8 + size :]
    tensor = "model.norm.weight"
    damaged = [content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content for content in RAW]
    damaged += [header(content) for content in damaged]
    damaged += [header(entries, length, data) for length in (0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1)]
    damaged += [whole[:keep] for keep in (0, 7, 8, size, size + 8, len(whole) - 1)] + [whole + b"\0"]
    for key in ("dtype", "shape", "data_offsets"):
        for value in (
            *BAD,
            DELETED,
            [10**18] * 2,
            [2**31] * 30,
            [0, -1],
            [9, 3],
            ["0", "128"],
            [10**4200] * 1000,
        ):
            damaged.append(header(changed(entries, (tensor, key), value), data=data))
    damaged.append(header(changed(entries, (tensor,), entries["model.layers.0.input_layernorm.weight"]), data=data))
    damaged.append(header(json.dumps(entries).replace(tensor, "lm_head.weight", 1)[:-1].encode()
                          + b', "lm_head.weight": {}}', data=data))  # fmt: skip
    damaged.append(header(json.dumps(entries).replace("[32]", f"[{'9' * 5000}]", 1).encode(), data=data))
    for content in damaged:
        put(folder / "model.safetensors", content)
        tries.refused(content[:60], name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py"])
def test_a_damaged_index_is_refused(name, tiny, tmp_path, tries):
    folder = link(tiny("llama", max_shard_size="20KB"), tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    (tmp_path / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    for content in RAW:
        put(folder / INDEX, content)
        tries.refused(content[:20], name, *words(name, folder))
    outside = ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "x" * 300 + ".safetensors",
               "gone.safetensors", "\ud800.safetensors", "a\0.safetensors", "a\n.safetensors"]  # fmt: skip
    for value in (*BAD, *outside, DELETED):
        put(folder / INDEX, changed(index, ("weight_map", "model.norm.weight"), value))
        tries.refused(value, name, *words(name, folder))
        put(folder / INDEX, changed(index, ("weight_map",), value))
        tries.refused(("map", value), name, *words(name, folder))
    put(folder / INDEX, index)
    (folder / shard).unlink()
    tries.refused("a missing shard", name, *words(name, folder))
    tries.check()
