"""What preflight says of data sets: any file passes or is refused in one line that names it."""

import contextlib
import json
from pathlib import Path

import pytest
from helpers.anything import JSON
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prunekit.errors import PruneKitError
from prunekit.training.preflight import check_dataset, check_datasets

ROW = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """data(row, ...): write these rows to data.jsonl in the current folder, where image.png is too."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("image.png")

    def write(*rows) -> str:
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "data.jsonl"

    return write


ASKED = {"messages": ROW["messages"][:1]}


@pytest.mark.parametrize("last", [ASKED, {"messages": [*ASKED["messages"], {"role": "assistant", "content": None}]}])
def test_rows_of_which_none_has_an_answer_teach_nothing(data, last):
    """ms-swift trains on them to the end, at a loss of 0."""
    with pytest.raises(PruneKitError, match="no row has an assistant's message, so nothing would be learned"):
        check_datasets([data(ASKED, last)], learned=True)
    assert not check_datasets([data(ASKED, last)]), "a policy answers itself"
    assert not check_datasets([data(ASKED, ROW)], learned=True)
    assert check_datasets([data({"text": "a"})], learned=True)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    assert not check_datasets([data({"messages": [*ASKED["messages"], calls]})], learned=True), "a call is an answer"


MESSAGES = st.lists(JSON | st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=3)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | JSON,
        "images": JSON | st.lists(JSON | st.just({"path": "x"})),
        "a": JSON,
    },
)
LINES = st.lists((ROWS | JSON).map(lambda row: json.dumps(row).encode()) | st.binary(max_size=60), max_size=4)


@given(LINES, st.sampled_from([(), ("a",)]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_file_passes_or_is_a_users_error_of_one_line(tmp_path_factory, lines, columns):
    file = tmp_path_factory.getbasetemp() / "garbage.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        check_dataset(str(file), columns)
    except PruneKitError as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_name_passes_or_is_a_users_error(name):
    with contextlib.suppress(PruneKitError):
        check_dataset(name)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"messages": ', "[]".encode("utf-16"), b"\xff"])
def test_what_breaks_json_parsers_is_a_users_error(tmp_path, line):
    file = tmp_path / "data.jsonl"
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(PruneKitError, match="data.jsonl"):
        check_dataset(str(file))


@pytest.mark.parametrize(
    "images",
    [
        ["image.png"],
        "image.png",
        [{"path": "image.png"}],
        [{"bytes": None, "path": "image.png"}],
        {"path": "image.png"},
        ["https://a.b/c.png"],
        ["data:image/png;base64,aGVsbG8="],
        ["aGVsbG8" * 50],
        [],
        None,
    ],
    ids=str,
)
def test_every_form_of_image_that_swift_takes_passes(data, images):
    check_dataset(data(ROW | {"images": images}))


@pytest.mark.parametrize(
    "images", [["gone.png"], "gone.png", [{"path": "gone.png"}], ["image.png", "gone.png"]], ids=str
)
def test_a_missing_image_is_named_with_its_line(data, images):
    with pytest.raises(PruneKitError, match=r"data.jsonl line 2 names an image that is not there: 'gone.png'"):
        check_dataset(data(ROW, ROW | {"images": images}))


def test_an_image_as_bytes_which_swift_cant_decode_from_json_is_refused(data):
    with pytest.raises(PruneKitError, match='line 1 gives an image as "bytes": name a path, or give "data:'):
        check_dataset(data(ROW | {"images": [{"bytes": "aGVsbG8=", "path": None}]}))


def test_an_image_in_a_column_of_its_own_is_looked_up_too(data):
    with pytest.raises(PruneKitError, match=r"data.jsonl line 1 names an image that is not there: 'gone.png'"):
        check_dataset(data(ROW | {"image": "gone.png"}))


PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 3"}]}, ROW["messages"][1]]}


@pytest.mark.parametrize("answer", ["5", "true", '"a"', '{"a": 1}'])
def test_texts_that_datasets_would_read_as_json_beside_parts_are_refused(data, answer):
    row = {"messages": [*ASKED["messages"], {"role": "assistant", "content": answer}]}
    assert not check_dataset(data(row, ROW))
    assert not check_dataset(data(PARTS, ROW))
    with pytest.raises(PruneKitError, match=r"line 2 has a content of parts, .* line 1 one of text"):
        check_dataset(data(row, PARTS))


def test_images_are_looked_up_where_swift_looks(data, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    Path("image.png").rename("pictures/a.png")
    name = data(ROW | {"images": ["a.png"]})
    with pytest.raises(PruneKitError):
        check_dataset(name)
    monkeypatch.setenv("ROOT_IMAGE_DIR", "pictures")
    check_dataset(name)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "is not a JSON object"),
        ({"messages": "hello"}, 'has no list "messages"'),
        ({"messages": []}, 'has no list "messages"'),
        ({"messages": [{"role": "user"}]}, 'has a message without "role" and "content"'),
        ({"messages": [{"role": "system", "content": "Read."}]}, "has a system message alone"),
        (ROW, 'has no column "solution"'),
    ],
    ids=str,
)
def test_a_bad_row_is_named_with_its_line(data, row, problem):
    good = ROW | {"solution": "a"}
    with pytest.raises(PruneKitError, match=f"data.jsonl line 3 {problem}"):
        check_dataset(data(good, good, row), ["solution"])


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Read."}]])
def test_an_answer_without_a_question_is_learned_but_not_asked_for(data, system):
    name = data(ROW, {"messages": [*system, ROW["messages"][-1]]})
    check_datasets([name], learned=True)
    with pytest.raises(PruneKitError, match="line 2 has no question before its answer"):
        check_datasets([name], answers=True, asked=True)


def test_an_empty_file_and_an_empty_line_are_refused(data):
    with pytest.raises(PruneKitError, match="is empty: it needs at least one row"):
        check_dataset(data())
    Path("data.jsonl").write_text("\n" + json.dumps(ROW))
    with pytest.raises(PruneKitError, match="line 1 is empty"):
        check_dataset("data.jsonl")


def test_rows_that_a_training_may_draw_are_checked_and_not_the_first_alone(data):
    name = data(ROW, {"messages": []})
    check_datasets([], held_out=[f"{name}#1"])
    with pytest.raises(PruneKitError, match="line 2 has no list"):
        check_datasets([f"{name}#1"])


@pytest.mark.parametrize("name", ["data.jsonl#100", "odd#7.jsonl", "odd.jsonl#7"])
def test_a_number_of_rows_may_follow_the_name(data, name):
    Path(data(ROW)).rename("odd.jsonl" if name == "odd.jsonl#7" else "odd#7.jsonl" if "odd" in name else "data.jsonl")
    check_dataset(name)


@pytest.mark.parametrize(
    "name",
    ["org/name", "org/name#500", "HF::org/gsm8k-v1.1", "ms::org/name:subset/other#5", "org/name:default"],
)
def test_a_hubs_name_is_left_to_swift(data, name):
    check_dataset(name)


@pytest.mark.parametrize(
    "name",
    ["org/name.jsonl", "org/name.csv#5", "name", "a/b/c", "/org/name", "folder/name", "folder", "", "hf::x"],
)
def test_what_is_neither_here_nor_a_hubs_name_is_refused(data, name):
    Path("folder").mkdir()
    with pytest.raises(PruneKitError, match="is not there"):
        check_dataset(name)


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".parquet", ".csv#5"])
def test_tables_and_texts_are_left_to_swift(tmp_path, suffix):
    (tmp_path / f"data{suffix.partition('#')[0]}").write_text("a,b\n1,2\n")
    check_dataset(f"{tmp_path}/data{suffix}")


@pytest.mark.parametrize("name", ["data.tsv", "data.jsonl.gz", "data", "data.JSONL"])
def test_a_file_that_swift_cannot_read_is_refused(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(ROW))
    with pytest.raises(PruneKitError, match=f"{name}: ms-swift reads .arrow, .csv"):
        check_dataset(f"{tmp_path}/{name}")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_more_rows_to_evaluate_on_than_there_are_are_refused(data, suffix):
    name = str(Path(data(ROW, ROW)).rename(f"rows{suffix}"))
    check_datasets([f"{name}#3"], held_out=[name, f"{name}#2", "org/name#9"])
    with pytest.raises(PruneKitError, match=f"{name}#3: has 2 rows to evaluate on, not 3: leave out #3"):
        check_datasets([name], held_out=[f"{name}#3"])


def test_data_sets_of_the_whole_swift_line_are_checked(preflight, tiny, data):
    head = ["--model", tiny("qwen3"), "--template", "qwen3", "--swift", "sft", "--"]
    assert preflight(*head, "--dataset", data(ROW)).returncode == 0
    result = preflight(*head, "--dataset", data(ROW), "--dataset", "absent.jsonl")
    assert result.returncode == 2
    assert "absent.jsonl is not there" in result.stderr


@pytest.mark.parametrize("flag", ["--val-dataset", "--val_dataset", "--val_dataset=absent.jsonl"])
def test_the_users_flag_is_checked_in_place_of_the_launchers(preflight, tiny, data, flag):
    line = ["--val_dataset", data(ROW), flag, *["absent.jsonl"] * ("=" not in flag)]
    result = preflight("--model", tiny("gpt2"), "--", *line)
    assert result.returncode == 2
    assert "absent.jsonl is not there" in result.stderr


def test_columns_renamed_by_swift_leave_rows_to_it(preflight, tiny, data):
    line = ["--columns", '{"conversation": "messages"}', "--dataset", data({"conversation": []})]
    result = preflight("--model", tiny("gpt2"), "--", *line)
    assert result.returncode == 0, result.stderr
