"""A report as pages: sections of headings, texts, tables, pictures and rows, as HTML and as Markdown.

Nothing that comes from models or data gets into a page as markup.
"""

import re
from base64 import b64encode
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
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    jinja.filters["inline"] = lambda name: f"data:image/png;base64,{b64encode((folder / name).read_bytes()).decode()}"
    html = jinja.get_template("card.html.jinja").render(title=title, made=made, sections=sections)
    blocks = [f"# {plain(title)}", plain(made)]
    for section in sections:
        blocks += [f"## {plain(section.title)}", *map(_markdown, section.parts)]
    for end, text in (("html", html), ("md", "\n\n".join(blocks) + "\n")):
        (folder / f"report.{end}").write_text(text, encoding="utf-8", errors="backslashreplace")


def _markdown(part: Part) -> str:
    match part["kind"]:
        case "heading":
            return f"### {plain(part['text'])}"
        case "text":
            return plain(part["text"])
        case "code":
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part["text"])), default=0))
            return f"{fence}\n{part['text'].rstrip()}\n{fence}"
        case "picture":
            return f"![{plain(part['alt'])}]({part['name']})"
        case "table":
            rows = [part["head"], *([cell["text"] for cell in row] for row in part["rows"])]
            lines = [f"| {' | '.join(map(plain, row))} |" for row in rows]
            lines.insert(1, f"|---|{'---:|' * (len(part['head']) - 1)}")
            return "\n".join(lines) + (f"\n\n{plain(part['note'])}" if part["note"] else "")
    said = []
    for row in part["rows"]:
        pictures = "".join(f"![a picture of the question]({name}) " for name in row["pictures"])
        said.append(f"- {pictures}{'; '.join(f'{plain(who)}: {code_span(what)}' for who, what in row['said'])}")
    return "\n".join(said)


def plain(text: str) -> str:
    """Text as one line of Markdown that no reader takes for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", " ".join(str(text).split()))
