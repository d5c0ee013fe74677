"""Cuts as their scripts make them, in one call."""

from prunekit.checkpoint import open_checkpoint
from prunekit.surgery import width
from prunekit.surgery.cut import write_cut
from prunekit.surgery.experts import ExpertsCut, drop, plan_experts
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.zeros import cut_zeros, plan_zeros, with_importance
from prunekit.surgery.zeros_wish import Wish


def drop_layers(folder, out, gone=(1,)):
    """OUT, with these text layers gone."""
    write_cut(cut_layers(plan_layers(open_checkpoint(folder), text=gone)), out)
    return out


def cut_width(folder, out, **wanted):
    cut = width.cut_width(width.plan_width(open_checkpoint(folder), **wanted))
    write_cut(cut, out)
    return cut


def first_experts(folder, experts):
    """The cut of a checkpoint to the first so many experts of each mixture, whatever they are worth."""
    plan = plan_experts(open_checkpoint(folder), experts)
    kept = dict.fromkeys(plan.layers, list(range(experts)))
    return ExpertsCut(plan, drop(plan, kept), "random", kept)


def sparsify(folder, out, importance=None, scores=None, **wish):
    plan = plan_zeros(open_checkpoint(folder), Wish(**wish))
    if importance is not None:
        plan = with_importance(plan, importance)
    return write_cut(cut_zeros(plan, *([scores] if scores else [])), out)
