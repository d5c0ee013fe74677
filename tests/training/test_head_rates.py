"""Rates of heads, measured on parameters: what an optimizer really did to each head, against what it does unscaled."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.cuts import cut_width
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import FAMILIES, load
from safetensors.torch import load_file

from prunekit.checkpoint import heads, history, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.training.head_rates import HeadRates, Rates, freeze_others, known_scores, rate_heads

SOME = ["llama", "qwen2", "qwen3_vl", "gpt2", "bert"]


def linear_loss(model, seed=0):
    """A loss whose gradients don't depend on the parameters: then every step's update is known."""
    generator = torch.Generator().manual_seed(seed)
    return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters() if p.requires_grad)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        linear_loss(model, step).backward()
        optimizer.step()


def rated(folder, settings, weight_decay=0.1, scores=None, **kwargs):
    model = load(folder)
    rates = HeadRates(model, open_checkpoint(folder), settings, scores)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=weight_decay, **kwargs)
    rates.attach(optimizer)
    return model, rates, optimizer


def per_head(rates, each, value, grouped=False):
    """(heads or KV heads, the rest) of a parameter's slice."""
    count = rates.heads.kv if grouped else rates.heads.query
    return each.of(value).movedim(each.axis, 0).reshape(count, -1)


@pytest.mark.parametrize("family", SOME)
def test_every_heads_update_is_its_rate_times_the_plain_one(family, tiny):
    """One AdamW step with weight decay: ratios of updates, of every parameter that belongs to heads."""
    count = heads(open_checkpoint(tiny(family))).query
    scores = [list(range(count))] * 5  # the first quarter is weak
    settings = Rates(weak=0.3, weak_share=0.25)
    model, rates, optimizer = rated(tiny(family), settings, scores=scores)
    plain = load(tiny(family))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    train(model, optimizer, 1)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1), 1)
    expected = torch.where(torch.arange(count) < count // 4, 0.3, 1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours, theirs = model.state_dict(), plain.state_dict()
    seen = 0
    for layer in rates.layers:
        for each, grouped in layer.slices:
            name = names[each.parameter]
            done = per_head(rates, each, ours[name] - before[name], grouped)
            wanted = per_head(rates, each, theirs[name] - before[name], grouped)
            of = expected.view(rates.heads.kv, -1).amax(1) if grouped else expected
            ratio = done.norm(dim=1) / wanted.norm(dim=1)
            torch.testing.assert_close(ratio, of, rtol=2e-3, atol=0)
            seen += 1
    assert seen >= 5 * 4
    own = {names[parameter] for parameter in rates.parameters()}
    others = [name for name in names.values() if name not in own]
    assert others and all(torch.equal(ours[name], theirs[name]) for name in others)


def test_over_many_steps_a_weak_head_moves_its_share_and_adam_doesnt_undo_it(tiny):
    scores = [[0.0, 1.0, 2.0, 3.0]] * 5
    model, rates, optimizer = rated(tiny("llama"), Rates(weak=0.1, weak_share=0.25), 0.0, scores)
    plain = load(tiny("llama"))
    start = plain.model.layers[2].self_attn.q_proj.weight.detach().clone().view(4, -1)
    train(model, optimizer, 20)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0), 20)
    moved = [m.model.layers[2].self_attn.q_proj.weight.detach().view(4, -1) - start for m in (model, plain)]
    ratio = moved[0].norm(dim=1) / moved[1].norm(dim=1)
    torch.testing.assert_close(ratio, torch.tensor([0.1, 1, 1, 1]), rtol=1e-2, atol=0)


