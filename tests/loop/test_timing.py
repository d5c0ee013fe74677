"""What a model is estimated to take of the base's seconds, and what measurements say."""

import json

import pytest
from helpers.cuts import cut_width

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.loop.timing import LAYERS, Timing, part_sizes, read_parts, read_share
from prunekit.surgery.experts import plan_experts
from prunekit.surgery.layers import plan_layers

SHARES = {"attention": 0.3, "mlp": 0.3, "layers": 0.1, "head": 0.2, "rest": 0.1}


@pytest.fixture
def base(tiny):
    return open_checkpoint(tiny("qwen3"))


def test_layers_that_go_take_their_part_of_the_seconds_with_them(base):
    timing = Timing(SHARES, part_sizes(base))
    assert timing.of(base) == pytest.approx(1)
    assert timing.of_layers == pytest.approx(0.7) == sum(SHARES[part] for part in LAYERS)
    left = plan_layers(base, text=[1]).result
    count = base.config["num_hidden_layers"]
    assert timing.of(left) == pytest.approx(0.3 + 0.7 * (count - 1) / count)


def test_neurons_take_their_share_of_the_mlps_seconds_and_heads_of_attentions(base, tmp_path):
    timing = Timing(SHARES, part_sizes(base))
    cut_width(base.path, tmp_path / "narrow", neuron_share=0.5)
    assert timing.of(open_checkpoint(tmp_path / "narrow")) == pytest.approx(1 - 0.15)
    cut_width(base.path, tmp_path / "heads", heads_kept=4)
    assert 0.7 < timing.of(open_checkpoint(tmp_path / "heads")) < 1


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])  # an expert's tensors, and those of all in one
def test_of_experts_those_that_a_token_goes_to_count_as_the_mlp_so_that_fewer_are_no_faster(family, tiny):
    model = open_checkpoint(tiny(family))
    sizes = {name: tensor.nbytes // 4 for name, tensor in model.tensors.items() if "_proj" in name and ".mlp." in name}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert part_sizes(model)["mlp"] == sum(sizes.values()) - experts / 2 > 0, "2 of 4"
    timing = Timing(SHARES, part_sizes(model))
    assert timing.of(plan_experts(model, 3).outline) == pytest.approx(timing.of(model))


def test_an_estimate_goes_on_from_what_was_measured(base):
    timing = Timing(SHARES, part_sizes(base)).measured(base, 0.5)
    assert timing.of(base) == pytest.approx(0.5)
    assert timing.of(plan_layers(base, text=[1]).result) < 0.5


def measurement(file, *models):
    file.write_text(json.dumps({"models": list(models)}))
    return file


def row(name, prefill, decode, **more):
    return {"model": name, "batches": {"1": {"prefill": prefill, "decode": decode}}, **more}


def test_a_share_is_of_what_is_to_be_faster(tmp_path):
    file = measurement(tmp_path / "speed.json", row("base", 8.0, 2.0), row("cut", 2.0, 1.0))
    assert read_share(file, "decoding") == 0.5 and read_share(file, "prefill") == 0.25


@pytest.mark.parametrize(
    ("models", "message"),
    [([row("a", 1.0, 1.0), {"model": "b", "error": "no memory"}], "b wasn't measured: no memory"),
     ([row("a", 1.0, 1.0)], "is of one model"), ([{"batches": {}}], r"models\[0\].model is missing")],
)  # fmt: skip
def test_a_measurement_that_says_nothing_is_refused(models, message, tmp_path):
    with pytest.raises(PruneKitError, match=message):
        read_share(measurement(tmp_path / "speed.json", *models), "decoding")


def test_a_base_whose_parts_were_not_measured_is_refused(tmp_path):
    with pytest.raises(PruneKitError, match="has no parts: measure the base"):
        read_parts(measurement(tmp_path / "speed.json", row("a", 1.0, 1.0)), "decoding")
