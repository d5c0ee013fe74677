"""What an evaluation has written, read."""

from pathlib import Path
from typing import Any

from prunekit.checkpoint import read_json
from prunekit.rules import REAL, TEXT, Items, Keys, Values, check


def read_results(file: Path) -> list[dict[str, Any]]:
    """What `prunekit.evaluate --json` wrote: of each model, its scores by data set, None for NaN and infinity."""
    results = read_json(file, parse_constant=lambda _: None)
    figures = dict.fromkeys(("token_acc", "exact_match", "loss"), REAL)
    scores = Values(Keys(figures | {"groups": Values(Keys(figures))}))
    check(results, Items(Keys({"model": TEXT, "datasets": scores}, ("model", "datasets"))), file)
    return results
