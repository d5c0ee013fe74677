"""Rewards tried on right, nearly right and hostile completions, before a policy finds out what they pay for.

What a policy is paid for, it learns (Amodei et al. 2016, "reward hacking"): so the sum of the rewards has to be higher
for the truth than for an empty answer, the question, another row's truth, ... And a reward has to be a function of its
own row, or what is learned is noise: it is called twice, in another order, and for one row alone.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunekit.data.rewards import Reward, call_reward, failure, shown

LONG = 4096  # characters of the longest completion
MISTAKES = {"10% wrong": 0.1, "30% wrong": 0.3, "60% wrong": 0.6}  # of the characters
HOSTILE = {  # what they are in a message
    "empty": "nothing at all",
    "blank": "white space",
    "question": "the question",
    "refusal": "the same refusal for all",
    "number": "a number",
    "another": "another row's truth",
    "shuffled": "the truth's characters, shuffled",
    "lookalikes": "the truth in letters of another script",
    "endless": "another row's truth, again and again",
    "everything": "all rows' truths in one",
    "repeated": "the truth, again and again",
}
LENIENT = ("repeated",)  # as good as the truth for who takes the first answer given: said, but no fault
OFTEN = 0.5  # of the rows, from which on a hostile completion that is as good as the truth is a fault, not a note
LATIN = "ABCEHKMOPTXYaceopxybdfghijklmnqrstuvwz"
OTHER = "АВСЕНКМОРТХУасеорхуьдфгнийклмпярстувшж"  # Cyrillic letters, first those that look the same
SCRIPTS = str.maketrans(LATIN + OTHER, OTHER + LATIN)
ALIKE = 0.98  # correlation from which on two rewards say the same
SAME = 1e-9
TOTAL = "total"  # what findings call the weighted sum


@dataclass(frozen=True)
class Finding:
    """What was found of a reward, or of the sum of all: a fault, or something to know."""

    reward: str
    text: str
    fault: bool = True


@dataclass
class Tryout:
    """values: by reward, then by kind of completion, of each row; None: not applicable, or it fails there."""

    kinds: dict[str, list[str]]
    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fault]

    def mean(self, name: str, kind: str) -> float:
        """Of a reward's values, over the rows that it says something of; NaN if there are none."""
        said = [value for value in self.values[name][kind] if value is not None]
        return float(np.mean(said)) if said else math.nan

    def totals(self, kind: str) -> np.ndarray:
        """The weighted sum that ms-swift makes of each row, (rows): None counts 0."""
        rows = [[value or 0.0 for value in self.values[name][kind]] for name in self.weights]
        return np.array(list(self.weights.values())) @ np.array(rows)


