"""Rewards that are sound pass a try-out, each planted fault is found, and by its name."""

import itertools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from helpers.paths import ROOT
from rapidfuzz import fuzz
from rapidfuzz.distance import JaroWinkler, LCSseq, Levenshtein

from prunekit import tryout
from prunekit.report import rewards as drawn
from prunekit.training.reward_tryout import HOSTILE, completions_of, flat_groups, try_rewards

WORDS = ["Invoice 4711", "north wall", "Total 19,50", "left lane", "GRÜN 12", "exit B", "Käse", "№ 5", "Omega", "2026"]
NUMBERS = ["12", "7", "190", "43", "58", "3.5", "1001", "64"]
CALLS = "<think>It says {0}.</think><answer>{0}</answer>"


def paired(score):
    """A reward of ms-swift's kind from a function of (completion, truth)."""
    return lambda completions, solution, **columns: [score(*pair) for pair in zip(completions, solution, strict=True)]


def tried(reward, truths=WORDS, answer="{}", **more):
    """What a try-out finds of one reward, or of several, summed."""
    rewards = reward if isinstance(reward, dict) else {"reward": reward}
    said = [answer.replace("{0}", truth).replace("{}", truth) for truth in truths]

    def columns(completions, rows):
        return {"solution": [truths[row] for row in rows], "trainer_state": None}

    kinds = completions_of(said, ["What does the sign say?"] * len(said))
    return try_rewards(rewards, [1.0] * len(rewards), columns, kinds, **more)


def texts(found):
    return " | ".join(f"{finding.reward} {finding.text}" for finding in found.faults)


# --- rewards that are sound ---


def inside(text):
    match = re.fullmatch(r"<think>.*?</think>\s*<answer>(.*?)</answer>", text, re.DOTALL)
    return match[1].strip() if match else None


def number(text):
    try:
        return float(text)
    except (ValueError, TypeError):
        return None


def closeness(completion, truth):
    value = number(completion)
    return 0.0 if value is None else float(np.exp(-abs(value - float(truth)) / (1 + abs(float(truth)))))


def word_f1(completion, truth):
    said, true = Counter(completion.split()), Counter(truth.split())
    return 2 * (said & true).total() / max(1, said.total() + true.total())


def bigram_f1(completion, truth):
    said, true = (Counter(itertools.pairwise(f" {text} ")) for text in (completion, truth))
    return 2 * (said & true).total() / max(1, said.total() + true.total())


def anls(completion, truth):
    near = Levenshtein.normalized_similarity(completion.lower(), truth.lower())
    return near if near >= 0.5 else 0.0


async def waiting(completions, solution, **columns):
    return [float(one == other) for one, other in zip(completions, solution, strict=True)]


class Instance:
    def __call__(self, completions, **columns):
        return np.array([float(c == s) for c, s in zip(completions, columns["solution"], strict=True)])


