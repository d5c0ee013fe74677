"""Cuts as their scripts make them, in one call."""

from prunekit.checkpoint import open_checkpoint
from prunekit.surgery.width import apply_width, choose, magnitudes, plan_width
from prunekit.surgery.zeros import Wish, apply_sparsify, plan_sparsify, select, with_importance


def cut_width(folder, out, score="magnitude", **wanted):
    checkpoint = open_checkpoint(folder)
    plan = choose(plan_width(checkpoint, **wanted), magnitudes(checkpoint))
    apply_width(plan, out, score)
    return plan


def sparsify(folder, out, importance=None, scores=None, **wish):
    plan = plan_sparsify(open_checkpoint(folder), Wish(**wish))
    if importance is not None:
        plan = with_importance(plan, importance)
    return apply_sparsify(select(plan, *([scores] if scores else [])), out)
