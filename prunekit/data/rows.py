"""Rows of data sets, read once and checked while they are read: JSON lines or one JSON array, FILE or FILE#N."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

from prunekit.arguments import is_file
from prunekit.checkpoint.provenance import DataDigest
from prunekit.errors import PruneKitError

ROWS_CHECKED = 10_000

LIKE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["…"]}'
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # of a whole file
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
NAMES = {"image": "images", "video": "videos", "audio": "audios", "system_prompt": "system"}  # ms-swift's for columns


class Rows(list[dict[str, Any]]):
    """Rows, the name of the data set that they are of, and its record for histories as `data_record` makes it."""

    def __init__(self, name: str | Path, rows: Iterable[dict[str, Any]] = ()):
        super().__init__(rows)
        self.name = str(name)
        self.record: dict[str, Any] = {"path": self.name}

    def read(self, check: Callable[[str, Any], None], limit: int | None = None) -> Self:
        """Append the rows of the data set, the first `limit` (None: all), each checked as it is read.

        `check` gets where a row is and the row, and raises PruneKitError for a bad one. The record gets the file's
        sha256 where all is read. Raises as `iterate`.
        """
        digest = DataDigest() if limit is None else None
        for where, row in islice(iterate(self.name, digest), limit):
            check(where, row)
            self.append(row)
        if digest:
            self.record = digest.record(self.name)
        return self


def locate(name: str | Path) -> tuple[Path, int | None]:
    """The file of a data set and how many of its first rows are meant (None: all), by ms-swift's FILE and FILE#N.

    Raises PruneKitError for what is no file here: a hub's name, a folder, nothing.
    """
    name, count = str(name), None
    if not is_file(name) and (numbered := re.fullmatch(r"(.*)#(\d{1,15})", name, re.DOTALL)):
        name, count = numbered[1], int(numbered[2])
    if not is_file(name):
        raise PruneKitError(
            f"dataset {repr(name[:300])[1:-1]} is not there: give a JSONL file, or download it if that is a hub's name"
        )
    return Path(name), count


def _parse(raw: bytes) -> Any:
    value = json.loads(raw.decode())
    if SURROGATE.search(raw):  # half of a pair is no text: tokenizers fail on it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def as_messages(row: Any) -> Any:
    """A row of messages as ms-swift's data sets read its other columns: `image` is `images`, `system` a first message.

    What has no messages is left as it is, and a column that there is under both names.
    """
    if not isinstance(row, dict) or not isinstance(messages := row.get("messages"), list):
        return row
    row = {many if (many := NAMES.get(name)) and many not in row else name: value for name, value in row.items()}
    system = row.pop("system", None)
    if system is not None and messages and not (isinstance(messages[0], dict) and messages[0].get("role") == "system"):
        row["messages"] = [{"role": "system", "content": system}, *messages]
    return row


def iterate(name: str | Path, digest: DataDigest | None = None) -> Iterator[tuple[str, Any]]:
    """(where, value) of each row, `as_messages`; where is like "dataset FILE line 3", to begin a user's message with.

    `digest` gets all of the file, also what is behind FILE#N's last row, if one iterates to the end. Raises
    PruneKitError for a file that can't be read, isn't UTF-8, isn't JSON or has no rows.
    """
    path, count = locate(name)
    number, where = 0, f"dataset {path}"
    try:
        with path.open("rb") as file:
            array = path.suffix == ".json" and file.read(64).lstrip().startswith(b"[")
            file.seek(0)
            source = digest.reading(file) if digest else file
            for value in islice(_parse(b"".join(source)) if array else source, count):
                number, where = number + 1, f"dataset {path} {'row' if array else 'line'} {number + 1}"
                if not array and not value.strip():
                    raise PruneKitError(f"{where} is empty: remove it, or mend the row")
                yield where, as_messages(value if array else _parse(value))
            for _ in source if digest else ():
                pass
    except UnicodeError:
        raise PruneKitError(f"{where} is not UTF-8 text, or has half of a surrogate pair: convert it") from None
    except (ValueError, RecursionError) as error:  # also numbers of 5000 digits, 5000 brackets
        raise PruneKitError(f"{where} is not JSON ({error}): one JSON object per line") from None
    except OSError as error:
        raise PruneKitError(f"{where} cannot be read: {error.strerror}") from None
    if number == 0:
        raise PruneKitError(f"dataset {path} is empty: it needs at least one row")


def problem_of_image(image: object, decode: bool = False) -> str | None:
    """What is wrong with the image of a row: a path, or {"path": ...}. URLs and base64 (long, without a dot) pass.

    Without `decode` only the header is read, and of a file without its format's end all: most are so known as whole.
    """
    from PIL import Image

    if isinstance(image, dict) and image.get("bytes") is not None:  # of JSON they are text, of which it decodes nothing
        return 'gives an image as "bytes": name a path, or give "data:image/png;base64,…"'
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or "://" in path or path.startswith("data:"):
        return None
    if len(path) > 255 and "." not in path:
        return None
    file = Path(os.environ.get("ROOT_IMAGE_DIR", ""), path)
    if not is_file(file):
        return f"names an image that is not there: {path[:200]!r}"
    try:
        with Image.open(file) as picture, file.open("rb") as raw:
            end = ENDS.get(picture.format or "")
            with contextlib.suppress(OSError):  # a file shorter than that
                raw.seek(-64, os.SEEK_END)
            if decode or end is None or end not in raw.read():
                picture.load()
    except Exception as error:  # Pillow raises what it likes
        words = str(error).replace(str(file), "it").splitlines() or [type(error).__name__]
        return f"names an image that can't be read: {path[:200]!r} ({words[0][:200]})"
    return None


def images_of(row: dict[str, Any]) -> list[object]:
    images = row.get("images")
    return images if isinstance(images, list) else [images]


def check_messages(where: str, row: Any, columns: Iterable[str] = (), images: bool = True) -> None:
    """PruneKitError for a row that isn't ms-swift's messages, lacks a column, or names an image that can't be read."""
    problem = None
    if not isinstance(row, dict):
        problem = "is not a JSON object"
    elif not isinstance(messages := row.get("messages"), list) or not messages:
        problem = 'has no list "messages"'
    elif not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        problem = 'has a message without "role" and "content"'
    elif not all(isinstance(m["role"], str) and isinstance(m["content"], str | list | None) for m in messages):
        problem = 'has a message whose "role" or "content" is no text'
    elif all(message["role"] == "system" for message in messages):  # ms-swift would put another row in its place
        problem = "has a system message alone"
    elif missing := [column for column in columns if column not in row]:
        problem = f'has no column "{missing[0]}"'
    if problem:
        raise PruneKitError(f"{where} {problem}: rows look like {LIKE}")
    for image in images_of(row) if images else ():
        if problem := problem_of_image(image):
            raise PruneKitError(f"{where} {problem}")