SOUND = {
    "exact": (paired(lambda c, s: float(c == s)), WORDS),
    "bool": (paired(lambda c, s: c == s), WORDS),
    "minus_one": (paired(lambda c, s: 1 if c == s else -1), WORDS),
    "cer": (paired(Levenshtein.normalized_similarity), WORDS),
    "minus_edits": (paired(lambda c, s: -Levenshtein.distance(c, s)), WORDS),
    "edits_capped": (paired(lambda c, s: -min(1.0, Levenshtein.distance(c, s) / len(s))), WORDS),
    "jaro_winkler": (paired(JaroWinkler.similarity), WORDS),
    "longest_common": (paired(LCSseq.normalized_similarity), WORDS),
    "anls": (paired(anls), WORDS),
    "word_f1": (paired(word_f1), WORDS),
    "bigram_f1": (paired(bigram_f1), WORDS),
    "ratio": (paired(lambda c, s: fuzz.ratio(c, s) / 100), WORDS),
    "stripped": (paired(lambda c, s: float(c.strip().casefold() == s.strip().casefold())), WORDS),
    "closeness": (paired(closeness), NUMBERS),
    "number": (paired(lambda c, s: float(number(c) == float(s))), NUMBERS),
    "tagged": (paired(lambda c, s: float(inside(c) == s)), WORDS, CALLS),
    "tagged_and_near": (paired(lambda c, s: Levenshtein.normalized_similarity(inside(c) or "", s)), WORDS, CALLS),
    "tensor_like": (Instance(), WORDS),
    "async": (waiting, WORDS),
    "not_for_digits": (paired(lambda c, s: None if s.isdigit() else float(c == s)), WORDS),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_reward_has_no_fault(name):
    assert texts(tried(*SOUND[name])) == ""


def test_the_ocr_rewards_with_their_weights_have_no_fault():
    from swift.rewards import orms

    from prunekit.msswift.extend import load_plugins

    load_plugins([ROOT / "plugins/ocr_rewards.py"])
    names = ("ocr_cer", "ocr_prefix", "ocr_perfect", "ocr_length", "ocr_rambling", "ocr_script")
    assert texts(tried({name: orms[name]() for name in names})) == ""


# --- planted faults ---


def against_first(completions, solution, **columns):
    return [float(completion == solution[0]) for completion in completions]


def by_place(completions, solution, **columns):
    return [float(c == s) + 0.1 * place for place, (c, s) in enumerate(zip(completions, solution, strict=True))]


def against_the_mean(completions, solution, **columns):
    near = [Levenshtein.normalized_similarity(*pair) for pair in zip(completions, solution, strict=True)]
    return [value - sum(near) / len(near) for value in near]


class Random:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, completions, solution, **columns):
        return [float(c == s) + self.rng.random() / 10 for c, s in zip(completions, solution, strict=True)]


