"""Removals scored in memory: the same figures as the cut model's own, whatever is kept and shared."""

import pytest
import torch
from tiny_models import FAMILIES, VISION, load

from prunekit.checkpoint import open_checkpoint
from prunekit.evaluate import score_batches
from prunekit.layers import apply_removal, plan_removal
from prunekit.scanner import LIKELIEST, Scanner, _strip_suffix
from prunekit.trained_knockouts import Knockout

CAUSAL = [family for family in FAMILIES if family not in ("bert", "roberta", "camembert", "distilbert")]


def text_batch(seed=0, rows=3, length=9):
    ids = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def scanner(folder, batches=None):
    return Scanner(open_checkpoint(folder), load(folder), batches or [text_batch()])


def totals(scores):
    tokens = sum(scores["tokens"])
    return sum(scores["right"]) / tokens, sum(scores["loss"]) / tokens


@pytest.mark.parametrize("family", CAUSAL)
def test_the_baseline_is_what_a_plain_evaluation_measures(family, tiny):
    model = scanner(tiny(family))
    expected = score_batches(model.model, model.batches)
    measured = totals(model.measure([], [], 0)["scores"]["baseline"])
    assert measured == pytest.approx((expected["token_acc"], expected["loss"]), rel=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_removal_scores_as_the_checkpoint_cut_on_disk_does(family, tiny, tmp_path):
    model = scanner(tiny(family))
    layers = model.kept("text", [])
    scores = model.measure([], [Knockout("text", layer) for layer in layers], 0)["scores"]
    for layer in (0, 2, layers[-1]):
        apply_removal(plan_removal(model.checkpoint, text=[layer]), tmp_path / str(layer))
        expected = score_batches(load(tmp_path / str(layer)), model.batches)
        assert totals(scores[f"text-{layer:02d}"]) == pytest.approx(
            (expected["token_acc"], expected["loss"]), rel=1e-5
        )
