"""Fewer experts: what is dropped is as if the router couldn't choose it, refits help, and bad numbers are refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as hf
from helpers.calibration import data
from helpers.tiny_models import FAMILIES, load, logits, tensors_of, text_config
from safetensors.torch import save_file
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from prunekit.checkpoint import history, open_checkpoint, scratch_folder, statistics
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.model.load import load_model
from prunekit.model.offload import on_disk
from prunekit.model.parts import Experts, find_part
from prunekit.model.replay import find_stack, in_memory
from prunekit.model.scores import score_batches
from prunekit.surgery import experts_fit
from prunekit.surgery.cut import write_cut
from prunekit.surgery.experts import drop, plan_experts
from prunekit.surgery.experts_fit import Tokens, eliminate, fit_experts, missed, order_experts, refit, saliency, written
from prunekit.surgery.in_memory import without_experts

MIXTURES = [family for family in FAMILIES if ROWS[family].text.experts]


def fit(folder, experts=3, calibration=None, **how):
    plan = plan_experts(open_checkpoint(folder), experts)
    return fit_experts(plan, load(folder), calibration or data(), quiet=True, **how)


def mixtures(model, family):
    row = ROWS[family].text
    for number, layer in enumerate(getattr(*find_stack(model, row))):
        if isinstance(part := find_part(layer, row, row.mlp[-1]), Experts):
            yield number, part


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_without_experts_gives_what_it_gives_when_its_router_cannot_choose_them(family, tiny, tmp_path):
    cut = fit(tiny(family), score="random", refitted=False)
    write_cut(cut, tmp_path / "out")
    assert statistics(tmp_path / "out") == statistics(cut.plan.outline)
    numbers = [statistics(folder)["num_experts"] for folder in (tiny(family), tmp_path / "out")]
    assert numbers == [cut.plan.present, 3]
    whole, left = load(tiny(family)), load(tmp_path / "out")
    assert text_config(left).num_experts == 3
    before = logits(whole)
    gone = {layer: [e for e in range(cut.plan.present) if e not in kept] for layer, kept in cut.kept.items()}
    with without_experts(whole, ROWS[family].text, gone):
        torch.testing.assert_close(logits(left), logits(whole), atol=1e-5, rtol=0)
    assert torch.equal(before, logits(whole)), "it is as it was"


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_written_has_the_held_out_loss_that_was_measured(family, tiny, tmp_path):
    calibration = data(fit=4, held_out=1)
    cut = fit(tiny(family), calibration=calibration)
    entry = write_cut(cut, tmp_path / "out")
    loss = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert loss == pytest.approx(cut.metrics["held_out_loss"], rel=1e-5)
    assert entry["removed"] == {"experts": cut.plan.present - 3}
    assert [len(gone) for gone in entry["experts_removed"].values()] == [cut.plan.present - 3] * len(cut.plan.layers)
    changed = [name for name, tensor in cut.result.tensors.items() if tensor.compute]
    assert changed and all(
        re.search(r"\.(?:mlp|block_sparse_moe)\.(?:gate|experts|shared_expert)\.", name) for name in changed
    )


def test_tensors_of_experts_that_stay_are_their_own_bytes_under_new_numbers(tiny, tmp_path):
    cut = fit(tiny("qwen3_moe"), score="random", refitted=False)
    write_cut(cut, tmp_path / "out")
    before, after = tensors_of(tiny("qwen3_moe")), tensors_of(tmp_path / "out")
    for number, kept in cut.kept.items():
        for new, old in enumerate(kept):
            name = f"model.layers.{number}.mlp.experts.{{}}.up_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
        assert f"model.layers.{number}.mlp.experts.3.up_proj.weight" not in after


def test_stacked_tensors_that_are_not_turned_are_cut_and_refitted_the_same(tiny, own):
    """Some releases wrote (experts, hidden, neurons), some (experts, neurons, hidden)."""
    plan = plan_experts(open_checkpoint(tiny("qwen3_vl_moe")), 3)
    (layer,) = plan.layers
    model = load(tiny("qwen3_vl_moe"))
    _, experts = next(mixtures(model, "qwen3_vl_moe"))
    experts_fit.keep(experts, [0, 1, 3])
    values = experts_fit._values(plan, layer, experts, [0, 1, 3], in_memory)
    (name,) = (name for name in values if name.endswith("down_proj"))
    assert torch.equal(values[name], plan.source.read(name)[[0, 1, 3]])
    folder = own("qwen3_vl_moe")
    tensors = tensors_of(folder)
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    turned = plan_experts(open_checkpoint(folder), 3)
    value = experts_fit._values(turned, layer, experts, [0, 1, 3], in_memory)[name]
    assert torch.equal(value, tensors[name][[0, 1, 3]])


def test_layers_on_disk_give_what_layers_in_memory_give(tiny, tmp_path):
    checkpoint, calibration = open_checkpoint(tiny("mixtral")), data(fit=3, held_out=1)
    plan, cuts = plan_experts(checkpoint, 3), {}
    for way in ("memory", "disk"):
        with scratch_folder(tmp_path / way) as scratch:
            offload, store = (scratch, on_disk(scratch)) if way == "disk" else (None, in_memory)
            model = load_model(checkpoint, "cpu", "float32", offload)
            cuts[way] = fit_experts(plan, model, calibration, store=store, quiet=True)
        write_cut(cuts[way], tmp_path / way)
    layers = getattr(*find_stack(model, ROWS["mixtral"].text))
    assert {parameter.device.type for parameter in layers.parameters()} == {"meta"}
    assert cuts["disk"].kept == cuts["memory"].kept
    assert cuts["disk"].metrics == pytest.approx(cuts["memory"].metrics, rel=1e-6)
    torch.testing.assert_close(logits(load(tmp_path / "disk")), logits(load(tmp_path / "memory")), atol=1e-5, rtol=0)


# --- which experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [True, False])
def test_the_expert_that_goes_is_the_one_without_which_the_mixture_errs_least(normed):
    """Against all mixtures that lack one, each computed by hand; and again with one less."""
    generator = torch.Generator().manual_seed(3)
    scores, outputs = torch.randn(50, 6, generator=generator), torch.randn(6, 50, 4, generator=generator)
    wanted, weight = torch.randn(50, 4, generator=generator), torch.rand(50, generator=generator)

    def error(left):
        top, chosen = scores[:, left].softmax(1).topk(2, 1)
        top = top / top.sum(1, keepdim=True) if normed else top
        y = (top[..., None] * outputs[left][chosen, torch.arange(50)[:, None]]).sum(1)
        return float(weight @ (wanted - y).square().sum(1))

    left = list(range(6))
    for number in (5, 4, 3):
        left = min(([e for e in left if e != gone] for gone in left), key=error)
        assert [e for e in range(6) if e not in eliminate(scores, outputs, wanted, weight, number, 2, normed)] == left


def test_the_order_in_which_experts_go_is_what_a_cut_of_that_mixture_alone_drops_and_leaves_the_model(tiny):
    plan, model = plan_experts(open_checkpoint(tiny("mixtral")), 2), load(tiny("mixtral"))
    before, calibration = logits(model), data()
    order = order_experts(plan, model, calibration, quiet=True)
    assert torch.equal(before, logits(model)) and [*order] == plan.layers
    first = plan.layers[0]  # nothing is cut before it
    for number in (5, 3):
        kept = fit(tiny("mixtral"), number, calibration, refitted=False).kept[first]
        assert sorted({*range(6)} - {*order[first][: 6 - number]}) == kept


def test_reap_is_the_mean_of_share_and_norm_over_the_tokens_of_an_expert_and_frequency_their_number(tiny):
    model = load(tiny("mixtral"))
    _, experts = next(mixtures(model, "mixtral"))
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, often = saliency(experts, x, True), saliency(experts, x, False)
        _, shares, chosen = experts.router(x)
        for expert in range(len(experts)):
            terms = []
            for token in range(40):
                for share, number in zip(shares[token], chosen[token]):
                    if number == expert:
                        gate, up = (experts.module.gate_up_proj[expert] @ x[token]).chunk(2)
                        y = experts.module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                        terms.append(float(share * y.norm()))
            assert often[expert] == len(terms)
            assert float(found[expert]) == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4)


def test_reap_drops_the_expert_that_writes_nothing_however_often_it_is_chosen(tiny, own):
    folder = own("mixtral")
    tensors = tensors_of(folder)
    for name in tensors:
        if name.endswith(".experts.4.w2.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cut = fit(folder, 5, score="reap", refitted=False)
    assert set(map(tuple, cut.kept.values())) == {(0, 1, 2, 3, 5)}


# --- refits -----------------------------------------------------------------------------------------------------------


def block(shared=True):
    """A mixture, with a shared expert or none, and what it should write once one of its experts is gone."""
    torch.manual_seed(0)
    if shared:
        config = hf.Qwen3_5MoeTextConfig(
            hidden_size=16, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=5,
            num_experts_per_tok=2,
        )  # fmt: skip
        module = Qwen3_5MoeSparseMoeBlock(config)
    else:
        config = hf.MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=5, num_experts_per_tok=2)
        module = hf.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    experts = Experts("mlp.down_proj", module.requires_grad_(False), module.experts)
    x = torch.randn(900, 16)
    return experts, Tokens(x, x, written(experts, x), torch.rand(900), 700)


@pytest.mark.parametrize("shared", [True, False])
def test_a_refit_brings_held_out_tokens_nearer_to_what_the_whole_mixture_writes(shared):
    experts, tokens = block(shared)
    experts_fit.keep(experts, [0, 1, 4])
    before, router = missed(experts, tokens), experts.router.weight.clone()
    own = experts.shared.mlp.down_proj.weight.clone() if shared else None
    experts_fit.refit_down(experts, tokens)
    between = missed(experts, tokens)
    assert between < 0.9 * before and torch.equal(router, experts.router.weight)
    experts_fit.refit_router(experts, tokens)
    assert missed(experts, tokens) < between and not torch.equal(router, experts.router.weight)
    assert not shared or not torch.equal(own, experts.shared.mlp.down_proj.weight)


def test_a_refit_never_takes_held_out_tokens_farther_off():
    """Not where what the others have to learn is the opposite of what these want, and not where nothing is missing."""
    experts, tokens = block()
    wrong = tokens.x @ torch.randn(16, 16)
    for wanted in (tokens.wanted + torch.cat([wrong[:700], -wrong[700:]]), tokens.wanted):
        these, down = replace(tokens, wanted=wanted), experts.module.down_proj.clone()
        before = missed(experts, these)
        experts_fit.refit_down(experts, these)
        assert missed(experts, these) <= before + 1e-6
        assert before < 1 or torch.equal(experts.module.down_proj, down)
        refit(experts, these)
        assert missed(experts, these) <= before + 1e-6


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, experts, message",
    [
        ("mixtral", 6, "each layer has 6; keep fewer"),
        ("mixtral", 7, "each layer has 6; keep fewer"),
        ("mixtral", 1, r"a token goes to 2 \(num_experts_per_tok\); keep 2 at least"),
        ("qwen3_moe", 1, "keep 2 at least"),
        ("llama", 1, "llama without a mixture of experts: there is none to drop"),
        ("bert", 1, "without a mixture of experts"),
    ],
)
def test_numbers_that_cannot_be_are_refused(family, experts, message, tiny):
    with pytest.raises(PruneKitError, match=message) as refused:
        plan_experts(open_checkpoint(tiny(family)), experts)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "family, wrong, message",
    [
        ("mixtral", ".experts.3.w2.weight", "lacks experts of mlp.down_proj"),
        ("mixtral", ".experts.5.w1.weight", "not the same number of experts everywhere: 6 by .*, 5 by layer"),
        ("qwen3_vl_moe", ".experts.down_proj", "not the same number of experts everywhere"),
    ],
)
def test_a_folder_that_lacks_experts_is_refused(family, wrong, message, own):
    folder = own(family)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith(wrong)][:1]:
        tensors |= {name: tensors[name][1:].contiguous()} if tensors[name].ndim == 3 else {}
        if tensors[name].ndim == 2:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneKitError, match=message):
        plan_experts(open_checkpoint(folder), 3)


def test_a_config_that_says_another_number_is_refused(own):
    folder = own("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    with pytest.raises(PruneKitError, match=r"6 by .*, 8 by config.json \(num_local_experts\); mend it"):
        plan_experts(open_checkpoint(folder), 3)


def test_every_key_that_counts_experts_is_changed(own):
    folder = own("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 4, "num_local_experts": 4}))
    plan = plan_experts(open_checkpoint(folder), 2)
    assert [plan.outline.config[key] for key in ("num_experts", "num_local_experts")] == [2, 2]
    del config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    assert plan_experts(open_checkpoint(folder), 2).outline.config["num_experts"] == 2


def test_a_cut_of_a_cut_keeps_fewer_still(tiny, tmp_path):
    plan = plan_experts(open_checkpoint(tiny("mixtral")), 4)
    kept = dict.fromkeys(plan.layers, [0, 2, 3, 5])
    write_cut(experts_fit.ExpertsCut(plan, drop(plan, kept), "random", kept), tmp_path / "one")
    write_cut(fit(tmp_path / "one", 2, score="reap"), tmp_path / "two")
    assert text_config(load(tmp_path / "two")).num_experts == 2
    assert [entry["removed"] for entry in history(tmp_path / "two")] == [{"experts": 2}, {"experts": 2}]


def test_activations_that_are_not_finite_are_refused(own):
    folder = own("mixtral")
    tensors = tensors_of(folder)
    tensors["model.layers.2.post_attention_layernorm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneKitError, match="layer 2 has activations that are not finite"):
        fit(folder)
