"""Pictures of what happened: knockout rankings, training curves, the way of a model through its stages."""

from .knockout import draw_greedy, draw_knockout_curves, draw_ranking
from .loop import draw_loop
from .stages import draw_stages, shared_groups
from .surgery import draw_heads, draw_sparsity
from .tagger import draw_f1
from .training import draw_curves, draw_quality

__all__ = [
    "draw_curves",
    "draw_f1",
    "draw_greedy",
    "draw_heads",
    "draw_knockout_curves",
    "draw_loop",
    "draw_quality",
    "draw_ranking",
    "draw_sparsity",
    "draw_stages",
    "shared_groups",
]