def has_answer(messages: list[dict[str, Any]]) -> bool:
    """Whether one of these messages is a model's own: what is learned of them."""
    said = (each for each in messages if each["role"] in ("assistant", "tool_call"))
    return any(each["content"] is not None or each.get("tool_calls") for each in said)


def is_text(row: Any) -> bool:
    """Whether a row is plain text, {"text": ...}, and no chat: other columns but messages don't matter."""
    return isinstance(row, dict) and "text" in row and "messages" not in row


def check_row(where: str, row: Any, texts: bool, columns: Iterable[str] = (), images: bool = True) -> None:
    """PruneKitError for a row that isn't what the first one of its data set is: a text, or as `check_messages` says."""
    if isinstance(row, dict) and is_text(row) != texts:
        raise PruneKitError(f'{where}: rows must all be {{"text": ...}}, or all have "messages"')
    if not texts:
        check_messages(where, row, columns, images)
    elif not (isinstance(row, dict) and isinstance(row["text"], str) and row["text"].strip()):
        raise PruneKitError(f"{where} has no text")


def check_answered(where: str, row: dict[str, Any]) -> None:
    """PruneKitError for messages that aren't a question, at the least, and an assistant's text."""
    if row["messages"][-1]["role"] != "assistant" or not isinstance(row["messages"][-1]["content"], str):
        raise PruneKitError(f"{where} ends without an assistant message to compare with")
    check_asks(where, row["messages"])


def check_asks(where: str, messages: list[dict[str, Any]]) -> None:
    """PruneKitError for messages that have no question, before their answer if there is one."""
    if all(message["role"] == "system" for message in question_of(messages)):  # or there is none
        raise PruneKitError(f"{where} has no question before its answer")


def read_answered(dataset: str | Path, limit: int | None = None) -> Rows:
    """The first rows: all texts, or messages whose last one is the assistant's. PruneKitError names one that isn't."""
    rows = Rows(dataset)

    def check(where: str, row: Any) -> None:
        texts = is_text((rows or [row])[0])
        check_row(where, row, texts)
        if not texts:
            check_answered(where, row)

    return rows.read(check, limit)


def read_datasets(names: Sequence[str], limit: int | None) -> dict[str, Rows]:
    """Rows of `read_answered` by what results call their data set: the file's stem, or its name if stems are alike."""
    stems = [locate(name)[0].stem for name in names]
    keys = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise PruneKitError(f"--dataset {twice[0]}: is named twice")
    return {key: read_answered(name, limit) for key, name in zip(keys, names)}


def question_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without their answer, if they have one."""
    return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages


def text_of(messages: list[dict[str, Any]]) -> str:
    """What the last message says, without images."""
    content = messages[-1]["content"] if messages else ""
    if isinstance(content, list):
        content = " ".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return (content or "").replace("<image>", "").strip()


def find_question(names: Iterable[str], messages: list[dict[str, Any]]) -> str | None:
    """Where in these data sets the first row asks what `messages` ask, as `iterate` says it; None if none does."""
    asked = [(message["role"], message["content"]) for message in question_of(messages)]
    for name in names:
        with contextlib.suppress(PruneKitError):  # a hub's
            for where, row in iterate(name):
                given = question_of(row.get("messages") or []) if isinstance(row, dict) else []
                if [(message.get("role"), message.get("content")) for message in given] == asked:
                    return where
    return None
