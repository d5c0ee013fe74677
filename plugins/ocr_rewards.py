"""Rewards for models that read text from images (OCR).

    swift rlhf --rlhf_type grpo --external_plugins plugins/ocr_rewards.py \\
        --reward_funcs   ocr_cer ocr_prefix ocr_perfect ocr_length ocr_rambling ocr_script \\
        --reward_weights 1       0.5        1           0.25       0.5          0.25

    bash rl_run.sh --reward_funcs ocr_cer ocr_prefix ocr_perfect --reward_weights 1 0.5 1

    name          range    best  suggested weight   says
    ocr_cer       0 .. 1   1     1                  how much of the text is right
    ocr_prefix    0 .. 1   1     0.5                how far it is right from the start
    ocr_perfect   0 or 1   1     1                  all of it is right
    ocr_length    0 .. 1   1     0.25               it is as long as the truth
    ocr_rambling  -1 .. 0  0     0.5                share of the completion that is waste
    ocr_script    0 .. 1   1     0.25               its letters are of the truth's scripts

Weights go by position and are all 1 if left out. `ocr_length`, `ocr_rambling` and `ocr_script` are guards:
text that says nothing true can please them, so none of them goes without `ocr_cer` or `ocr_perfect`.

The truth is the dataset column `solution`, and each completion is scored against its own row's. Both are first
brought to Unicode NFC and stripped of surrounding whitespace; inner whitespace and case count. Lengths are in
code points.

A reward of None means "not applicable": `solution` is null, or it has no letters (`ocr_script`). That depends
on the truth alone, so it holds for a whole group of generations or for none of it: ms-swift adds 0 to each of
their sums, so the other rewards decide between them, and leaves them out of the mean it logs for this one.

Add a reward: write a function of (completion, reference), name it in `REWARDS`. ms-swift logs it by that name.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein, Prefix
from swift.rewards import ORM, orms

SCRIPTS = {  # words of Unicode names; a letter with none of them is of the script its name starts with
    "CYRILLIC": ("CYRILLIC",),
    "LATIN": ("LATIN",),
    "CJK": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"),
}


def ocr_cer(completion: str, reference: str) -> float:
    """max(0, 1 - CER), in [0, 1]; CER = Levenshtein distance / length of the reference.

    An empty reference gives 1 for an empty completion, else 0. More errors than the reference has characters
    all give 0: below that only `ocr_length` and `ocr_rambling` tell bad from worse.
    """
    return max(0.0, 1.0 - Levenshtein.distance(completion, reference) / max(1, len(reference)))


def ocr_prefix(completion: str, reference: str) -> float:
    """Length of the common prefix / length of the reference, in [0, 1]: what survives until the first mistake.

    What follows a whole reference isn't seen here. An empty reference gives 1 for an empty completion, else 0.
    """
    if not reference:
        return float(not completion)
    return Prefix.similarity(completion, reference) / len(reference)


def ocr_perfect(completion: str, reference: str) -> float:
    """1 for the very text, else 0: what a group of nearly right completions still has to gain."""
    return float(completion == reference)


def ocr_length(completion: str, reference: str) -> float:
    """Shorter length / longer length, in [0, 1]; 1 if both are empty.

    Half as long and twice as long both give 0.5. A linear fall would be flat at 0 past twice the length, just
    where rambling starts.
    """
    short, long = sorted((len(completion), len(reference)))
    return short / long if long else 1.0


def ocr_rambling(completion: str, reference: str, n: int = 4, tolerance: float = 1.25) -> float:
    """-max(overrun, repetition), in [-1, 0]: minus the share of the completion that is waste; 0 is fine.

    overrun     the share of its characters past `tolerance` times the reference's length
    repetition  the share of its character n-grams that repeat one more often than the reference itself does

    Repetition is 1 - distinct / total n-grams, as ms-swift's `repetition` (arXiv:2502.03373) has it over words,
    but over characters, since codes and Chinese have no words, and without what the truth itself repeats.
    """
    overrun = 1.0 - tolerance * len(reference) / len(completion) if completion else 0.0
    said, true = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (completion, reference))
    repeats = sum(max(0, count - max(1, true[gram])) for gram, count in said.items())
    return 0.0 - max(overrun, repeats / max(1, said.total()))  # "0.0 -": logs shall not say -0.0


def ocr_script(completion: str, reference: str) -> float | None:
    """Share of the completion's letters whose script is one of the reference's scripts, in [0, 1].

    Digits, signs and spaces have no script. No letters in the reference: None, whatever the completion is.
    Letters in the reference and none in the completion: 0. A reference in several scripts ("iPhone 15 Про")
    allows each of them anywhere: which letter is in which is `ocr_cer`'s to judge. Han, kana, hangul and
    bopomofo are one script here (CJK), as they share a line.
    """
    allowed = set(map(script_of, filter(str.isalpha, reference)))
    letters = list(filter(str.isalpha, completion))
    if not allowed:
        return None
    return sum(script_of(letter) in allowed for letter in letters) / max(1, len(letters))


def script_of(letter: str) -> str:
    """The script of one letter: "LATIN" for "é", "CYRILLIC" for "й", "CJK" for "字", "GREEK" for "π"."""
    name = unicodedata.name(letter, "")
    for script, words in SCRIPTS.items():
        if any(word in name for word in words):
            return script
    return name.partition(" ")[0]


class PairedReward(ORM):
    """Scores each completion against the `solution` of its own row; a subclass names the function."""

    score: Callable[[str, str], float | None]

    def __call__(self, completions: list[str], solution: list[str | None] | None = None, **columns):
        if solution is None:
            raise ValueError(
                f"{type(self).__name__}: the dataset has no column 'solution'. Add the true text to each row: "
                '{"messages": [...], "images": [...], "solution": "the text in the image"}'
            )
        return [self._pair(*pair) for pair in zip(completions, solution, strict=True)]

    def _pair(self, completion: str, reference: str | None) -> float | None:
        if reference is None:
            return None
        if not isinstance(reference, str):
            raise ValueError(
                f"{type(self).__name__}: 'solution' must be text, got {reference!r}: quote it in the dataset"
            )
        return self.score(*(unicodedata.normalize("NFC", text).strip() for text in (completion, reference)))


REWARDS = (ocr_cer, ocr_prefix, ocr_perfect, ocr_length, ocr_rambling, ocr_script)

orms.update({f.__name__: type(f.__name__, (PairedReward,), {"score": staticmethod(f)}) for f in REWARDS})
