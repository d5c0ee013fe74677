"""Scores of weights by data: norms of inputs, gradients; what they don't reach is refused."""

import pytest
import torch
from helpers.calibration import PADDED, padded_batch, picture_batches
from helpers.tiny_models import load

from prunekit.checkpoint import open_checkpoint
from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.surgery import zeros_scores as weight_scores
from prunekit.surgery.zeros_weights import choose_weights

DECODERS = ["llama", "qwen3_moe", "gemma3_text", "gpt2"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert"])
def test_wanda_is_weight_times_norm_of_its_input_without_padding(family, tiny):
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    weights = choose_weights(checkpoint)
    seen = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in weights:
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    norms = weight_scores.input_norms(checkpoint, model, PADDED, weights)
    masks = [PADDED.fit[0]["attention_mask"].bool(), PADDED.held_out[0]["attention_mask"].bool()]
    for name in weights:
        rows = torch.cat([x[m] for x, m in zip(seen[name.removesuffix(".weight")], masks)])
        assert torch.allclose(norms[name], rows.norm(dim=0), rtol=1e-4), name


def test_experts_norms_are_over_the_tokens_routed_to_them(tiny):
    checkpoint, model = open_checkpoint(tiny("qwen3_moe")), load(tiny("qwen3_moe"))
    weights = choose_weights(checkpoint, "experts")
    mlp, read = model.model.layers[3].mlp, {}
    mlp.experts.register_forward_pre_hook(lambda _, inputs: read.setdefault("all", []).append(inputs))
    data = Calibration([padded_batch()], [], 24)
    norms = weight_scores.input_norms(checkpoint, model, data, weights)
    states, chosen = read["all"][0][0], read["all"][0][1]
    for number in range(4):
        mine = states[(chosen == number).any(-1)]
        gate, up = (mine @ mlp.experts.gate_up_proj[number].T).chunk(2, -1)
        hidden = mlp.experts.act_fn(gate) * up
        prefix = f"model.layers.3.mlp.experts.{number}"
        assert torch.allclose(norms[f"{prefix}.gate_proj.weight"], mine.norm(dim=0), rtol=1e-4)
        assert torch.allclose(norms[f"{prefix}.down_proj.weight"], hidden.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_norms_are_those_of_the_next_tokens_loss(family, tiny):
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    weights = choose_weights(checkpoint, r"\.3\.")
    data = Calibration([padded_batch()], [], 24)
    norms = weight_scores.gradient_norms(checkpoint, model, data, weights)
    model.requires_grad_(True)
    model(**{key: data.fit[0][key] for key in ("input_ids", "attention_mask", "labels")}).loss.backward()
    found = dict(model.named_parameters())
    for name in weights:
        if ".experts." not in name:
            assert torch.allclose(norms[name], found[name].grad.abs(), rtol=1e-3, atol=1e-6), name
        elif "gate_proj" in name:
            number = int(name.split(".experts.")[1][0])
            expected = found["model.layers.3.mlp.experts.gate_up_proj"].grad[number, :16].abs()
            assert torch.allclose(norms[name], expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("score", ["wanda", "gradient"])
def test_weights_that_the_data_do_not_reach_are_refused(score, tiny):
    checkpoint, model = open_checkpoint(tiny("qwen3_vl")), load(tiny("qwen3_vl"))
    with pytest.raises(PruneKitError, match="model.visual.blocks.*leave it out with --modules"):
        weight_scores.SCORES_OF[score](checkpoint, model, PADDED, choose_weights(checkpoint))


def test_gradients_of_an_encoder_are_refused(tiny):
    checkpoint = open_checkpoint(tiny("bert"))
    with pytest.raises(PruneKitError, match="causal language model's loss, which bert has not"):
        weight_scores.gradient(checkpoint, None, PADDED, choose_weights(checkpoint))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_output_gradients_and_magnitudes_are_those_of_the_layers_outputs(family, tiny):
    """Against hidden_states of transformers itself, on two rows, of which one is padded."""
    checkpoint, model = open_checkpoint(tiny(family)), load(tiny(family))
    batch = padded_batch()
    data, weights = Calibration([batch], [], 24), choose_weights(checkpoint)
    found = {kind: weight_scores.IMPORTANCE[kind](checkpoint, model, data, weights)
             for kind in ("output-gradient", "magnitude")}  # fmt: skip
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(True)
    output = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, output_hidden_states=True)
    for states in output.hidden_states:
        states.retain_grad()
    counted = int((batch["labels"][:, 1:] != -100).sum())
    (output.loss * counted).backward()
    mask = batch["attention_mask"].bool()
    for layer, states in enumerate(output.hidden_states[1:-1]):  # the last is normed
        assert found["magnitude"]["text", layer] == pytest.approx(float(states[mask].abs().mean()), rel=1e-4)
        wanted = float(states.grad[mask].abs().mean())
        assert found["output-gradient"]["text", layer] == pytest.approx(wanted, rel=1e-3)


def test_output_gradients_reach_the_vision_tower_where_images_are_among_the_rows(tiny):
    checkpoint, model = open_checkpoint(tiny("qwen3_vl")), load(tiny("qwen3_vl"))
    data, weights = Calibration(picture_batches(1, 0), [], 44), choose_weights(checkpoint)
    found = weight_scores.output_gradient_importance(checkpoint, model, data, weights)
    assert set(found) == {(stack, n) for stack, count in (("text", 5), ("vision", 6)) for n in range(count)}
    assert min(found.values()) > 0
