"""What the embedded model is scored on and trained with."""

import json

import pytest
from helpers.paths import EMBEDDED, ROOT
from helpers.trainings import FLAGS
from PIL import Image

from prunekit.knockout.trained import Training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Messages with images, for the embedded reader."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(12):
        Image.effect_noise((192, 32), 20 * number).save(folder / f"{number}.png")
        question = {"role": "user", "content": "<image>Read the text."}
        answer = {"role": "assistant", "content": "abc"[number % 3] * 4}
        rows.append({"messages": [question, answer], "images": [str(folder / f"{number}.png")]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def reader(pictures, tmp_path_factory):
    """How to train the embedded reader, a Qwen3-VL, for two steps."""
    arguments = (
        *FLAGS, "--external_plugins", str(ROOT / "plugins" / "images_and_answers.py"),
        "--dataset", str(pictures), "--val_dataset", str(pictures),
    )  # fmt: skip
    return Training(EMBEDDED, "qwen3_vl", tmp_path_factory.mktemp("reader"), arguments, "group")
