"""Quantised folders: looked at, counted as what they stand for, never taken for what can be cut."""

import json

import pytest
from helpers.quantised import write_fp8

from prunekit.checkpoint import open_checkpoint, quantisation, statistics, weights_of
from prunekit.checkpoint.format import Outline, Shape
from prunekit.errors import PruneKitError
from prunekit.inspect import describe

PACKED = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}, "quant_method": "compressed-tensors"}


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "qwen3_moe"])
def test_numbers_are_those_of_the_source_and_bytes_those_on_disk(family, tiny, tmp_path):
    out = write_fp8(tiny(family), tmp_path / "out")
    found, source = (statistics(open_checkpoint(folder, quantised=True)) for folder in (out, tiny(family)))
    assert found | {"bytes": 0} == source | {"bytes": 0}
    assert found["bytes"] < source["bytes"]
    assert describe(found, [])


def test_only_who_asks_for_quantised_weights_gets_them(tiny, tmp_path):
    out = write_fp8(tiny("llama"), tmp_path / "out")
    with pytest.raises(PruneKitError, match="quantised weights can't be cut"):
        open_checkpoint(out)


def test_a_config_that_says_other_shapes_is_refused(tiny, tmp_path):
    out = write_fp8(tiny("llama"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with pytest.raises(PruneKitError, match="by config.json .num_key_value_heads"):
        open_checkpoint(out, quantised=True)


@pytest.mark.parametrize("config", [{"bits": 4}, {"quant_method": "exotic"}, "x", [1]], ids=str)
def test_what_we_cannot_count_is_refused(config, own):
    folder = own("llama")
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"quantization_config": config}))
    with pytest.raises(PruneKitError, match="weights quantised by .* aren't read; those of compressed-tensors"):
        open_checkpoint(folder, quantised=True)


def outline(config, **tensors):
    shapes = {name.replace("__", "."): Shape(*tensor) for name, tensor in tensors.items()}
    return Outline("x", {"quantization_config": config}, shapes)


def test_packed_weights_have_the_shape_that_they_unpack_to():
    given = {"a__weight_packed": ("I32", (6, 4)), "a__weight_scale": ("BF16", (6, 1)), "a__weight_shape": ("I64", (2,))}
    assert weights_of(outline(PACKED, **given, b__weight=("BF16", (3,)))) == {
        "a.weight": Shape("I32", (6, 32)), "b.weight": Shape("BF16", (3,)),
    }  # fmt: skip


def test_numbers_of_packed_weights_are_those_of_the_source(tiny):
    source = open_checkpoint(tiny("qwen3"))
    packed = {
        name.replace("_proj.weight", "_proj.weight_packed"): Shape("I32", (tensor.shape[0], tensor.shape[1] // 8))
        if name.endswith("_proj.weight") else tensor
        for name, tensor in source.shapes().items()
    }  # fmt: skip
    found = statistics(Outline("x", source.config | {"quantization_config": PACKED}, packed))
    assert found | {"bytes": 0} == statistics(source) | {"bytes": 0}


def test_packed_weights_of_no_known_width_are_refused():
    for config in ({}, {"config_groups": {"a": {"weights": {"num_bits": 3}}}}):
        with pytest.raises(PruneKitError, match="of how many bits"):
            weights_of(outline(config | {"quant_method": "compressed-tensors"}, a__weight_packed=("I32", (6, 4))))


def test_four_bits_of_bitsandbytes_are_two_weights_a_byte_without_rows():
    given = {
        "a__weight": ("U8", (12, 1)), "a__weight__absmax": ("U8", (1,)), "a__weight__quant_map": ("F32", (16,)),
        "a__weight__quant_state__bitsandbytes__nf4": ("U8", (80,)),
    }  # fmt: skip
    assert weights_of(outline({"quant_method": "bitsandbytes"}, **given)) == {"a.weight": Shape("U8", (24,))}


def test_what_is_said_of_the_text_part_counts_too():
    assert quantisation({"text_config": {"quantization_config": {"quant_method": "fp8"}}}) == {"quant_method": "fp8"}
    assert quantisation({"text_config": {}}) is None