class Remembers:
    """Subtracts the mean of all that it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, completions, solution, **columns):
        near = [Levenshtein.normalized_similarity(*pair) for pair in zip(completions, solution, strict=True)]
        self.seen += near
        return [value - sum(self.seen) / len(self.seen) for value in near]


def sorts_the_truths(completions, solution, **columns):
    solution.sort()
    return [float(c == s) for c, s in zip(completions, solution, strict=True)]


def needs_two(completions, solution, **columns):
    near = [float(c == s) for c, s in zip(completions, solution, strict=True)]
    if len(near) < 2:
        raise ValueError("needs two")
    return near


PLANTED = {
    "needs_two": (needs_two, "raises ValueError (needs two) for a batch of another size"),
    "against_first": (against_first, "against the first row"),
    "by_place": (by_place, "the order of its batch"),
    "against_the_mean": (against_the_mean, "the other rows of its batch"),
    "random": (Random(), "gives other values when it is asked again"),
    "remembers": (Remembers(), "gives other values when it is asked again"),
    "constant": (paired(lambda c, s: 0.5), "is always 0.5"),
    "constant_where_it_applies": (paired(lambda c, s: 0.5 if s.isascii() else None), "is always 0.5"),
    "raises_on_empty": (paired(lambda c, s: c.count(s[0]) / len(c)), "raises ZeroDivisionError"),
    "nan": (paired(lambda c, s: float(np.float64(c == s) / (1 if c.strip() else np.nan))), "returns nan"),
    "too_few": (lambda completions, solution, **columns: [1.0], "returns 1 values for 10"),
    "words_not_numbers": (paired(lambda c, s: "good" if c == s else "bad"), "where one number"),
    "wrong_sign": (paired(Levenshtein.normalized_distance), "goes up with mistakes"),
    "none_when_wrong": (paired(lambda c, s: 1.0 if c == s else None), "is None, not applicable, for some"),
    "contains": (paired(lambda c, s: float(s in c)), "all rows' truths in one"),
    "longer_is_better": (paired(lambda c, s: float(c == s) + len(c) / 100), "again and again"),
    "letters_only": (paired(lambda c, s: float(sorted(c) == sorted(s))), "characters, shuffled"),
    "recall": (paired(lambda c, s: len(set(s) & set(c)) / len(set(s))), "all rows' truths in one"),
    "any_number": (paired(lambda c, s: float(number(c) is not None)), "a number"),
    "changes_its_columns": (sorts_the_truths, "changes its arguments"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_by_its_name(name, recwarn):
    reward, words = PLANTED[name]
    assert words in texts(tried(reward, NUMBERS if name == "any_number" else WORDS))


def test_a_reward_that_fails_says_on_which_completion():
    found = tried(paired(lambda c, s: 1 / len(c)))
    (fault,) = [finding for finding in found.faults if "ZeroDivisionError" in finding.text]
    assert "for empty" in fault.text and "row 1, ''" in fault.text


def test_a_fault_that_shows_for_every_kind_is_said_once():
    found = tried(sorts_the_truths)
    assert [finding.text for finding in found.faults if "changes its arguments" in finding.text] == [
        "changes its arguments: the rewards after it get others than the data set's"
    ]


def test_a_fault_of_the_sum_alone_is_said_of_the_sum():
    found = tried({"exact": SOUND["exact"][0], "long": paired(lambda c, s: min(4.0, len(c) / 500))})
    assert {finding.reward for finding in found.faults} == {"total"}


def test_a_bonus_that_is_smaller_than_the_truth_is_no_fault():
    found = tried({"exact": SOUND["exact"][0], "long": paired(lambda c, s: min(0.5, len(c) / 500))})
    assert found.faults == []


def test_taking_the_first_answer_given_is_said_but_no_fault():
    found = tried(paired(lambda c, s: float(c.startswith(s))))
    assert found.faults == []
    assert any("(repeated) earns as much as the truth" in finding.text for finding in found.findings)


# --- what a model says ---


def test_rows_whose_answers_are_all_alike_are_counted():
    assert flat_groups(np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=float), 2) == 0.5
    assert flat_groups(np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=float), 2) == 1


def test_answers_that_are_worth_the_same_everywhere_are_a_fault():
    said = [word for word in WORDS for _ in range(4)]
    found = tried(SOUND["exact"][0], samples={"model": said}, generations=4)
    assert "100% of the rows" in texts(found)


def test_one_answer_to_a_row_does_not_tell_whether_answers_are_alike():
    said = [word if place % 2 else "x" for place, word in enumerate(WORDS)]
    assert tried(SOUND["exact"][0], samples={"model": said}, generations=1).faults == []


def test_rewards_that_say_the_same_are_named():
    rng = np.random.default_rng(0)
    said = [word if rng.random() < 0.5 else "x" for word in WORDS for _ in range(4)]
    rewards = {"one": SOUND["exact"][0], "other": SOUND["minus_one"][0]}
    found = tried(rewards, samples={"model": said}, generations=4)
    assert any(finding.text.startswith("says the same as other") for finding in found.findings)


@pytest.mark.parametrize(("missing", "count"), [(range(40), 40), (range(3), 3)])
def test_answers_that_a_reward_says_nothing_of_are_counted(missing, count):
    said = [word for word in WORDS for _ in range(4)]
    found = tried(paired(lambda c, s: float(c == s)), samples={"model": said}, generations=4)
    found.values["reward"]["model"] = [None if place in missing else 1.0 for place in range(40)]
    assert tryout.samples_said(found, len(WORDS)).endswith(f"none for {count}")


def test_table_and_figure_give_a_rewards_mean_over_the_rows_that_it_says_something_of(monkeypatch):
    figures = []
    monkeypatch.setattr(drawn, "save_figure", lambda figure, path: figures.append(figure))
    half = paired(lambda c, s: float(c == s) if s.isascii() else None)
    found = tried({"half": half, "none": paired(lambda c, s: None)})
    drawn.draw_tryout(found, None)
    assert tryout.table(found).splitlines()[1].split()[:3] == ["truth", "1.000", "none"]
    assert [text.get_text() for text in figures[0].axes[0].texts[:2]] == ["1.00", "none"]


def test_mistakes_leave_the_length_and_change_as_many_characters_as_they_say():
    kinds = completions_of(["abcdefghij"] * 3 + ["klmnop"], ["?"] * 4)
    assert sum(a != b for a, b in zip(kinds["30% wrong"][0], "abcdefghij", strict=True)) == 3


def test_no_hostile_completion_is_the_truth_itself():
    words = ["Invoice", "north wall", "Total 19", "left lane"]
    kinds = completions_of(words, ["What does the sign say?"] * len(words))
    assert {kind for kind in HOSTILE for word, said in zip(words, kinds[kind], strict=True) if said == word} == set()


# --- the command ---

PLUGIN = """
from swift.rewards import ORM, orms


