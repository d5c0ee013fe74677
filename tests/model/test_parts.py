"""What parts.py says of a loaded layer, against what a plain forward reads there and what the checkpoint holds."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, VISION, load, logits

from prunekit.checkpoint import heads, open_checkpoint
from prunekit.families import FAMILIES as ROWS
from prunekit.families import Spot, spot_of
from prunekit.model.parts import Experts, LayerParts, find_part, place
from prunekit.model.replay import find_stack


def parts_of(folder):
    """(checkpoint, model, its text layers, their parts)"""
    checkpoint, model = open_checkpoint(folder), load(folder)
    layers = getattr(*find_stack(model, checkpoint.family.text))
    return checkpoint, model, layers, [LayerParts(each, checkpoint.family.text, heads(checkpoint)) for each in layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_reads_and_writes_where_parts_says(family, tiny):
    """o reads all query heads side by side; q, k and v are the outputs of their modules that their slices name.

    Linear attention has no such heads; behind each head's query may be a gate.
    """
    checkpoint, model, _, parts = parts_of(tiny(family))
    query, kv, dim = heads(checkpoint)
    gates = query * dim if checkpoint.family.text.gated else 0
    for each in [each for each in parts if each.attends]:
        seen = {}
        hooks = [each.o.module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(o=inputs[0]))]
        for name in "qkv":
            module = getattr(each, name).module
            keep = lambda _, inputs, output, name=name, seen=seen: seen.update({name: (inputs[0], output)})  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
        logits(model)
        for hook in hooks:
            hook.remove()
        assert seen["o"].shape[-1] == query * dim == each.o.inputs().length
        for name, wanted in (("q", query * dim + gates), ("k", kv * dim), ("v", kv * dim)):
            weight, *bias = getattr(each, name).outputs()
            rows = weight.of(weight.parameter).movedim(weight.axis, 0)
            x, output = seen[name]
            written = x @ rows.T + (bias[0].of(bias[0].parameter) if bias else 0)
            assert written.shape[-1] == wanted
            expected = output.narrow(-1, weight.start, wanted)
            torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_what_the_writing_projection_reads(family, tiny):
    """Of experts: their weighted sum through down_proj is what the block writes."""
    _, model, _, parts = parts_of(tiny(family))
    for each in parts:
        down, seen = each.down, {}
        keep = lambda module, inputs, output, seen=seen: seen.update(inputs=inputs, output=output)  # noqa: E731
        with down.module.register_forward_hook(keep):
            logits(model)
        if isinstance(down, Experts):
            _, chosen, weights = seen["inputs"]
            written = torch.zeros_like(seen["output"])
            for expert, tokens, _, x in down.read(seen["inputs"], {}, torch.ones(len(written))):
                share = (weights * (chosen == expert)).sum(-1)[tokens, None]
                written[tokens] += share * (x @ down.module.down_proj[expert].T)
        else:
            written = seen["inputs"][0] @ down.matrix.T + (0 if down.module.bias is None else down.module.bias)
        torch.testing.assert_close(written, seen["output"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_layer_is_in_memory_where_its_name_says(family, tiny):
    checkpoint, model, _, _ = parts_of(tiny(family))
    for row in checkpoint.family.stacks.values():
        layers = [dict(layer.named_parameters()) for layer in getattr(*find_stack(model, row))]
        for name in checkpoint.tensors:
            if within := row.within(name):
                parameter, part = place(layers[within[0]], within[1])
                assert torch.equal(parameter[part], checkpoint.read(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projections_tensors_are_those_of_its_module_or_of_its_experts(family, tiny):
    checkpoint, _, layers, parts = parts_of(tiny(family))
    row = checkpoint.family.text
    for number, each in enumerate(parts):
        for part in (*((each.q, each.k, each.v) if each.attends else ()), each.o, each.down):
            found = row.tensors_of(checkpoint.tensors, number, part.name)
            sizes = sum(checkpoint.read(name).numel() for name in found)
            if isinstance(part, Experts):
                weights = [part.module.down_proj, part.shared and part.shared.mlp.down_proj.weight]
            else:
                weights = [part.module.weight, part.module.bias]
            assert sizes == sum(weight.numel() for weight in weights if weight is not None)


@pytest.mark.parametrize("family", VISION)
def test_vision_blocks_have_projections_too(family, tiny):
    model, row = load(tiny(family)), ROWS[family].vision
    for block in getattr(*find_stack(model, row)):
        assert [find_part(block, row, name).name for name in (row.o, row.mlp[-1])] == [row.o, row.mlp[-1]]


def test_names_say_whose_they_are():
    assert spot_of("mlp.down_proj.weight") == Spot("mlp.down_proj", "weight")
    assert spot_of("mlp.experts.12.up_proj.weight") == Spot("mlp.up_proj", "weight", True, 12)
    assert spot_of("mlp.experts.gate_up_proj") == Spot("mlp.gate_up_proj", "weight", True)
    assert spot_of("attn.c_attn.bias") == Spot("attn.c_attn", "bias")
