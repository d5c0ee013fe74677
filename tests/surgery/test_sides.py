"""The engine of all refits: what least squares find, what counts how much, and that only what helps is kept."""

import pytest
import torch
from helpers.calibration import data, picture_batches, text_batches
from helpers.llama_sides import sides_of
from helpers.tiny_models import build, load

from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.model.replay import find_stack
from prunekit.surgery import sides as sides_module
from prunekit.surgery.sides import UNLABELLED, LeastSquares, Projection, Sides, reached, states_between


def test_least_squares_find_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 5, generator=generator)
    fit = LeastSquares()
    for _ in range(4):
        x = torch.randn(20, 5, generator=generator)
        fit.add(x, x @ truth.T, torch.rand(20, generator=generator) + 0.1)
    torch.testing.assert_close(fit.solve(1e-7), truth, atol=1e-4, rtol=0)


def test_the_share_that_is_left_is_that_of_the_residuals():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    weight, solution = torch.rand(50, generator=generator), torch.randn(3, 4, generator=generator)
    fit = LeastSquares()
    fit.add(x, y, weight)
    residual = ((y - x @ solution.T).square().sum(1) * weight).sum() / (y.square().sum(1) * weight).sum()
    assert fit.left(solution) == pytest.approx(float(residual), rel=1e-4)


def test_the_ridge_draws_as_much_in_whatever_unit_inputs_are():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    found = []
    for unit in (1.0, 100.0):
        fit = LeastSquares()
        fit.add(x * unit, y, torch.ones(50))
        found.append(fit.solve(0.3) * unit)
    exact = torch.linalg.solve(x.T @ x + 0.3 * (x.square().sum(0).mean()) * torch.eye(4), x.T @ y).T
    torch.testing.assert_close(found[0], exact, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "mlp.c_proj"), ("llama", "self_attn.o_proj")])
@torch.no_grad()
def test_a_projection_writes_what_its_weights_make_of_its_features(family, name):
    layer = getattr(*find_stack(build(family), ROWS[family].text))[1]
    projection = Projection(layer, ROWS[family].text, name)
    x = torch.randn(2, 3, projection.module.weight.shape[0 if projection.inputs_first else 1])
    weights = projection.module.weight if projection.inputs_first else projection.module.weight.T
    if projection.bias:
        weights = torch.cat([weights, projection.module.bias[None]])
    written = projection.features(x, None) @ weights
    torch.testing.assert_close(written, projection.module(x).flatten(0, 1))


@torch.no_grad()
def test_the_state_behind_attention_is_what_came_in_and_what_attention_writes(tiny):
    model = load(tiny("llama"))
    layer, written, came = model.model.layers[2], [], []
    layer.self_attn.register_forward_hook(lambda *call: written.append(call[2][0]))
    layer.register_forward_pre_hook(lambda _, inputs: came.append(inputs[0]))
    with states_between(layer, ROWS["llama"].text) as states:
        model(**text_batches(1)[0])
    torch.testing.assert_close(states, [came[0] + written[0]])


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_tokens_count_by_what_they_predict_and_all_states_alike(stack):
    """One over the square of its wanted state; of text in part where no label is predicted, nothing for padding."""
    sides, state = object.__new__(Sides), torch.randn(2, 5, 3)
    sides.stack = stack
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 5, 6, -100, -100]])
    sides.batches = [
        {},
        {"labels": labels, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])},
    ]
    counts = torch.tensor([[UNLABELLED, 1, 1, 1, UNLABELLED], [1, 1, UNLABELLED, 0, 0]])
    if stack == "vision":
        counts = torch.ones(2, 5)
    wanted = [float(c / s.square().sum()) for c, s in zip(counts.flatten(), state.flatten(0, 1))]
    assert sides.weight(1, state).tolist() == pytest.approx(wanted, rel=1e-5)
    assert UNLABELLED == 0.1


def fit_of_layer_before(tiny, calibration):
    """The fit of o_proj before a seam of llama."""
    sides = sides_of(load(tiny("llama")), tiny("llama"), calibration, [2])
    return sides.fit(1, (sides.row.o,), sides.targets(1))


