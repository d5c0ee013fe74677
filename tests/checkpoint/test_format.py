"""Headers and tensors: read as safetensors reads them, or refused."""

import struct

import numpy as np
import pytest
import torch
from helpers.anything import JSON, QUICK
from helpers.checkpoints import entry, weights, write_raw
from helpers.tiny_models import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import MAX_HEADER, TORCH_DTYPES, Checkpoint, float_bytes, open_checkpoint, read_header
from prunekit.errors import PruneKitError


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_read_as_safetensors_reads_them(family, tiny):
    checkpoint, expected = open_checkpoint(tiny(family)), weights(tiny(family))
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
)
def test_every_dtype_is_read(dtype, tmp_path):
    tensors = {"a": torch.arange(6).to(getattr(torch, dtype)).view(2, 3), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, {}, read_header(tmp_path / "model.safetensors"))
    read = checkpoint.read("a")
    assert read.dtype == tensors["a"].dtype and torch.equal(read.double(), tensors["a"].double())
    assert checkpoint.read("none").shape == (0, 3)


@QUICK
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
)
def test_floats_are_rounded_as_torch_rounds_them(bits, dtype):
    values = np.array(bits, "u4").view("f4")
    expected = torch.from_numpy(values).to(getattr(torch, TORCH_DTYPES[dtype]))
    try:
        got = torch.frombuffer(bytearray(float_bytes(values, dtype)), dtype=expected.dtype)
    except PruneKitError:
        assert (expected.isinf() & torch.from_numpy(np.isfinite(values))).any()
        return
    assert torch.equal(got.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)) and torch.equal(
        got.isnan(), expected.isnan()
    )


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": entry(0, 6), "b": entry(4, 8)}, "overlap before b"),
        ({"a": entry(0, 2), "b": entry(4, 8)}, "leave a gap before b"),
        ({"a": entry(2, 8)}, "leave a gap before a"),
        ({"a": entry(0, 9)}, "cut short"),
        ({"a": entry(0, 7)}, "too long"),
        ({"a": entry(0, 8, [3])}, "a has 8 bytes where its shape"),
        ({"a": entry(0, 8, [2**62, 2**62])}, "a has 8 bytes"),
        ({"a": entry(0, 8, [-8])}, "bad shape"),
        ({"a": entry(0, 8, [True, 8])}, "bad shape"),
        ({"a": entry(8, 0, [0])}, "a has -8 bytes"),
        ({"a": entry(0, 8, dtype="F4")}, "dtype 'F4'"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "no 'data_offsets'"),
        ({"a": 3}, "not a readable"),
        ([], "not a readable"),
        (b"{" + b'"a":' * 9, "not a readable"),
        (b'{"a":1,"a":2}', "a name occurs twice"),
        (b"[" * 100_000, "not a readable"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(header, message, tmp_path):
    with pytest.raises(PruneKitError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(100))
    with pytest.raises(PruneKitError, match="no safetensors header"):
        read_header(tmp_path / "x.safetensors")


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@QUICK
@given(header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4) | JSON, data=st.binary(max_size=40))
def test_any_header_is_read_as_safetensors_would_or_refused(header, data, tmp_path):
    file = write_raw(tmp_path / "x.safetensors", header, data)
    try:
        tensors = read_header(file)
    except PruneKitError:
        return
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: list(value.shape) for name, value in load_file(file).items()
    }


@QUICK
@given(place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_flipped_byte_in_a_header_never_crashes(place, byte, tiny, tmp_path):
    content = bytearray((tiny("llama") / "model.safetensors").read_bytes())
    content[place] = byte
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        tensors = read_header(tmp_path / "x.safetensors")
    except PruneKitError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
