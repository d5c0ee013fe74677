"""Checkpoints copied, made by hand, compared, refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from prunekit.checkpoint import open_checkpoint, write_checkpoint
from prunekit.errors import PruneKitError


def copy_whole(source, out, **kwargs):
    write_checkpoint(open_checkpoint(source), out, {"stage": "copy"}, **kwargs)
    return out


def weights(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def refused(folder, message):
    with pytest.raises(PruneKitError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def write_raw(file, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return file


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}
