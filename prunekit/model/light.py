"""transformers without what it imports for nothing."""

import functools
import importlib


@functools.cache
def light_transformers():
    """The package, whose classes come without scikit-learn and SciPy: a fifth of what a script takes to start.

    It imports them, and pandas behind them, wherever they are installed: for assisted generation, for GLUE's metrics
    and for the losses of detectors, none of which is used here.
    """
    import transformers
    from transformers import utils

    known = {name: getattr(utils, name) for name in ("is_sklearn_available", "is_scipy_available")}
    try:
        for name in known:
            setattr(utils, name, lambda: False)
        for asking in ("generation.candidate_generator", "data.metrics", "loss.loss_utils"):
            importlib.import_module(f"transformers.{asking}")
    finally:
        for name, answer in known.items():
            setattr(utils, name, answer)
    return transformers
