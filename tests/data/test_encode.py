"""Rows as a model's inputs, said once or twice."""

import json

import pytest
from helpers.paths import EMBEDDED
from PIL import Image
from swift.dataset import load_dataset
from transformers import AutoTokenizer

from prunekit.checkpoint import open_checkpoint
from prunekit.data.batches import calibrate
from prunekit.data.encode import Encoder, encoder_of
from prunekit.data.rows import Rows, read_answered
from prunekit.errors import PruneKitError

QUESTION = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SEEN = [{"role": "user", "content": "<image>?"}, QUESTION[1]]
BOX = {"ref": ["it"], "bbox": [[30, 20, 10, 5]]}  # its corners the wrong way round


def encoder(rows, max_length=64):
    return encoder_of(open_checkpoint(EMBEDDED), Rows("", rows), max_length)


@pytest.mark.parametrize(("words", "all_of_it"), [(3, True), (500, False)])
def test_a_text_that_is_said_twice_is_its_beginning_and_the_same_again(words, all_of_it):
    text = " ".join(f"w{number}" for number in range(words))
    ids = encoder([{"text": text}]).again({"text": text})["input_ids"]
    first, second = AutoTokenizer.from_pretrained(EMBEDDED).decode(ids).split("\n\n")
    assert text.startswith(first) and first.startswith(second) and len(second) > len(first) / 2
    assert ((first, second) == (text, text)) == all_of_it
    assert len(ids) <= 64


def test_a_conversation_that_is_said_twice_is_answered_twice_after_one_system_message():
    row = {"messages": [{"role": "system", "content": "Add."}, *QUESTION]}
    made = encoder([row], 256)
    once, twice = made.encode(row), made.again(row)
    answer = [label for label in once["labels"] if label != -100]
    assert [label for label in twice["labels"] if label != -100] == answer * 2
    assert len(twice["input_ids"]) < 2 * len(once["input_ids"])


def test_a_row_with_pictures_is_not_said_twice(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    row = {"messages": [{"role": "user", "content": "<image>read"}, QUESTION[1]], "images": [str(tmp_path / "a.png")]}
    assert encoder([row]).again(row) is None


@pytest.mark.parametrize(("repeat", "said_twice"), [(0, 0), (0.25, 5), (0.5, 10), (1, 20)])
def test_as_many_rows_are_said_twice_as_asked_for(repeat, said_twice):
    rows = Rows("", [{"text": str(number)} for number in range(20)])
    once, twice = ({"input_ids": [number] * 3, "labels": [number] * 3} for number in (1, 2))
    made = Encoder(lambda row: once, lambda items: {"rows": items}, lambda row: twice)
    found = calibrate(None, open_checkpoint(EMBEDDED), rows, encoder=made, repeat=repeat)
    drawn = [item for batch in (*found.fit, *found.held_out) for item in batch["rows"]]
    assert sum(item is twice for item in drawn) == said_twice


def test_a_row_too_long_to_be_said_twice_is_said_once():
    rows = Rows("", [{"text": str(number)} for number in range(20)])
    made = Encoder(lambda row: {"input_ids": [1, 1], "labels": [1, 1]}, lambda items: {"rows": items}, lambda row: None)
    found = calibrate(None, open_checkpoint(EMBEDDED), rows, encoder=made, repeat=1)
    assert sum(len(batch["rows"]) for batch in (*found.fit, *found.held_out)) == 20


@pytest.mark.parametrize(
    "columns",
    [
        {"system": "Add."},
        {"system_prompt": "Add."},
        {"system": None},
        {"messages": [{"role": "system", "content": "First."}, *QUESTION], "system": "Second."},
        {"messages": SEEN, "image": "a.png"},
        {"messages": SEEN, "image": ["a.png"]},
        {"messages": SEEN, "images": {"path": "a.png"}},
        {"messages": SEEN, "images": [{"path": "a.png"}]},
        {"messages": [SEEN[0], {"role": "assistant", "content": "<bbox>"}], "images": ["a.png"], "objects": BOX},
        {"tools": TOOL},
        {"tools": json.dumps(TOOL)},
        {"positive_score": 1, "negative_note": "none", "rejected_response": "6"},
        {"messages": [QUESTION[0], QUESTION[1] | {"loss": False}, *QUESTION]},
    ],
    ids=str,
)
def test_a_row_is_read_as_ms_swift_reads_it_to_train_on(tmp_path, monkeypatch, columns):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (64, 32)).save("a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": QUESTION} | columns))
    rows = read_answered("a.jsonl")
    made = encoder(rows, 512)
    ours, theirs = made.encode(rows[0]), made.template.encode(load_dataset("a.jsonl")[0][0])
    assert [ours[key] for key in ("input_ids", "labels")] == [theirs[key] for key in ("input_ids", "labels")]
    assert ("pixel_values" in ours) == ("pixel_values" in theirs)


def test_an_image_that_a_url_doesnt_hold_is_refused_in_one_line():
    row = {"messages": SEEN, "images": ["data:image/png;base64,aGVsbG8="]}
    with pytest.raises(PruneKitError, match="can't be encoded by ms-swift's .*cannot identify image file"):
        encoder([row]).encode(row)
