"""Pictures of what happened: knockout rankings, training curves, the way of a model through its stages."""

from .figures import (
    COOL,
    LINES,
    PALE,
    WARM,
    draw_curves,
    draw_f1,
    draw_greedy,
    draw_heads,
    draw_knockout_curves,
    draw_quality,
    draw_ranking,
    draw_sparsity,
    draw_stages,
)

__all__ = [
    "COOL",
    "LINES",
    "PALE",
    "WARM",
    "draw_curves",
    "draw_f1",
    "draw_greedy",
    "draw_heads",
    "draw_knockout_curves",
    "draw_quality",
    "draw_ranking",
    "draw_sparsity",
    "draw_stages",
]
