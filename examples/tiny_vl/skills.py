"""The skills of the tiny Qwen3-VL: scenes, their questions and answers, and how a scene is drawn.

A scene is planned first (what is in it, what is asked: `plan`) and drawn later (`draw`), so that what a data set holds
is known without drawing it, and a training never draws what is held out.
"""

import string
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tiny_ocr import CYRILLIC, LOOKALIKES, font

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
# O and 0, I and 1 are left out: nobody tells them apart in a blurred code.
CODE = "".join(sorted(set(string.ascii_uppercase + string.digits) - set("O0I1")))
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
COLOURS = {
    "red": (205, 35, 35),
    "green": (35, 150, 55),
    "blue": (40, 70, 205),
    "yellow": (235, 205, 30),
    "purple": (140, 50, 165),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
ORDINALS = ("first", "second", "third")
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
CELL = 32  # pixels of an image token: patches of 16, merged 2 by 2
# Pictures in cells, (rows, columns); None: a question without a picture.
SIZES: dict[str, tuple[int, int] | None] = {
    "read": (1, 4),
    "line": (3, 4),
    "count": (3, 3),
    "place": (3, 3),
    "bars": (3, 3),
    "add": (1, 4),
    "add_text": None,
    "copy": None,
    "cyrillic": (1, 4),
}
SKILLS = tuple(name for name in SIZES if name != "cyrillic")  # what has to be learned well
SPOILS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What grows while a skill is learned: from and to how many letters, things or bars, or up to which number; and how much
# of a picture's spoiling there is (`Look.eased`). The last is the goal. Every skill begins with what a network can
# hardly miss, in the plainest of pictures: among things in pictures half spoiled from the first step on, none was found
# after as many questions as it took in plain ones to place two or three.
LEVELS: dict[str, list[tuple[Any, float]]] = {
    "read": [((1, 1), 0.0), ((1, 2), 0.1), ((1, 3), 0.25), ((2, 4), 0.4), ((2, 5), 0.6), ((3, 6), 0.8), ((3, 7), 1.0)],
    "line": [((1, 1), 0.1), ((1, 2), 0.25), ((2, 4), 0.5), ((2, 5), 0.75), ((2, 5), 1.0)],
    "count": [((1, 2), 0.0), ((2, 4), 0.0), *(((3, 7), spoil) for spoil in SPOILS)],
    "place": [((1, 1), 0.0), ((2, 3), 0.0), *(((3, 5), spoil) for spoil in SPOILS)],
    "bars": [((1, 1), 0.0), ((2, 3), 0.0), ((3, 5), 0.0), ((3, 5), 0.5), ((3, 5), 1.0)],
    "add": [(9, 0.1), (30, 0.25), (99, 0.5), (99, 0.75), (99, 1.0)],
    "add_text": [(9, 0.0), (30, 0.0), (99, 0.0)],
    "copy": [((1, 3), 0.0), ((3, 7), 0.0)],
    "cyrillic": [((1, 1), 0.0), ((1, 2), 0.1), ((1, 3), 0.25), ((2, 4), 0.4), ((2, 5), 0.6), ((3, 6), 1.0)],
}


@dataclass(frozen=True)
class Look:
    """How hard a picture is: font sizes and shift in pixels, noise, contrast, how light ink may be and tint in grey
    levels, rotation in degrees, blur as its radius in pixels, how many stains at most, of how many fonts, and how
    often light on dark."""

    sizes: tuple[int, int] = (18, 24)
    fonts: int = len(FONTS)
    ink: float = 110.0
    tint: float = 20.0
    inverted: float = 0.15
    noise: float = 14.0
    rotation: float = 2.0
    contrast: int = 90
    shift: float = 20.0
    blur: float = 0.8
    stains: int = 2

    def eased(self, ease: float) -> "Look":
        """What a beginner sees: black on white, of one size and font, grows to ours with `ease` from 0 to 1."""
        spoils = {
            name: getattr(self, name) * ease
            for name in ("ink", "tint", "inverted", "noise", "rotation", "shift", "blur")
        }
        counts = {"stains": round(self.stains * ease), "fonts": 1 + round((self.fonts - 1) * ease)}
        smallest, largest = self.sizes
        middle = (smallest + largest) / 2
        sizes = round(middle + (smallest - middle) * ease), round(middle + (largest - middle) * ease)
        contrast = round(200 + (self.contrast - 200) * ease)
        return replace(self, sizes=sizes, contrast=contrast, **spoils, **counts)


PLAIN = Look()
HARD = Look(sizes=(14, 19), noise=36.0, rotation=4.0, contrast=55, blur=1.4, stains=4)


@dataclass(frozen=True)
class Scene:
    """What is to be drawn, what is asked about it, and by what it is known again.

    turns: prompts and answers about the same picture; a data set asks the first alone. keys: no training may draw a
    scene of which a key is held out. content: what is in the picture, for `draw` and for who checks the answers.
    """

    skill: str
    turns: list[tuple[str, str]]
    keys: frozenset[str]
    content: dict[str, Any] = field(default_factory=dict)


def make_word(rng: np.random.Generator, lengths: tuple[int, int]) -> str:
    """A word that can be pronounced (lower, upper or title case), a number, or a code of capitals and digits."""
    length = int(rng.integers(lengths[0], lengths[1] + 1))
    style = rng.choice(["lower", "upper", "title", "digits", "code"], p=[0.4, 0.15, 0.2, 0.1, 0.15])
    if style in ("digits", "code"):
        return "".join(rng.choice(list(string.digits if style == "digits" else CODE), length))
    first = int(rng.integers(4) == 0)
    sounds = [(CONSONANTS, VOWELS)[(first + number) % 2] for number in range(length)]
    word = "".join(sound[rng.integers(len(sound))] for sound in sounds)
    return {"upper": word.upper(), "title": word.capitalize()}.get(style, word)


def make_cyrillic(rng: np.random.Generator, lengths: tuple[int, int]) -> str:
    """A random word in Cyrillic, lower, upper or title case, at least half of it letters that are no Latin ones."""
    while True:
        word = "".join(rng.choice(list(CYRILLIC), int(rng.integers(lengths[0], lengths[1] + 1))))
        word = (word, word, word.upper(), word.capitalize())[rng.integers(4)]
        if sum(letter not in LOOKALIKES for letter in word) * 2 >= len(word):
            return word


def _lexicon() -> list[str]:
    """Words of the sentences that are copied. They are the vocabulary's, so the same for every seed."""
    rng = np.random.default_rng(20)
    words: dict[str, None] = {}
    while len(words) < 1500:
        length, first = int(rng.integers(2, 6)), int(rng.integers(4) == 0)
        sounds = [(CONSONANTS, VOWELS)[(first + number) % 2] for number in range(length)]
        words["".join(sound[rng.integers(len(sound))] for sound in sounds)] = None
    return list(words)


LEXICON = _lexicon()


def plan(rng: np.random.Generator, skill: str, level: int = -1) -> Scene:
    """Think up a scene of this skill; `level` is a number into its LEVELS."""
    return globals()[f"_plan_{skill}"](rng, LEVELS[skill][level][0])


def _plan_read(rng: np.random.Generator, lengths: tuple[int, int]) -> Scene:
    word = make_word(rng, lengths)
    return Scene("read", [("Read the text.", word)], frozenset([word.lower()]), {"lines": [word]})


def _plan_cyrillic(rng: np.random.Generator, lengths: tuple[int, int]) -> Scene:
    word = make_cyrillic(rng, lengths)
    return Scene("cyrillic", [("Read the text.", word)], frozenset([word.lower()]), {"lines": [word]})


def _plan_line(rng: np.random.Generator, lengths: tuple[int, int]) -> Scene:
    lines = [make_word(rng, lengths) for _ in ORDINALS]
    turns = [(f"Read the {ORDINALS[number]} line.", lines[number]) for number in rng.permutation(3)]
    return Scene("line", turns, frozenset(line.lower() for line in lines), {"lines": lines})


def _things(rng: np.random.Generator, number: int, kinds: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Things (colour, shape) in so many different cells of a 3 by 3 grid."""
    cells = rng.permutation(9)[:number]
    return [
        {"colour": colour, "shape": shape, "row": int(cell) // 3, "column": int(cell) % 3}
        for (colour, shape), cell in zip(kinds, cells, strict=True)
    ]


def _key(skill: str, things: list[dict[str, Any]]) -> str:
    return skill + repr(sorted(tuple(thing.values()) for thing in things))


def _plan_count(rng: np.random.Generator, sizes: tuple[int, int]) -> Scene:
    colours, turns = list(COLOURS), []
    number = int(rng.integers(sizes[0], sizes[1] + 1))
    # Few kinds, so that there is something to count.
    shapes = rng.choice(SHAPES, 2, replace=False)
    palette = rng.choice(colours, 2, replace=False)
    split = rng.integers(0, number + 1)  # every count as probable as another
    kinds = [(str(palette[rng.integers(2)]), str(shapes[int(index < split)])) for index in range(number)]
    things = _things(rng, number, kinds)
    for shape in map(str, shapes):
        turns.append((f"How many {shape}s are there?".replace("crosss", "crosses"), "shape", shape))
    first = int(rng.integers(2))
    for colour in map(str, (palette[first], palette[1 - first])):
        turns.append((f"How many {colour} shapes are there?", "colour", colour))
    order = [*rng.permutation(3), 3]
    asked = [(prompt, str(sum(thing[kind] == value for thing in things))) for prompt, kind, value in turns]
    return Scene("count", [asked[index] for index in order], frozenset([_key("count", things)]), {"things": things})


def _plan_place(rng: np.random.Generator, sizes: tuple[int, int]) -> Scene:
    kinds = list(product(COLOURS, SHAPES))
    number = int(rng.integers(sizes[0], sizes[1] + 1))
    things = _things(rng, number, [kinds[index] for index in rng.permutation(len(kinds))[:number]])
    names = {(thing["row"], thing["column"]): f"{thing['colour']} {thing['shape']}" for thing in things}
    beside, simple = [], []
    for (row, column), name in names.items():
        for relation, (down, right) in BESIDE.items():
            if other := names.get((row + down, column + right)):
                # "What is left of the red circle?" asks for what lies at (row, column - 1).
                beside.append((f"What is {relation} the {name}?", other))
        simple.append((f"Where is the {name}?", PLACES[row * 3 + column]))
        simple.append((f"What is in the {PLACES[row * 3 + column]}?", name))
    for colour, shape in (name.split() for name in names.values()):
        if sum(name.endswith(shape) for name in names.values()) == 1:
            simple.append((f"What colour is the {shape}?", colour))
    turns = []
    for _ in range(3):
        pool = beside if beside and rng.random() < 0.5 else simple
        turns.append(pool.pop(int(rng.integers(len(pool)))))
    return Scene("place", turns, frozenset([_key("place", things)]), {"things": things})


def _plan_bars(rng: np.random.Generator, sizes: tuple[int, int]) -> Scene:
    number = int(rng.integers(sizes[0], sizes[1] + 1))
    heights = [int(height) for height in rng.permutation(10)[:number] + 1]
    names = "ABCDE"[:number]
    colours = [str(colour) for colour in rng.choice(list(COLOURS), number, replace=False)]
    turns = [(f"What is the value of bar {name}?", str(height)) for name, height in zip(names, heights, strict=True)]
    turns = [turns[index] for index in rng.permutation(number)[:3]]
    if number > 1 and rng.integers(3) == 0:
        which, best = [("highest", max), ("lowest", min)][rng.integers(2)]
        turns[int(rng.integers(2))] = (f"Which bar is the {which}?", names[heights.index(best(heights))])
    content = {"heights": heights, "colours": colours}
    return Scene("bars", turns, frozenset([f"bars{content}"]), content)


def _numbers(rng: np.random.Generator, largest: int) -> tuple[int, int]:
    return int(rng.integers(largest + 1)), int(rng.integers(largest + 1))


def _plan_add(rng: np.random.Generator, largest: int) -> Scene:
    one, two = _numbers(rng, largest)
    keys, lines = frozenset([f"{one}+{two}"]), [f"{one} + {two}"]
    return Scene("add", [("Add the two numbers.", str(one + two))], keys, {"lines": lines})


def _plan_add_text(rng: np.random.Generator, largest: int) -> Scene:
    one, two = _numbers(rng, largest)
    return Scene("add_text", [(f"What is {one} + {two}?", str(one + two))], frozenset([f"{one}+{two}"]))


def _plan_copy(rng: np.random.Generator, lengths: tuple[int, int]) -> Scene:
    if rng.integers(2):
        text = make_word(rng, lengths)
    else:
        number = int(rng.integers(2, 5))
        # Some words are often there and some rarely, though not as in Zipf's law: they are to be learned in an hour.
        text = " ".join(LEXICON[int(rank)] for rank in len(LEXICON) * rng.random(number) ** 2)
    return Scene("copy", [(f"Repeat:\n{text}", text)], frozenset([text.lower()]))


def draw(rng: np.random.Generator, scene: Scene, look: Look) -> np.ndarray | None:
    """Draw a scene. Returns RGB, uint8 (height, width, 3), or None for one without a picture."""
    if (size := SIZES[scene.skill]) is None:
        return None
    shape = size[0] * CELL, size[1] * CELL
    if "lines" in scene.content:
        pixels = _draw_lines(rng, scene.content["lines"], shape, look)
    elif "things" in scene.content:
        pixels = _draw_things(rng, scene.content["things"], shape, look)
    else:
        pixels = _draw_bars(rng, scene.content, shape, look)
    return _spoil(rng, pixels, look)


def _tint(rng: np.random.Generator, grey: float, spread: float) -> np.ndarray:
    return np.clip(grey + rng.uniform(-spread, spread, 3), 0, 255).astype(np.float32)


def _draw_lines(rng: np.random.Generator, lines: list[str], shape: tuple[int, int], look: Look) -> np.ndarray:
    """Lines of text, as many as there are rows of cells, in one font."""
    height, width = shape
    name, size = FONTS[rng.integers(look.fonts)], int(rng.integers(look.sizes[0], look.sizes[1] + 1))
    boxes = [font(name, size).getbbox(line) for line in lines]
    while max(box[2] - box[0] for box in boxes) > width - 8:
        size -= 1
        boxes = [font(name, size).getbbox(line) for line in lines]
    cover = Image.new("L", (width, height))
    for row, (line, box) in enumerate(zip(lines, boxes, strict=True)):
        slack = width - (box[2] - box[0]) - 4, CELL - (box[3] - box[1]) - 4
        x = 2 - box[0] + rng.uniform(0, min(look.shift, slack[0]))
        y = row * CELL + 2 - box[1] + max(slack[1], 0) * (0.5 + rng.uniform(-0.4, 0.4) * min(1, look.shift / 20))
        ImageDraw.Draw(cover).text((x, y), line, fill=255, font=font(name, size))
    angle = rng.uniform(-look.rotation, look.rotation) * min(1.0, 60 / max(box[2] - box[0] for box in boxes))
    alpha = np.asarray(cover.rotate(angle, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    dark = rng.uniform(0, look.ink)
    light = rng.uniform(dark + look.contrast, 255)
    if rng.random() < look.inverted:  # light on dark
        dark, light = light, dark
    return _tint(rng, dark, look.tint) * alpha + _tint(rng, light, look.tint) * (1 - alpha)


def _draw_things(rng: np.random.Generator, things: list[dict], shape: tuple[int, int], look: Look) -> np.ndarray:
    image = Image.new("RGB", shape[::-1], tuple(_tint(rng, rng.uniform(190, 250), 12).astype(int)))
    pen = ImageDraw.Draw(image)
    for thing in things:
        radius = rng.uniform(8, 12.5)
        slack = (CELL / 2 - radius) * min(1, look.shift / 20)
        x, y = (CELL * (cell + 0.5) + rng.uniform(-slack, slack) for cell in (thing["column"], thing["row"]))
        colour = tuple(np.clip(np.array(COLOURS[thing["colour"]]) + rng.uniform(-20, 20, 3), 0, 255).astype(int))
        box = (x - radius, y - radius, x + radius, y + radius)
        match thing["shape"]:
            case "circle":
                pen.ellipse(box, colour)
            case "square":
                pen.rectangle(tuple(np.array(box) + np.array([1, 1, -1, -1]) * radius * 0.12), colour)
            case "triangle":
                pen.polygon([(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)], colour)
            case "cross":
                pen.line([box[:2], box[2:]], colour, width=6)
                pen.line([(box[0], box[3]), (box[2], box[1])], colour, width=6)
    return np.asarray(image, np.float32)


def _draw_bars(rng: np.random.Generator, content: dict, shape: tuple[int, int], look: Look) -> np.ndarray:
    """Bars over an axis from 0 to 10 with lines at every second unit and its numbers at 0, 5 and 10."""
    height, width = shape
    image = Image.new("RGB", (width, height), tuple(_tint(rng, rng.uniform(215, 250), 8).astype(int)))
    pen, number = ImageDraw.Draw(image), len(content["heights"])
    jump = rng.uniform(-2, 2, 2) * min(1, look.shift / 20)
    left, bottom, unit = 17 + jump[0], height - 17 + jump[1], 7
    for value in range(0, 11):
        y = bottom - value * unit
        pen.line([(left, y), (width - 3, y)], (170,) * 3 if value % 5 else (110,) * 3)
        if value % 5 == 0:
            pen.text((left - 3, y), str(value), (40,) * 3, font=font("DejaVuSans", 9), anchor="rm")
    pitch = (width - 4 - left) / number
    thick = pitch * rng.uniform(0.5, 0.8)
    for index, (value, colour) in enumerate(zip(content["heights"], content["colours"], strict=True)):
        x = left + pitch * (index + 0.5)
        pen.rectangle((x - thick / 2, bottom - value * unit, x + thick / 2, bottom), COLOURS[colour])
        pen.text((x, bottom + 8), "ABCDE"[index], (30,) * 3, font=font("DejaVuSans", 11), anchor="mm")
    pen.line([(left, bottom - 10 * unit), (left, bottom)], (40,) * 3)
    return np.asarray(image, np.float32)


def _spoil(rng: np.random.Generator, pixels: np.ndarray, look: Look) -> np.ndarray:
    """What a camera does: stains and uneven light, blur, noise. float32 (height, width, 3) to uint8."""
    height, width, _ = pixels.shape
    ys, xs = np.ogrid[:height, :width]
    light = np.ones((height, width), np.float32)
    for _ in range(int(rng.integers(look.stains + 1))):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 16)
        inside = ((xs - x) / radius) ** 2 + ((ys - y) / radius / rng.uniform(0.6, 1.6)) ** 2 < 1
        light[inside] *= rng.uniform(0.75, 0.95)
    if look.stains:
        light = light * (1 + rng.uniform(-0.12, 0.12) * (xs / width - 0.5) + rng.uniform(-0.12, 0.12) * ys / height)
    pixels = pixels * light[..., None]
    if (radius := rng.uniform(0, look.blur)) > 0.3:
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)
    noise = rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(0, look.noise))
    return (pixels + noise).clip(0, 255).astype(np.uint8)