def completions_of(truths: Sequence[str], questions: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """Completions by kind, one of each row: the truth, with more and more mistakes, and hostile ones."""
    rng = np.random.default_rng(seed)
    letters = sorted(set("".join(truths)) - set(" \n\t")) or ["x"]
    others = [_another(truths, number) for number in range(len(truths))]
    everything = " ".join(dict.fromkeys(truths))[:LONG]
    made = {"truth": list(truths)}
    made |= {kind: [_spoiled(truth, share, letters, rng) for truth in truths] for kind, share in MISTAKES.items()}
    made |= {
        "empty": [""] * len(truths),
        "blank": [" \n\n "] * len(truths),
        "question": list(questions),
        "refusal": ["I'm sorry, but I can't help with that."] * len(truths),
        "number": [str(rng.integers(10**6, 10**7)) for _ in truths],
        "another": others,
        "shuffled": ["".join(rng.permutation(list(truth))) for truth in truths],
        "lookalikes": [truth.translate(SCRIPTS) for truth in truths],
        "endless": [" ".join([other] * (LONG // (len(other) + 1))) for other in others],
        "everything": [everything if truth in everything else f"{everything} {truth}" for truth in truths],
        "repeated": [" ".join([truth] * 20)[:LONG] for truth in truths],
    }
    return made


def _another(truths: Sequence[str], number: int) -> str:
    """The next row's truth that is another; where all are alike, none is."""
    rest = [*truths[number + 1 :], *truths[:number]]
    return next((truth for truth in rest if truth.strip() != truths[number].strip()), "")


def _spoiled(truth: str, share: float, letters: list[str], rng: np.random.Generator) -> str:
    """The truth with this share of its characters, one at least, changed for others; as long as before."""
    places = [place for place, letter in enumerate(truth) if not letter.isspace()]
    if not places:
        return truth
    characters = list(truth)
    for place in rng.permutation(places)[: max(1, round(share * len(places)))]:
        choices = [letter for letter in letters if letter != characters[place]] or ["x", "y"]
        characters[place] = str(choices[rng.integers(len(choices))])
    return "".join(characters)


def try_rewards(
    rewards: dict[str, Reward],
    weights: Sequence[float],
    columns: Callable[[list[str], list[int]], dict[str, Any]],
    kinds: dict[str, list[str]],
    samples: dict[str, list[str]] | None = None,
    generations: int = 1,
) -> Tryout:
    """Try each reward and their sum.

    columns(completions, rows): what ms-swift gives rewards for completions to the rows of these numbers. kinds: as
    `completions_of` makes them. samples: what a model really says, as another kind, `generations` answers to a row, one
    behind the other, under the name "model".
    """
    found = Tryout(kinds)
    for name, reward in rewards.items():
        found.values[name] = _Trial(found, name, reward, columns).run()
    found.weights = dict(zip(rewards, map(float, weights), strict=True))
    if samples:
        _sampled(found, rewards, columns, samples["model"], generations)
    if not any(finding.fault for finding in found.findings if finding.reward != TOTAL):
        _compare(found)  # of what says nothing true, every sum is wrong
    return found


class _Trial:
    """One reward's."""

    def __init__(self, tryout: Tryout, name: str, reward: Reward, columns):
        self.tryout, self.name, self.reward, self.columns = tryout, name, reward, columns
        self.rows = list(range(len(tryout.kinds["truth"])))

    def find(self, text: str) -> None:
        finding = Finding(self.name, text)
        if finding not in self.tryout.findings:
            self.tryout.findings.append(finding)

    def score(self, completions: list[str], rows: list[int]) -> list[float | None]:
        """Raises what the reward raises; a change of its arguments is found out."""
        columns = self.columns(completions, rows)
        given = list(completions), copy.deepcopy({name: columns[name] for name in columns if name != "trainer_state"})
        values = call_reward(self.reward, completions, columns)
        if (completions, {name: columns[name] for name in given[1]}) != given:
            self.find("changes its arguments: the rewards after it get others than the data set's")
        return values

    def run(self) -> dict[str, list[float | None]]:
        values: dict[str, list[float | None]] = {}
        failing: dict[str, tuple[str, list[str]]] = {}  # by problem: an example, kinds
        for kind, completions in self.tryout.kinds.items():
            try:
                values[kind] = self.score(list(completions), self.rows)
            except Exception as error:
                values[kind] = [None] * len(self.rows)
                problem = failure(error)
                failing.setdefault(problem, (self._example(completions), []))[1].append(kind)
        for problem, (example, kinds) in failing.items():
            self.find(f"{problem} for {', '.join(kinds)}{example}")
        right = {kind: each for kind, each in values.items() if not any(kind in kinds for _, kinds in failing.values())}
        if right:
            self._applicable(right)
            self._constant(right)
            self._direction(right)
            try:
                self._own_row(list(right))
            except Exception as error:
                self.find(f"{failure(error)} for a batch of another size or order, or for one row alone")
        return values

    def _example(self, completions: list[str]) -> str:
        for row, completion in zip(self.rows, completions, strict=True):
            try:
                call_reward(self.reward, [completion], self.columns([completion], [row]))
            except Exception:
                return f": row {row + 1}, {shown(completion)}"
        return ", in a batch only"

    def _applicable(self, right: dict[str, list[float | None]]) -> None:
        for row in self.rows:
            kinds = {kind: values[row] is None for kind, values in right.items()}
            if any(kinds.values()) and not all(kinds.values()):
                what = next(kind for kind, none in kinds.items() if none)
                self.find(
                    f"is None, not applicable, for some completions to row {row + 1} ({what}) and not for others: None "
                    "counts 0; let the row alone decide"
                )
                return

    def _constant(self, right: dict[str, list[float | None]]) -> None:
        rows = [row for row in self.rows if any(values[row] is not None for values in right.values())]
        found = [values[row] for values in right.values() for row in rows]
        said = {value for value in found if value is not None}
        if not said:
            self.find("is None for every completion to every row")
        elif len(right) > 1 and max(said) - min(said) <= SAME and None not in found:
            self.find(f"is always {found[0]:g}, for the truth and for nonsense")

    def _direction(self, right: dict[str, list[float | None]]) -> None:
        if not {"truth", *MISTAKES} <= right.keys():
            return
        means = [float(np.mean([value or 0.0 for value in right[kind]])) for kind in ("truth", *MISTAKES)]
        if means[-1] > means[0] + SAME and means == sorted(means):
            self.find(f"goes up with mistakes: {means[0]:.3g} for the truth, {means[-1]:.3g} with 60% of it wrong")

    def _own_row(self, kinds: list[str]) -> None:
        """Is the value of a row one of that row alone? Over a batch of all kinds of completions."""
        kinds = [kind for kind in ("truth", "another", "30% wrong", "empty", "shuffled") if kind in kinds] or kinds[:1]
        picked = [self.tryout.kinds[kinds[row % len(kinds)]][row] for row in self.rows]
        first, again = (self.score(list(picked), self.rows) for _ in range(2))
        if not _equal(first, again):
            self.find("gives other values when it is asked again: it is random, or keeps something between its calls")
            return
        alone = [self.score([picked[row]], [row])[0] for row in self.rows]
        if _equal(first, alone):
            return
        if _equal(first, self._by_first(picked)):
            self.find("scores every completion of a batch against the first row: use zip(completions, solution)")
            return
        order = list(reversed(self.rows))
        turned = self.score([picked[row] for row in order], order)
        how = "the order of its batch" if not _equal(first[::-1], turned) else "the other rows of its batch"
        self.find(f"depends on {how}: the same completion to the same row has another value alone")

    def _by_first(self, picked: list[str]) -> list[float | None]:
        """What each completion is worth as an answer to the first row."""
        of_completions = ("messages", "response_token_ids")
        first = {name: value for name, value in self.columns([""], [0]).items() if name not in of_completions}
        values: list[float | None] = []
        for row, completion in enumerate(picked):
            columns = self.columns([completion], [row]) | first
            try:
                values += call_reward(self.reward, [completion], columns)
            except Exception:  # one that fails on it has other values
                values.append(None)
        return values


def _equal(one: list[float | None], other: list[float | None]) -> bool:
    if len(one) != len(other) or [value is None for value in one] != [value is None for value in other]:
        return False
    return all(abs((a or 0.0) - (b or 0.0)) <= 1e-6 * max(1.0, abs(a or 0.0)) for a, b in zip(one, other, strict=True))


def _compare(found: Tryout) -> None:
    """The sum of the rewards: is the truth the best that one can say?"""
    truth, truths = found.totals("truth"), found.kinds["truth"]
    for kind, words in HOSTILE.items():
        total = found.totals(kind)
        rows = [row for row, said in enumerate(found.kinds[kind]) if said.strip() != truths[row].strip()]
        as_good = [row for row in rows if total[row] >= truth[row] - SAME]
        if not as_good:
            continue
        better = [row for row in rows if total[row] > truth[row] + SAME]
        often = len(as_good) >= OFTEN * len(rows) and kind not in LENIENT or len(better) >= OFTEN * len(rows)
        much, rows_so = ("more than", better) if better else ("as much as", as_good)
        row = rows_so[0]
        said, true = shown(found.kinds[kind][row]), shown(truths[row])
        text = (
            f"{words} ({kind}) earns {much} the truth in {len(rows_so)} of {len(rows)} rows: row {row + 1}, {said} "
            f"{total[row]:.3g}, {true} {truth[row]:.3g}"
        )
        found.findings.append(Finding(TOTAL, text, often))


def _sampled(found: Tryout, rewards: dict[str, Reward], columns, said: list[str], generations: int) -> None:
    """What a model really says: is there anything to learn from?"""
    rows = [number // generations for number in range(len(said))]
    values = {}
    for name, reward in rewards.items():
        try:
            values[name] = call_reward(reward, list(said), columns(list(said), rows))
        except Exception as error:
            values[name] = [None] * len(said)
            found.findings.append(Finding(name, f"{failure(error)} on what the model says"))
    found.kinds = {**found.kinds, "model": said}
    for name in rewards:
        found.values[name]["model"] = values[name]
        numbers = [value for value in values[name] if value is not None]
        if numbers and max(numbers) - min(numbers) <= SAME:
            found.findings.append(Finding(name, f"is {numbers[0]:g} for all that the model says", fault=False))
    flat = flat_groups(found.totals("model"), generations) if generations > 1 else 0.0
    if flat:
        text = f"{flat:.0%} of the rows have answers that are all worth the same: nothing is learned from these"
        found.findings.append(Finding(TOTAL, text, fault=flat == 1))
    names = [name for name in rewards if np.ptp([value or 0.0 for value in values[name]]) > SAME]
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            pair = [[value or 0.0 for value in values[name]] for name in (one, other)]
            if (alike := float(np.asarray(np.corrcoef(pair))[0, 1])) >= ALIKE:
                found.findings.append(Finding(one, f"says the same as {other} (correlation {alike:.2f})", fault=False))


def flat_groups(totals: np.ndarray, generations: int) -> float:
    """The share of the groups of answers to one row that have no spread, so no advantage. (rows * generations)"""
    return float(np.mean(np.ptp(totals.reshape(-1, generations), axis=1) <= 1e-6))
