"""How long a model takes, as a share of the base's seconds: measured, and estimated of cuts that aren't made.

The estimate: each part of the base takes the seconds that were measured of it (`prunekit.speed --parts`), and of what
is left of a part it takes as large a share. Parts are attention and MLP of the text layers by their parameters (of
experts those that a token goes to), what else these layers do by their number, the output head by its tokens; the
rest, which no cut takes, stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Outline, read_json, statistics
from prunekit.errors import PruneKitError
from prunekit.families import spot_of
from prunekit.rules import REAL, TEXT, Items, Keys, Values, check
from prunekit.surgery.experts import experts_chosen

KEYS = {"decoding": "decode", "prefill": "prefill"}  # what may be timed, as a measurement calls it
LAYERS = ("attention", "mlp", "layers")
_MODEL = Keys(
    {"model": TEXT, "error": TEXT, "batches": Values(Values(REAL)), "parts": Values(Values(REAL))}, ("model",)
)
_MEASURED = Keys({"models": Items(_MODEL)}, ("models",))


def part_sizes(model: Outline) -> dict[str, float]:
    """How much of each part a model has: see above."""
    row = model.family.text
    attention, mlp = (row.q, row.k, row.v, row.o, *row.linear), (*row.mlp, *map(row.beside_experts, row.mlp))
    numbers, found = statistics(model), dict.fromkeys(("attention", "mlp"), 0.0)
    busy = experts_chosen(model) / (numbers["num_experts"] or 1)
    for name, tensor in model.tensors.items():
        if within := row.within(name):
            spot = spot_of(within[1])
            module = spot.name
            part = "attention" if module in attention else "mlp" if module in mlp or spot.experts else None
            if part and len(tensor.shape) > 1:
                found[part] += math.prod(tensor.shape) * (busy if spot.experts else 1)
    return found | {"layers": numbers["num_hidden_layers"], "head": numbers["vocab_size"] or 1, "rest": 1}


@dataclass(frozen=True)
class Timing:
    """Seconds as shares of the base's, by part, and how much of each part the base has."""

    shares: Mapping[str, float]
    base: Mapping[str, float]
    scale: float = 1.0  # what a measurement of the model at hand says, over its estimate

    def of(self, model: Outline) -> float:
        """What a model is estimated to take of the base's seconds."""
        now = part_sizes(model)
        return self.scale * sum(share * now[part] / max(self.base[part], 1) for part, share in self.shares.items())

    def measured(self, model: Outline, share: float) -> "Timing":
        """The same, so that this model takes what was measured of it."""
        return replace(self, scale=self.scale * share / self.of(model))

    @property
    def of_layers(self) -> float:
        return sum(self.shares.get(part, 0.0) for part in LAYERS)


def _read(file: Path) -> list[dict[str, Any]]:
    found = read_json(file)
    check(found, _MEASURED, file)
    for row in found["models"]:
        if "error" in row or not row.get("batches"):
            raise PruneKitError(f"{file}: {row['model']} wasn't measured: {row.get('error', 'no batch')}")
    return found["models"]


def _seconds(row: dict[str, Any], of: str) -> float:
    """Of the first batch size that was measured."""
    return next(iter(row["batches"].values()))[KEYS[of]]


def read_share(file: Path, of: str) -> float:
    """What the second model of a measurement took of the first one's seconds."""
    measured = _read(file)
    if len(measured) < 2:
        raise PruneKitError(
            f"{file}: is of one model: measure it beside the base (python -m prunekit.speed BASE MODEL)"
        )
    base, model = measured[:2]
    return _seconds(model, of) / _seconds(base, of)


def read_parts(file: Path, of: str) -> dict[str, float]:
    """The share of the first model's seconds that each of its parts takes."""
    parts = _read(file)[0].get("parts")
    if not parts:
        raise PruneKitError(f"{file}: has no parts: measure the base by python -m prunekit.speed --parts")
    return parts[KEYS[of]]