def test_a_weak_head_moves_its_share_in_float32_weights_under_bfloat16_autocast(tiny):
    """As launchers train on GPUs; steps of this size are lost in bfloat16 weights."""

    def moved(rated: bool) -> torch.Tensor:
        model = load(tiny("llama"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        if rated:
            scores = [[0.0, 1.0, 2.0, 3.0]] * 5
            HeadRates(model, open_checkpoint(tiny("llama")), Rates(0.1, 0.25), scores).attach(optimizer)
        weight = model.model.layers[2].self_attn.q_proj.weight
        start = weight.detach().clone()
        ids = torch.arange(48).view(2, 24)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return (weight.detach() - start).view(4, -1).norm(dim=1)

    torch.testing.assert_close(moved(True) / moved(False), torch.tensor([0.1, 1, 1, 1]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(dtype, tiny):
    checkpoint = open_checkpoint(tiny("llama"))
    with pytest.raises(PruneKitError, match=r"weak heads would stand still in b?float16 weights: train with"):
        HeadRates(load(tiny("llama")).to(dtype), checkpoint, Rates())
    HeadRates(load(tiny("llama")).to(dtype), checkpoint, Rates(weak_share=0.0))  # no steps that are small


def test_weights_of_16_bits_are_refused_before_ms_swift_starts(tiny, tmp_path, script_here):
    line = ["--optimizer", "head_rates", "--external_plugins", ROOT / "plugins/head_rates.py"]
    line += ["--torch_dtype", "bfloat16", "--tuner_type", "full"]
    words = ("--model", tiny("llama"), "--out", tmp_path / "out", "--swift", "sft")
    done = script_here("prunekit.training.preflight", *words, "--", *line)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: HEAD_RATES: weak heads would stand still in bfloat16")


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("family", SOME)
def test_pruned_heads_keep_every_bit_under_adamw_and_weight_decay(family, foreach, tiny, tmp_path):
    plan = cut_width(tiny(family), tmp_path / "masked", head_share=0.5, mask=True)
    model, rates, optimizer = rated(tmp_path / "masked", Rates(), foreach=foreach)
    before = copy.deepcopy(model).state_dict()
    train(model, optimizer, 4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    after = model.state_dict()
    for number, layer in enumerate(rates.layers):
        gone = [head for head in range(rates.heads.query) if head not in plan.kept[number].heads]
        for each, grouped in layer.slices:
            name = names[each.parameter]
            old, new = (per_head(rates, each, values[name], grouped) for values in (before, after))
            if not grouped:
                assert torch.equal(old[gone], new[gone]) and not torch.equal(old, new)
        o = per_head(rates, layer.o, after[names[layer.o.parameter]])
        assert not o[gone].any()


def test_a_kv_head_rests_only_if_all_its_readers_do(tiny, tmp_path):
    plan = cut_width(tiny("llama"), tmp_path / "masked", kv_groups=1, mask=True)
    model, rates, optimizer = rated(tmp_path / "masked", Rates(weak_share=0))
    before = [layer.self_attn.k_proj.weight.detach().clone().view(2, -1) for layer in model.model.layers]
    train(model, optimizer, 2)
    for number, layer in enumerate(model.model.layers):
        kept = plan.kept[number].kv_heads[0]
        after = layer.self_attn.k_proj.weight.detach().view(2, -1)
        assert torch.equal(after[1 - kept], before[number][1 - kept])
        assert not torch.equal(after[kept], before[number][kept])


def test_only_active_heads_are_trained_where_others_are_frozen(tiny, tmp_path):
    plan = cut_width(tiny("llama"), tmp_path / "masked", heads_kept=2, mask=True)
    model = load(tmp_path / "masked")
    rates = HeadRates(model, open_checkpoint(tmp_path / "masked"), Rates(others=0, weak_share=0))
    freeze_others(model, rates)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    rates.attach(optimizer)
    before = copy.deepcopy(model).state_dict()
    train(model, optimizer, 3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[4] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    q = model.model.layers[0].self_attn.q_proj.weight.view(4, -1)
    still = (q == before["model.layers.0.self_attn.q_proj.weight"].view(4, -1)).all(1)
    assert still.nonzero()[:, 0].tolist() == [head for head in range(4) if head not in plan.kept[0].heads]


def test_a_refresh_finds_the_heads_whose_gradients_matter_least(tiny):
    model, rates, optimizer = rated(
        tiny("llama"), Rates(weak=0.5, weak_share=0.25, refresh=2), scores=[[0.0, 1.0, 1.0, 1.0]] * 5
    )
    for _ in range(2):
        assert [row.tolist() for row in rates.rates(optimizer)] == [[0.5, 1, 1, 1]] * 5
        optimizer.zero_grad()
        linear_loss(model).backward()
        for layer in model.model.layers:  # head 3 has no gradient to speak of
            layer.self_attn.o_proj.weight.grad[:, 48:] *= 1e-3
        optimizer.step()
    assert [row.tolist() for row in rates.rates(optimizer)] == [[1, 1, 1, 0.5]] * 5


@pytest.mark.parametrize("settings", [Rates(weak=0.3, refresh=3), Rates(weak=0.3, adaptive=3)], ids=str)
def test_a_resumed_optimizer_goes_on_as_if_nothing_had_happened(settings, tiny, tmp_path):
    cut_width(tiny("llama"), tmp_path / "masked", head_share=0.5, mask=True)
    whole, rates, optimizer = rated(tmp_path / "masked", settings)
    seeds = iter(range(100))

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            linear_loss(model, next(seeds)).backward()
            optimizer.step()

    steps(whole, optimizer, 4)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    steps(whole, optimizer, 4)
    resumed, again, other = rated(tmp_path / "masked", settings)
    resumed.load_state_dict(weights)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    seeds = iter(range(4, 100))
    steps(resumed, other, 4)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [r.tolist() for r in rates.rates(optimizer)] == [r.tolist() for r in again.rates(other)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_heads_are_found(family, tiny):
    rates = HeadRates(load(tiny(family)), checkpoint := open_checkpoint(tiny(family)), Rates())
    count, kv_count, width = heads(checkpoint)
    for layer in rates.layers:
        lengths = [each.length for each, _ in layer.slices if each.parameter.ndim == 2]
        gated = 1 + checkpoint.family.text.gated  # behind each query
        assert lengths == [count * width * gated, kv_count * width, kv_count * width, count * width]


def test_of_equal_scores_no_more_than_their_share_are_weak():
    rates = rate_heads(torch.zeros(8), torch.tensor([True] * 3 + [False] * 5), Rates(weak_share=0.5))
    assert (rates == 0).sum() == 3 and (rates == 0.1).float().sum() == 2 and (rates == 1).sum() == 3


def test_scores_of_the_cut_are_known_and_lose_the_heads_that_went(tiny, tmp_path):
    plan = cut_width(tiny("llama"), tmp_path / "masked", heads_kept=2, mask=True)
    cut_width(tiny("llama"), tmp_path / "gone", heads_kept=2)
    masked, gone = (known_scores(open_checkpoint(tmp_path / name)) for name in ("masked", "gone"))
    assert [len(row) for row in masked] == [4] * 5 and [len(row) for row in gone] == [2] * 5
    assert gone[0] == [masked[0][head] for head in plan.kept[0].heads]


def test_scores_from_before_other_surgery_are_not_trusted(tiny, tmp_path):
    cut_width(tiny("llama"), tmp_path / "one", heads_kept=2)
    cut_width(tmp_path / "one", tmp_path / "two", neuron_share=0.5)
    assert known_scores(open_checkpoint(tmp_path / "two")) is None
    assert known_scores(open_checkpoint(tiny("llama"))) is None


def test_heads_below_a_share_of_their_layers_best_are_weak_whatever_pruned_ones_score():
    scores, pruned = torch.tensor([9.0, 1.0, 0.39, 2.0, 0.41]), torch.tensor([True, False, False, False, False])
    settings = Rates.parse("weak=0.3 weak_below=0.2")
    assert settings.weak_share == 0, "it takes the place of the lowest share"
    assert rate_heads(scores, pruned, settings).tolist() == pytest.approx([0, 1, 0.3, 1, 1])
    both = Rates.parse("weak=0.3 weak_below=0.2 weak_share=0.5")
    assert rate_heads(scores, pruned, both).tolist() == pytest.approx([0, 1, 0.3, 1, 0.3])


def pruned_by_layer(rates):
    return [rates._pruned(layer).tolist() for layer in rates.layers]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_head_that_would_matter_comes_back_for_the_weakest_of_its_group(family, tiny, tmp_path):
    """llama: 4 heads in 2 KV groups, one of each masked; gpt2: 2 of 4, each with its own KV head."""
    plan = cut_width(tiny(family), tmp_path / "masked", head_share=0.5, mask=True)
    said = []
    model = load(tmp_path / "masked")
    settings = Rates(weak_share=0, adaptive=2)
    rates = HeadRates(model, open_checkpoint(tmp_path / "masked"), settings, say=said.append)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates.attach(optimizer)
    before, layer = pruned_by_layer(rates), rates.layers[2]
    kept = plan.kept[2].heads
    gone = [head for head in range(4) if head not in kept]
    new, old = gone[0], kept[0]  # of one group, of two heads
    size = layer.o.length // 4
    for step in range(3):
        optimizer.zero_grad()
        linear_loss(model, step).backward()
        for number, each in enumerate(rates.layers):  # elsewhere masked heads have no gradient to speak of
            gradient = each.o.of(each.o.parameter.grad).movedim(each.o.axis, 0).unflatten(0, (4, size))
            for head in (h for h in range(4) if before[number][h]):
                gradient[head] *= 10 if (number, head) == (2, new) and step < 2 else 1e-6
            if number == 2 and step < 2:
                gradient[old] *= 1e-3
        optimizer.step()
        after = pruned_by_layer(rates)
        if step == 0:
            assert after == before and not said
    assert after[:2] + after[3:] == before[:2] + before[3:]
    assert after[2] == [(h in gone and h != new) or h == old for h in range(4)]
    assert said == [f"step 2, layer 2: head {new} comes back, {old} is masked"]
    row = rates.rates(optimizer)[2]
    assert (row[new], row[old]) == (1, 0)


def test_masks_that_may_move_need_one(tiny):
    with pytest.raises(PruneKitError, match="adaptive: no head is masked that could come back"):
        HeadRates(load(tiny("llama")), open_checkpoint(tiny("llama")), Rates(adaptive=5))


@pytest.mark.parametrize(
    "text",
    [
        "weak=2", "weak", "speed=1", "weak=-1", "refresh=1.5", "others=0.5", "weak_share=x", "weak=nan", "weak_below=2",
        "adaptive=0.5",
    ],
)  # fmt: skip
def test_bad_settings_are_named(text):
    with pytest.raises(PruneKitError, match="HEAD_RATES: "):
        Rates.parse(text)


def test_settings_are_read_over_the_presets():
    assert Rates.parse("weak=0.2 refresh=50", weak_share=0.0) == Rates(0.2, 0.0, 1.0, 50)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A masked copy of the embedded model, trained by ms-swift: SFT (also resumed, and frozen), GKD and GRPO."""
    folder = tmp_path_factory.mktemp("swift")
    cut_width(EMBEDDED, folder / "masked", head_share=0.5, mask=True)
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}],
        "solution": "ab",
    }
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 12)
    command = [
        sys.executable,
        ROOT / "tests/helpers" / "swift_head_rates.py",
        folder / "masked",
        folder / "data.jsonl",
        folder,
    ]
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("run", ["sft/checkpoint-4", "frozen/checkpoint-2", "gkd/checkpoint-2", "grpo/checkpoint-2"])
def test_ms_swift_trains_the_other_heads_and_leaves_pruned_ones_as_they_were(run, trained):
    before, after = (load_file(trained / name / "model.safetensors") for name in ("masked", run))
    for layer, gone in enumerate(history(trained / "masked")[-1]["heads_removed"]):
        name = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
        old, new = (tensors[name].float().view(8, -1) for tensors in (before, after))
        still = (old == new).all(1).nonzero()[:, 0].tolist()
        assert still == gone or run.startswith("grpo")  # whose rewards may all be the same: then nothing is trained
        o = after[name.replace("q_proj", "o_proj")].unflatten(1, (8, -1))
        assert not o[:, gone].any()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name].float(), after[name].float())}
    of_heads = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed == of_heads if run.startswith("frozen") else changed > of_heads


@pytest.mark.ci
@pytest.mark.slow
def test_a_resumed_training_ends_as_the_uninterrupted_one(trained):
    original, copied = (trained / run / "checkpoint-2/model.safetensors" for run in ("sft", "resumed"))
    assert original.stat().st_mtime_ns == copied.stat().st_mtime_ns, "from the beginning it would write it again"
    one, two = (load_file(trained / run / "checkpoint-4/model.safetensors") for run in ("sft", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    states = [torch.load(trained / run / "checkpoint-4/optimizer.pt") for run in ("sft", "resumed")]
    first, second = (state["param_groups"][0]["head_rates"] for state in states)
    assert first == second and first["steps"] == 4
    rates = sorted({rate for row in first["rates"] for rate in row})
    assert rates == pytest.approx([0, 0.1, 1])
