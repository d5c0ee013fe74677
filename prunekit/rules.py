"""What values read from JSON must be: rules that say it in words and check it, and the first one that a file breaks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prunekit.errors import PruneKitError

LARGEST = 10**9  # more layers, heads, neurons, words or positions no model has
LAYERS = 10**5


@dataclass(frozen=True)
class Rule:
    """A value for which `holds` is true, as `words` say."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Items:
    """A list whose items all keep a rule."""

    rule: Any
    words: str = "a list"


@dataclass(frozen=True)
class Values:
    """An object whose values all keep a rule."""

    rule: Any
    words: str = "an object"


@dataclass(frozen=True)
class Keys:
    """An object in which these keys keep their rules, where they are there and not null; the `needed` ones are."""

    rules: dict[str, Any]
    needed: tuple[str, ...] = ()
    words: str = "an object"


def whole(smallest: int, end: int) -> Rule:
    """Whole numbers from `smallest` up to `end`, which is none of them."""
    return Rule(
        f"a whole number from {smallest} to {end - 1:,}",
        lambda value: type(value) is int and smallest <= value < end,
    )


COUNT, NUMBER, LAYER = whole(1, LARGEST), whole(0, LARGEST), whole(0, LAYERS)
REAL = Rule("a number", lambda value: type(value) in (int, float) and -1e300 < value < 1e300)
FACTOR = Rule("a positive number", lambda value: REAL.holds(value) and value > 0)
TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT, NAMES, NUMBERS = Keys({}), Items(TEXT), Items(LAYER)


def broken(value: Any, rule: Rule | Items | Values | Keys, where: str = "") -> Iterator[str]:
    """What is wrong, a clause each, at which place in the value."""
    match rule:
        case Items() if isinstance(value, list):
            for number, item in enumerate(value):
                yield from broken(item, rule.rule, f"{where}[{number}]")
        case Values() if isinstance(value, dict):
            for key, item in value.items():
                yield from broken(item, rule.rule, _place(where, key))
        case Keys() if isinstance(value, dict):
            for key in rule.needed:
                if value.get(key) is None:
                    yield f"{_place(where, key)} is {'null' if key in value else 'missing'}"
            for key, inner in rule.rules.items():
                if value.get(key) is not None:
                    yield from broken(value[key], inner, _place(where, key))
        case Rule() if rule.holds(value):
            pass
        case _:
            yield f"{where or 'it'} is {short(value)}, not {rule.words}"


def check(value: Any, rule: Rule | Items | Values | Keys, what: object) -> None:
    """PruneKitError names the first place at which a value breaks a rule; `what` is the file, and what to give."""
    if problem := next(broken(value, rule), None):
        raise PruneKitError(f"{what}: {problem}; mend it or make it anew")


def _place(where: str, key: str) -> str:
    return f"{where}.{key}" if where else short(key)[1:-1]


def short(value: Any) -> str:
    """A value as an error shows it: one line, not long."""
    if type(value) is int and abs(value) >= 10**30:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
