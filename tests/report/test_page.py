"""What a report card draws and writes: models layer by layer, and pages in which nothing of a model's is markup."""

import html.parser

import pytest
from PIL import Image

from prunekit.checkpoint.lineage import StackWay
from prunekit.report import anatomy, page
from prunekit.report.anatomy import Anatomy, draw_anatomy
from prunekit.report.page import Section, write_pages

HOSTILE = (
    "<script src='https://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)> ``` | [a](b) &amp; {{ 7*7 }}"
)


class Reader(html.parser.HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def hostile(tmp_path):
    """Pages all of whose parts say something hostile."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures/a.png")
    row = {"pictures": ["pictures/a.png"], "said": [(HOSTILE, HOSTILE)]}
    parts = [
        page.heading(HOSTILE), page.paragraph(HOSTILE), page.code(HOSTILE), page.picture("pictures/a.png", HOSTILE),
        page.table([HOSTILE, "b"], [[HOSTILE, (HOSTILE, "worse")]], HOSTILE), page.rows_beside([row]),
    ]  # fmt: skip
    write_pages(tmp_path, HOSTILE, HOSTILE, [Section(HOSTILE, parts)])
    return tmp_path


def test_nothing_that_is_said_becomes_markup_of_the_page(hostile):
    found = Reader((hostile / "report.html").read_text())
    assert "script" not in found.tags and found.tags.count("img") == 2
    assert sum(HOSTILE in text for text in found.texts) == 13


def test_the_page_fetches_nothing(hostile):
    text = (hostile / "report.html").read_text()
    assert all(source.startswith("data:image/png;base64,") for source in Reader(text).sources)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text


def test_in_markdown_what_is_said_stays_text(hostile):
    lines = (hostile / "report.md").read_text().splitlines()
    inside, outside = False, []
    for line in lines:
        if line.startswith("````"):
            inside = not inside
        elif not inside:
            outside.append(line)
    prose = "\n".join(line for line in outside if not line.startswith("- "))  # rows are in code
    assert r"\<script" in prose and "<script" not in prose.replace(r"\<", "")
    assert len({line.replace(r"\|", "").count("|") for line in outside if line.startswith("|")}) == 1


def test_code_with_fences_of_its_own_stays_within_one(tmp_path):
    write_pages(tmp_path, "t", "m", [Section("s", [page.code("a\n````\nb")])])
    assert "`````\na\n````\nb\n`````" in (tmp_path / "report.md").read_text()


# --- the drawing


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(anatomy): the axis of what it draws."""
    kept = []
    monkeypatch.setattr(anatomy, "save_figure", lambda figure, path: kept.append(figure))

    def draw(what):
        draw_anatomy(what, tmp_path / "x.png")
        return kept[-1].axes[0]

    return draw


TEXT = StackWay(6, [0, 1, 3, 5], {2: 1, 4: 2}, {1: 1})
VISION = StackWay(4, [0, 1, 3], {2: 1}, {})
BARS = {"text": [("heads", 8, 4), ("KV heads", 4, 1), ("neurons", 100, 75)], "vision": [("blocks", 1, 1)]}


def outlines(axis, dashed):
    """Boxes of layers, by whether their outline is dashed."""
    from matplotlib.patches import FancyBboxPatch

    boxes = [patch for patch in axis.patches if type(patch) is FancyBboxPatch]
    return [box for box in boxes if (box.get_linestyle() not in ("-", "solid")) == dashed]


def test_every_layer_of_the_base_is_drawn_and_removed_ones_are_empty(drawn):
    axis = drawn(Anatomy("t", {"text": TEXT, "vision": VISION}, BARS))
    assert (len(outlines(axis, False)), len(outlines(axis, True))) == (7, 3)
    assert not any(box.get_fill() for box in outlines(axis, True))


def test_bars_are_as_high_as_what_is_left(drawn):
    from matplotlib.patches import Rectangle

    axis = drawn(Anatomy("t", {"text": StackWay(1, [0], {}, {})}, BARS))
    heights = [bar.get_height() for bar in axis.patches if isinstance(bar, Rectangle)]
    assert [now / full for full, now in zip(heights[::2], heights[1::2])] == pytest.approx([0.5, 0.25, 0.75])
    for tokens, more in (((100, 20), [1.0, 0.2]), ((100, 100), [])):  # of a vocabulary that is whole nothing is drawn
        axis = drawn(Anatomy("t", {"text": StackWay(1, [0], {}, {})}, BARS, tokens=tokens))
        bars = [bar.get_height() for bar in axis.patches if isinstance(bar, Rectangle)]
        assert bars[: len(heights)] == heights and bars[len(heights) :] == pytest.approx(more)


def test_a_seam_is_healed_only_if_that_was_done_when_it_came_about(drawn):
    from prunekit.report.style import FREE

    axis = drawn(Anatomy("t", {"text": StackWay(6, [0, 1, 5], {2: 1, 3: 2, 4: 2}, {1: 1})}, BARS))
    assert [line.get_color() == FREE for line in axis.lines] == [False]
    axis = drawn(Anatomy("t", {"text": TEXT}, BARS))
    assert [line.get_color() == FREE for line in axis.lines] == [True, False]


def test_taps_lead_to_the_first_text_layers_that_are_left(drawn):
    text = StackWay(4, [1, 3], {0: 1, 2: 1}, {})
    axis = drawn(Anatomy("t", {"text": text, "vision": VISION}, BARS, [(0, 0), (1, None), (2, 3)]))
    arrows = [note for note in axis.texts if getattr(note, "arrow_patch", None)]
    assert [(round(note.xyann[0] - 0.42), round(note.xy[0] - 0.42)) for note in arrows] == [(0, 1), (3, 3)]


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    draw_anatomy(Anatomy("$\\frac{", {"text": TEXT}, BARS, notes=["a $ b$"]), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
