"""A report as pages: sections of headings, texts, tables, pictures and rows, as HTML and as Markdown.

Nothing that comes from models or data gets into a page as markup.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.checkpoint.card import code_span

Part = dict[str, Any]  # its `kind` and what that has; see the functions below


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[Part] = field(default_factory=list)


def heading(text: str) -> Part:
    return {"kind": "heading", "text": text}


def paragraph(text: str) -> Part:
    return {"kind": "text", "text": text}


def code(text: str) -> Part:
    return {"kind": "code", "text": text}


def picture(name: str, alt: str) -> Part:
    """name: of a PNG in the report's folder, which the pages lie in."""
    return {"kind": "picture", "name": name, "alt": alt}


def table(head: list[str], rows: list[list[Any]], note: str = "") -> Part:
    """Cells are texts, or (text, "better" or "worse")."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    return {"kind": "table", "head": head, "rows": cells, "note": note}


def _cell(cell: Any) -> dict[str, str]:
    text, mark = cell if isinstance(cell, tuple) else (cell, "")
    return {"text": str(text), "mark": mark}


def rows_beside(rows: list[dict[str, Any]]) -> Part:
    """Rows of data, each with names of `pictures` in the folder, and what was `said`: pairs of who and what."""
    return {"kind": "rows", "rows": rows}


def write_pages(folder: Path, title: str, made: str, sections: list[Section]) -> None:
    """report.html, with the folder's pictures in it, and report.md, which names them."""
    values = {"title": title, "made": made, "sections": sections}
    for end, filters in (("html", {"inline": _inliner(folder)}), ("md", MARKDOWN)):
        page = _environment(end, filters).get_template(f"card.{end}.jinja").render(values)
        (folder / f"report.{end}").write_text(page, encoding="utf-8", errors="backslashreplace")


def _environment(end: str, filters: dict[str, Callable[[str], str]]):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=end == "html", trim_blocks=end == "md",
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    found.filters |= filters
    return found


def _inliner(folder: Path) -> Callable[[str], str]:
    return lambda name: f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}"


def plain(text: str) -> str:
    """Text as one line of Markdown that no reader takes for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", " ".join(str(text).split()))


def fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


MARKDOWN = {"plain": plain, "cell": plain, "code": code_span, "fenced": fenced}
