"""What a cut costs on rows of data: scores, intervals of the paired differences, and the rows that were lost."""

import base64
import binascii
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.data.answers import Judged
from prunekit.data.figures import chosen, means, paired_differences, ratios
from prunekit.data.groups import group_of, indices_by_group
from prunekit.data.rows import Rows, images_of, question_of, text_of

PICTURES = "pictures"  # folder of a report's
LARGEST = 320  # pixels, of a picture beside an answer


def quality_of(judged: list[Judged], by: str | None, examples: int, folder: Path) -> dict[str, Any]:
    """Of one data set: `rows`, `data`, `scores` of all, base first; of each model but the base `differences`, `worst`

    rows and, in `right_then_wrong`, on how many rows only the base and on how many only the model is right (None where
    nothing was generated); the same of each of the `groups` of column `by`. All were judged on the same rows. Pictures
    of the worst rows go to `folder`.
    """
    base, models = judged[0], judged[1:]
    groups = indices_by_group(base.rows, by) if by else {}
    generated = "exact_match" in base.figures
    lost = [lost_rows(base, model) if generated else [] for model in models]
    return {
        "rows": len(base.rows),
        "data": base.rows.record,
        "scores": [each.scores() for each in judged],
        "differences": [differences_of(base, model) for model in models],
        "right_then_wrong": [
            [len(places), len(lost_rows(model, base))] if generated else None for places, model in zip(lost, models)
        ],
        "worst": [
            [_shown(base.rows, place, model, by, folder) for place in places[:examples]]
            for places, model in zip(lost, models)
        ],
        "groups": {
            group: {
                "samples": len(places),
                "scores": [means(chosen(each.figures, places)) for each in judged],
                "differences": [differences_of(base, model, places) for model in models],
            }
            for group, places in sorted(groups.items())
        },
    }


def differences_of(base: Judged, model: Judged, places: list[int] | None = None) -> dict[str, dict[str, float]]:
    """By metric the `difference` of the model to the base, and the ends `low` and `high` of its interval."""
    old, new = (each.figures if places is None else chosen(each.figures, places) for each in (base, model))
    found = paired_differences(old, new)
    return {metric: dict(zip(("difference", "low", "high"), values)) for metric, values in found.items()}


def lost_rows(right: Judged, wrong: Judged) -> list[int]:
    """Places of the rows that one is right and the other wrong on; farthest from the truth first, then by loss."""
    lost = (right.figures["exact_match"][0] == 1) & (wrong.figures["exact_match"][0] == 0)
    share, loss = (ratios(*wrong.figures[name]) for name in ("cer", "loss"))
    return sorted(np.flatnonzero(lost).tolist(), key=lambda place: (-share[place], -loss[place]))


def _shown(rows: Rows, place: int, model: Judged, by: str | None, folder: Path) -> dict[str, Any]:
    """A row that a model is wrong on, as report.json has it. Rows count from 1, among those that all models take."""
    row = rows[place]
    images = [image for image in images_of(row) if image]
    drawn = [draw_image(image, folder) for image in images]
    return {
        "row": place + 1,
        "group": group_of(row, by) if by else "",
        "question": text_of(question_of(row["messages"])),
        "truth": row["messages"][-1]["content"].strip(),
        "answer": model.answers[place],
        "images": [image if isinstance(image, str) and len(image) < 1000 else "" for image in images],
        "pictures": [f"{PICTURES}/{name}" for name in drawn if name],
    }


def draw_image(image: object, folder: Path) -> str | None:
    """Draw a row's image anew, small, as a PNG in the folder; its name there. None for what isn't on this machine.

    A row names a path, or gives {"path": ...}, {"bytes": ...} or base64.
    """
    from PIL import Image

    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str) or "://" in image:
        return None
    name = f"row-{sum(1 for _ in folder.glob('row-*.png')) + 1:03}.png"
    try:
        if image.startswith("data:") or (len(image) > 255 and "." not in image):
            source: Any = io.BytesIO(base64.b64decode(image.rpartition(",")[2]))
        else:
            source = Path(os.environ.get("ROOT_IMAGE_DIR", ""), image)
        with Image.open(source) as picture:
            picture.thumbnail((LARGEST, LARGEST))
            picture.convert("RGB").save(folder / name)
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError):
        return None
    return name
