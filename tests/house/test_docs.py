"""README, CONTRIBUTING, docs/ and the tour name what is there: links and their headings, files, modules, wings."""

import ast
import importlib.util
import re

import nbformat
import pytest
from helpers.paths import ROOT, TOUR

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").glob("*/README.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
TEXTS[TOUR] = "\n\n".join(cell.source for cell in nbformat.read(TOUR, as_version=4).cells)
PAGES.append(TOUR)
TOPICS = [page for page in DOCS if page.name != "gpu.md"]
FOLDERS = ("bench", "docs", "examples", "lib", "plugins", "prunekit", "tests")
FILE = re.compile(rf"(?<![\w./$-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|sh|md|json|png))\b")
SCRIPT = re.compile(r"(?:\b(?:bash|python) |`)([\w./-]+\.(?:py|sh))\b")
NOT_OURS = {"plugins/digit_reward.py", "command.sh"}  # a user's, a stage's
CODE = [*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))]
COMMAND = re.compile(r"python (?:-m prunekit\.|[\w/]+\.py\b)([^`|#&\n]*)")
LAUNCHERS = [*ROOT.glob("*.sh"), *(ROOT / "lib").glob("*.sh")]
LAUNCHER = re.compile(r"((?:[A-Z][A-Z_0-9]*=(?:'[^'\n]*'|\S*) +)+)bash (?:lib/)?(\w+\.sh)")


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(TEXTS[target]), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page):
    named = {*FILE.findall(TEXTS[page]), *SCRIPT.findall(TEXTS[page])} - NOT_OURS
    assert [name for name in sorted(named) if not any((at / name).exists() for at in (ROOT, page.parent))] == []
    modules = re.findall(r"-m (prunekit(?:\.\w+)+)", TEXTS[page])
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_settings_that_a_page_names_are_there(page):
    lines = re.sub(r"\\\n\s*", " ", TEXTS[page])
    flags = {flag for rest in COMMAND.findall(lines) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", rest)}
    known = {flag for file in CODE for flag in re.findall(r"""["'](--[a-z][\w-]*)["']""", file.read_text())}
    assert flags - known == set()
    common = (ROOT / "lib/common.sh").read_text()
    for settings, launcher in LAUNCHER.findall(lines):
        read = common + next(file for file in LAUNCHERS if file.name == launcher).read_text()
        unknown = [name for name in re.findall(r"([A-Z][A-Z_0-9]*)=", settings) if not re.search(rf"\b{name}\b", read)]
        assert [name for name in unknown if not name.startswith("PRUNEKIT_")] == [], launcher  # those are a plugin's


def test_commands_in_docstrings_keep_their_line_breaks():
    """Behind a single backslash a line goes on, in a docstring as in a shell: `--help` would show both as one."""
    for file in CODE:
        text = ast.get_docstring(ast.parse(file.read_text()), clean=False) or ""
        assert re.search(r"\S {4,}-", text) is None, file


def test_pages_that_the_code_names_exist():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        files += [file for end in ("py", "sh") for file in (ROOT / folder).rglob(f"*.{end}")]
    named = {(page, file.name) for file in files for page in re.findall(r"\bdocs/\w+\.md\b", file.read_text())}
    assert named
    assert [each for each in sorted(named) if not (ROOT / each[0]).exists()] == []


@pytest.mark.parametrize("page", TOPICS, ids=lambda page: page.name)
def test_every_topics_page_has_the_same_sections(page):
    assert re.findall(r"^## (.*)", TEXTS[page], re.MULTILINE) == ["How to", "How it works", "Measured", "Limits"]


def test_every_wing_has_a_line_in_the_readme():
    wings = {file.parent.name for file in (ROOT / "prunekit").glob("*/__init__.py")}
    where = TEXTS[ROOT / "README.md"].partition("\n## What is where")[2]
    assert {wing for wing in wings if not re.search(rf"^  .*\b{wing}/", where, re.MULTILINE)} == set()
