"""The two sides of a refit, of the tiny llama."""

from prunekit.checkpoint import open_checkpoint
from prunekit.families import FAMILIES as ROWS
from prunekit.model.replay import record_calls
from prunekit.surgery.layers import plan_layers
from prunekit.surgery.sides import Sides


def sides_of(model, folder, calibration, gone):
    """The sides of a llama that loses these layers."""
    plan = plan_layers(open_checkpoint(folder), text=gone)
    batches = [*calibration.fit, *calibration.held_out]
    judged = range(len(calibration.fit), len(batches))
    calls = record_calls(model, ROWS["llama"].text, batches)
    return Sides(model, ROWS["llama"], "text", batches, judged, calls, plan=plan)
