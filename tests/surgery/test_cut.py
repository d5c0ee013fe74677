"""What all cuts have in common: an outline is not to be written; a cut is, with its account, whole or not at all."""

import pytest

from prunekit.checkpoint import Checkpoint, open_checkpoint, statistics, write_checkpoint
from prunekit.surgery.kv import plan_kv
from prunekit.surgery.width import plan_width

PLANS = {
    "kv": lambda checkpoint: plan_kv(checkpoint, 1),
    "width": lambda checkpoint: plan_width(checkpoint, head_share=0.5, neuron_share=0.5),
    "masked": lambda checkpoint: plan_width(checkpoint, head_share=0.5, mask=True),
}


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("kind", PLANS)
def test_an_outline_is_no_checkpoint_and_cannot_be_written(kind, limit, tiny, tmp_path):
    outline = PLANS[kind](open_checkpoint(tiny("qwen3"))).outline
    assert not isinstance(outline, Checkpoint)  # which mypy refuses where one is wanted
    with pytest.raises(AttributeError):
        write_checkpoint(outline, tmp_path / "out", {"stage": "copy"}, max_shard_bytes=limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["kv", "width"])
def test_the_sizes_of_an_outline_are_told(kind, tiny):
    plan = PLANS[kind](open_checkpoint(tiny("qwen3")))
    assert 0 < statistics(plan.outline)["bytes"] < statistics(plan.source)["bytes"]
