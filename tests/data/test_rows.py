"""Rows of data sets: which forms are read, and what is refused in one line that names it."""

import json
import zlib
from pathlib import Path

import pytest
from PIL import Image

from prunekit.checkpoint.provenance import data_record
from prunekit.data.batches import read_calibration
from prunekit.data.rows import Rows, iterate, problem_of_image, read_answered, read_datasets
from prunekit.errors import PruneKitError
from prunekit.training.preflight import check_dataset

ROWS = [
    {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"answer {n}"}]}
    for n in range(9)
]
READERS = [check_dataset, read_answered, read_calibration]


def write(file, rows, array=False):
    file.write_text(json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def values(name):
    return [value for _, value in iterate(name)]


def refused(read, name):
    """The one line with which a reader refuses a data set."""
    with pytest.raises(PruneKitError) as error:
        read(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


# --- forms


def test_json_lines_and_a_json_array_are_the_same_rows(tmp_path):
    assert values(write(tmp_path / "a.jsonl", ROWS)) == values(write(tmp_path / "a.json", ROWS, array=True)) == ROWS


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    assert values(write(tmp_path / "a.json", ROWS)) == ROWS


@pytest.mark.parametrize("name, array", [("a.jsonl", False), ("a.json", True)])
@pytest.mark.parametrize("count", [1, 6, 9, 20])
def test_a_number_after_the_name_takes_the_first_rows(tmp_path, name, array, count):
    assert values(write(tmp_path / name, ROWS, array) + f"#{count}") == ROWS[:count]


def test_a_file_whose_name_ends_in_a_number_is_itself(tmp_path):
    assert values(write(tmp_path / "a.jsonl#2", ROWS)) == ROWS


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl#7", "a.json#7"])
def test_every_reader_takes_every_form(tmp_path, read, name):
    write(tmp_path / name.partition("#")[0], ROWS, "jsonl" not in name)
    found = read(str(tmp_path / name))
    assert found is False or list(found) == ROWS[: 7 if "#" in name else None]


@pytest.mark.parametrize("read", READERS)
def test_every_reader_takes_texts_and_refuses_a_row_of_another_kind(tmp_path, read):
    texts = [{"text": f"some {n}", "source": "a"} for n in range(9)]
    found = read(write(tmp_path / "a.jsonl", texts))
    assert found is True or list(found) == texts
    for mixed in ([*texts, ROWS[0]], [*ROWS, texts[0]]):
        assert 'line 10: rows must all be {"text": ...}' in refused(read, write(tmp_path / "b.jsonl", mixed))
    both = [row | {"text": "a column of its own"} for row in ROWS]
    found = read(write(tmp_path / "c.jsonl", both))
    assert found is False or list(found) == both, "messages they are"


@pytest.mark.parametrize("read", [read_answered, read_calibration])
@pytest.mark.parametrize("name", ["org/name", "hf::org/name#500", "folder", "", "a" * 5000, "x.jsonl#3", "a\nb"])
def test_what_is_no_file_is_refused_and_a_hub_s_name_with_its_mend(tmp_path, monkeypatch, read, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert "is not there: give a JSONL file, or download it" in refused(read, name)


# --- content


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "line, said",
    [
        (b"\xff\xfe", "line 7 is not UTF-8"), ('{"a": "é"}'.encode("latin-1"), "line 7 is not UTF-8"),
        (b'{"messages": "\\ud800"}', "line 7 is not UTF-8"), (b'{"text": "\\uDFFFx"}', "line 7 is not UTF-8"),
        (b"{", "line 7 is not JSON"), (b"[" * 100_000, "line 7 is not JSON"), (b"1" * 5000, "line 7 is not JSON"),
        (b"", "line 7 is empty"), (b" \t", "line 7 is empty"), (b"7", "line 7"), (b"null", "line 7"), (b"[]", "line 7"),
        (b'{"messages": [{"role": 5, "content": "a"}]}', 'line 7 has a message whose "role" or "content" is no text'),
        (b'{"messages": [{"role": "user", "content": 5}]}', 'line 7 has a message whose "role" or "content"'),
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, read, line, said):
    good = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:6])
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    assert said in refused(read, str(tmp_path / "a.jsonl"))


def test_whole_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert values(str(tmp_path / "a.jsonl")) == [{"text": "\U0001f600"}]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_file_without_rows_is_refused(tmp_path, read, content):
    (tmp_path / "a.json").write_text(content)
    assert "is empty" in refused(read, str(tmp_path / "a.json"))


def test_a_bad_array_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[{},")
    assert "a.json is not JSON" in refused(values, str(tmp_path / "a.json"))


# --- read once


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl#6", "a.json#6"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_rows_carry_the_record_of_their_file_which_was_opened_once(tmp_path, opens, name, end):
    file = tmp_path / name.partition("#")[0]
    write(file, ROWS, array="jsonl" not in name)
    file.write_text(file.read_text().rstrip() + end)
    count = opens(file)
    rows = read_calibration(tmp_path / name)
    assert count() == 1
    assert rows.record == data_record(tmp_path / name)


def test_rows_of_no_file_have_its_name_alone():
    assert Rows("made up", ROWS).record == data_record("made up")


def test_a_limit_reads_no_further(tmp_path):
    write(tmp_path / "a.jsonl", [*ROWS, 5])
    assert list(read_answered(tmp_path / "a.jsonl", limit=9)) == ROWS
    refused(read_answered, tmp_path / "a.jsonl")


# --- images


def huge():
    """A PNG of a few bytes that says it is 100,000 pixels wide and high."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (100_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"x")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def picture(tmp_path):
    """picture(kind): the path of an image, damaged in that way."""

    def make(kind):
        name, _, damage = kind.partition("-")
        file = tmp_path / f"{kind}.{name}"
        if damage == "folder":
            file.mkdir()
            return str(file)
        Image.effect_noise((64, 64), 50).save(file)
        whole = file.read_bytes()
        match damage:
            case "truncated":
                file.write_bytes(whole[: len(whole) // 2])
            case "empty":
                file.write_bytes(b"")
            case "text":
                file.write_text("not a picture")
            case "huge":
                file.write_bytes(huge())
        return str(file)

    return make


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_a_whole_image_passes(picture, kind):
    assert problem_of_image(picture(kind)) is None


def test_an_image_with_bytes_behind_its_end_passes(picture):
    with Path(file := picture("jpeg")).open("ab") as picture_file:
        picture_file.write(bytes(5000))
    assert problem_of_image(file) is None


DAMAGED = [
    "png-truncated",
    "jpeg-truncated",
    "webp-truncated",
    "png-empty",
    "png-text",
    "png-huge",
    "png-folder",
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_an_image_that_can_t_be_read_is_named_with_its_row(picture, tmp_path, read, kind):
    file = picture(kind)
    rows = [*ROWS[:6], ROWS[6] | {"images": [file]}]
    assert "a.jsonl line 7 names an image" in (said := refused(read, write(tmp_path / "a.jsonl", rows)))
    assert file in said


def test_a_header_is_enough_of_a_whole_image(picture, monkeypatch):
    file = picture("png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert problem_of_image(file) is None


# --- several


def test_data_sets_are_called_by_their_names_and_by_all_of_them_where_these_are_alike(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "test.jsonl", ROWS)
    write(tmp_path / "val.jsonl", ROWS)
    names = [f"{tmp_path}/a/test.jsonl", f"{tmp_path}/b/test.jsonl", f"{tmp_path}/val.jsonl#3"]
    found = read_datasets(names, None)
    assert {name: len(rows) for name, rows in found.items()} == {names[0]: 9, names[1]: 9, "val": 3}


def test_a_data_set_named_twice_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(PruneKitError, match="named twice"):
        read_datasets([file, file], None)


@pytest.mark.parametrize("content", [None, ["a"]])
def test_an_answer_that_is_no_text_can_t_be_compared_with(tmp_path, content):
    rows = [{"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": content}]}]
    assert "line 1 ends without an assistant message" in refused(read_answered, write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Answer."}]])
def test_an_answer_to_no_question_can_t_be_made_again(tmp_path, before):
    rows = [{"messages": [*before, ROWS[0]["messages"][1]]}]
    assert "line 1 has no question before its answer" in refused(read_answered, write(tmp_path / "a.jsonl", rows))