class {name}(ORM):
    def __call__(self, completions, solution, **columns):
        return {values}


orms["{name}"] = {name}
"""


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rl.jsonl"
    row = {"messages": [{"role": "user", "content": "What does the sign say?"}]}
    file.write_text("".join(json.dumps(row | {"solution": word}) + "\n" for word in WORDS))
    return file


@pytest.fixture
def plugin(tmp_path):
    """plugin(values): a file with a reward `mine` that returns this expression."""

    def write(values):
        file = tmp_path / "my_reward.py"
        file.write_text(PLUGIN.format(name="mine", values=values))
        return file

    return write


@pytest.mark.slow
def test_a_fault_is_exit_code_3_and_a_line(script, data, plugin):
    bad = plugin("[float(completion == solution[0]) for completion in completions]")
    result = script("prunekit.tryout", "--rewards", "mine", "--plugins", bad, "--data", data)
    assert result.returncode == 3, result.stderr
    assert "fault: mine scores every completion of a batch against the first row" in result.stdout


@pytest.mark.ci
def test_the_line_of_rl_run_says_data_rewards_and_plugins(script, data, plugin, tmp_path):
    good = plugin("[float(one == other) for one, other in zip(completions, solution)]")
    line = ("--rlhf_type", "grpo", "--dataset", data, "--external_plugins", good, "--reward_funcs", "mine")
    found = tmp_path / "found.json"
    result = script("prunekit.tryout", "--swift", "--json", found, "--", *line)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(found.read_text())["values"]["mine"]["truth"] == [1.0] * len(WORDS)


def test_a_line_with_a_reward_model_has_a_weight_for_it_too(monkeypatch):
    line = "--dataset rl.jsonl --reward_funcs format --reward_model rm --reward_weights 1 0.5"
    monkeypatch.setattr(sys, "argv", ["tryout", "--swift", "--", *line.split()])
    assert tryout.arguments().rewards == ["format"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rewards", "mine"], "unknown reward mine"),
        (["--rewards", "format", "--weights", "1", "2"], "--weights gives 2 for 1 rewards"),
        (["--rewards", "format", "--truth", "label"], "no row has a truth"),
        (["--rewards", "format", "--answer", "text"], "has no {}"),
        (["--rewards", "format", "--model", "absent"], "absent"),
    ],
)
def test_what_a_user_can_mend_is_one_line(script_here, data, flags, words):
    result = script_here("prunekit.tryout", "--data", data, *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr.splitlines()[-1]


@pytest.mark.ci
def test_a_models_own_answers_are_scored_and_drawn(script, data, speaking, plugin, tmp_path):
    data.write_text(data.read_text().replace("What does the sign say?", "Read."))  # it takes 64 letters
    mine = plugin("[len(one) / 100 + (one == other) for one, other in zip(completions, solution)]")
    drawn = tmp_path / "tryout.png"
    flags = ("--model", speaking, "--limit", 2, "--generations", 4, "--max-new-tokens", 4, "--figure", drawn)
    result = script("prunekit.tryout", "--rewards", "mine", "--plugins", mine, "--data", data, *flags)
    assert result.returncode == 3, result.stderr  # longer is better
    assert re.search(r"^model +0\.", result.stdout, re.MULTILINE) and re.search(r"^best ", result.stdout, re.MULTILINE)
    assert drawn.stat().st_size > 10_000