@torch.inference_mode()
def test_the_ridge_is_the_one_that_leaves_least_on_the_rows_that_judge(tiny, monkeypatch):
    calibration, alone = data(), {}
    for ridge in (0.01, 1.0, 100.0):
        monkeypatch.setattr(sides_module, "RIDGES", (ridge,))
        alone[ridge] = fit_of_layer_before(tiny, calibration)
    monkeypatch.setattr(sides_module, "RIDGES", tuple(alone))
    chosen = fit_of_layer_before(tiny, calibration)
    best = min(alone, key=lambda ridge: alone[ridge].left)
    assert (chosen.ridge, chosen.left) == (best, alone[best].left)
    assert torch.equal(chosen.solution, alone[best].solution)
    assert len({fit.left for fit in alone.values()}) == 3


@torch.inference_mode()
def test_what_is_fitted_knows_nothing_of_the_rows_that_judge(tiny, monkeypatch):
    monkeypatch.setattr(sides_module, "RIDGES", (1.0,))
    one, other = (
        fit_of_layer_before(tiny, Calibration(text_batches(3), text_batches(2, seed=seed), 1)) for seed in (1, 2)
    )
    assert torch.equal(one.solution, other.solution)
    assert one.before != other.before and one.left != other.left


@torch.inference_mode()
def test_a_fit_that_leaves_more_than_there_was_is_not_applied(tiny, monkeypatch):
    model = load(tiny("llama"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sides = sides_of(model, tiny("llama"), data(), [2])
    monkeypatch.setattr(LeastSquares, "left", lambda self, solution: 1.5)
    refit = sides.refit(1, sides.targets(1))
    assert (refit.changes, refit.undo, refit.jump_left) == ([], [], 1.0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@torch.inference_mode()
def test_of_a_jump_is_left_what_the_last_fit_leaves_of_what_the_first_found(tiny, monkeypatch):
    fits, fit = [], Sides.fit
    monkeypatch.setattr(Sides, "fit", lambda *arguments: fits.append(fit(*arguments)) or fits[-1])
    sides = sides_of(load(tiny("llama")), tiny("llama"), data(), [2])
    refit = sides.refit(1, sides.targets(1))
    assert len(fits) == 2 and fits[1].before < 0.99 * fits[0].before
    assert refit.jump_left == pytest.approx(min(fits[1].left, fits[1].before) / fits[0].before)


def test_stacked_experts_are_changed_alike_in_both_orientations():
    layer = build("qwen3_moe").model.layers[3]
    projection = Projection(layer, ROWS["qwen3_moe"].text, "mlp.down_proj")
    value = torch.randn(4, 32, 16)
    solution = torch.randn(32, 32)
    changed = projection.changed("mlp.experts.down_proj", value, solution)
    turned = projection.changed("mlp.experts.down_proj", value.transpose(1, 2), solution)
    torch.testing.assert_close(changed, turned.transpose(1, 2))
    torch.testing.assert_close(changed[2], projection.changed("mlp.experts.2.down_proj.weight", value[2], solution))


def test_texts_among_the_rows_neither_fit_nor_judge_a_vision_tower(tiny):
    model, family = load(tiny("qwen3_vl")), ROWS["qwen3_vl"]
    pictures, texts = picture_batches(5, seed=0), text_batches(3)
    fit, held_out = [texts[0], pictures[0], texts[1], *pictures[1:3]], [pictures[3], texts[2], pictures[4]]
    batches, judged, calls = reached(model, family, "vision", fit, held_out)
    assert [id(batch) for batch in batches] == [id(picture) for picture in pictures]
    assert judged == range(3, 5) and len(calls) == 5
    sides = Sides(model, family, "vision", batches, judged, calls)
    assert len(sides.teacher.states) == len(sides.student.states) == 5


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_must_be_among_the_rows_that_fit_and_among_those_that_judge(which, tiny):
    parts = [picture_batches(2, seed=0), picture_batches(2, seed=1)]
    parts[which] = text_batches(2)
    with pytest.raises(PruneKitError, match="too few calibration rows reach the vision layers"):
        reached(load(tiny("qwen3_vl")), ROWS["qwen3_vl"], "vision", *parts)
