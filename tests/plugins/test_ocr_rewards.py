"""plugins/ocr_rewards.py, loaded the way ms-swift loads it, and scored through its registry."""

import sys
import unicodedata
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PLUGINS = Path(__file__).parents[2] / "plugins"
RANGES = {
    "ocr_cer": (0, 1),
    "ocr_prefix": (0, 1),
    "ocr_perfect": (0, 1),
    "ocr_length": (0, 1),
    "ocr_rambling": (-1, 0),
    "ocr_script": (0, 1),
}
BEST = {name: high for name, (_, high) in RANGES.items()}

unhurried = settings(deadline=None)  # another process may hold the cores
each_reward = pytest.mark.parametrize("name", RANGES)
# Any text at all, and text in which repeats, prefixes and mixed scripts are likely.
texts = st.text() | st.text(alphabet="abab1 \nйЖ字かe\u0301", max_size=40)
pairs = st.tuples(texts, texts)


@pytest.fixture(scope="session")
def orms():
    """ms-swift's reward registry after its own `--external_plugins` code has run (importing swift: 7 s)."""
    from swift.arguments import BaseArguments
    from swift.rewards import orms

    path = list(sys.path)
    BaseArguments._import_external_plugins(
        SimpleNamespace(external_plugins=[str(PLUGINS / "ocr_rewards.py")], custom_register_path=[])
    )
    sys.path[:] = path
    return orms


@pytest.fixture(scope="session")
def score(orms):
    """score(name, completion, reference): one pair through the registered class."""
    return lambda name, completion, reference: orms[name](args=None)([completion], solution=[reference])[0]


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("recieve", "receive", 1 - 2 / 7),  # two substitutions
        ("Москв", "Москва", 1 - 1 / 6),
        ("北京市", "东京市", 1 - 1 / 3),
        ("nothing alike at all", "xyz", 0),  # more errors than characters: clipped
        ("", "abc", 0),
        ("", "", 1),
        ("x", "", 0),
    ],
)
def test_cer_is_one_minus_errors_per_reference_character(score, completion, reference, expected):
    assert score("ocr_cer", completion, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("abXdef", "abcdef", 2 / 6),
        ("Привет, мур", "Привет, мир", 9 / 11),
        ("東京都", "東京", 1),  # what follows the whole reference is not a mistake in it
        ("bcdef", "abcdef", 0),
        ("", "abc", 0),
        ("", "", 1),
        ("x", "", 0),
    ],
)
def test_prefix_is_the_share_before_the_first_mistake(score, completion, reference, expected):
    assert score("ocr_prefix", completion, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("Ab 1", "Ab 1", 1),
        ("ab 1", "Ab 1", 0),
        ("Ab", "Ab 1", 0),
        ("Ёлка", "Елка", 0),
        ("Ａ①", "A1", 0),
        ("漢字", "漢字", 1),
        ("", "", 1),
        ("a", "", 0),
    ],
)
def test_perfect_is_all_or_nothing(score, completion, reference, expected):
    assert score("ocr_perfect", completion, reference) == expected


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("abcd", "wxyz", 1),
        ("да", "дада", 0.5),
        ("字字字字", "字字", 0.5),
        ("", "a", 0),
        ("a", "", 0),
        ("", "", 1),
    ],
)
def test_length_is_the_ratio_of_lengths(score, completion, reference, expected):
    assert score("ocr_length", completion, reference) == expected


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("invoice", "receipt", 0),  # wrong, but neither long nor repeating
        ("abcde", "wxyz", 0),  # a quarter longer is tolerated
        ("abcdefghij", "wxyz", -0.5),  # 10 characters where 5 are tolerated
        ("мамамамама", "каракатица", -5 / 7),  # 7 four-grams, 2 distinct
        ("的的的的的的的的", "今天天气真的很好", -4 / 5),
        ("a", "", -1),
        ("", "abc", 0),
        ("", "", 0),
    ],
)
def test_rambling_is_the_share_that_is_waste(score, completion, reference, expected):
    assert score("ocr_rambling", completion, reference) == pytest.approx(expected)


def test_rambling_allows_the_repeats_of_the_reference(score):
    assert score("ocr_rambling", "10000000000", "20000000000") == 0


def test_rambling_grows_with_each_repeat(score):
    scores = [score("ocr_rambling", "total 42 " * k, "total 42") for k in range(1, 9)]
    assert scores[0] == 0
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    "completion, reference, expected",
    [
        ("hello", "Straße", 1),
        ("Mocквa", "Москва", 2 / 6),  # M, o, c and a are Latin look-alikes
        ("カタカナ ひらがな", "漢字", 1),
        ("abc漢", "漢字", 1 / 4),
        ("αβγ", "abc", 0),
        ("Ａb", "ab", 1),  # full-width Latin is Latin
        ("iPhone 15 Про", "iPhone 15 Про", 1),
        ("телефон phone", "iPhone 15 Про", 1),  # a mixed reference allows each of its scripts anywhere
        ("手机", "iPhone 15 Про", 0),
        ("12:30", "ночь", 0),
        ("", "ночь", 0),
        ("12:30", "12:30", None),  # no letters, no script
        ("ночь", "12:30", None),
        ("", "", None),
    ],
)
def test_script_is_the_share_of_letters_in_the_reference_scripts(score, completion, reference, expected):
    assert score("ocr_script", completion, reference) == expected


@each_reward
@unhurried
@given(pair=pairs)
def test_every_reward_stays_in_its_range(score, name, pair):
    low, high = RANGES[name]
    reward = score(name, *pair)
    assert (reward is None and name == "ocr_script") or low <= reward <= high


@each_reward
@unhurried
@given(text=texts)
def test_the_truth_itself_scores_best(score, name, text):
    assert score(name, text, text) in (BEST[name], None)


@each_reward
@unhurried
@given(pair=pairs)
def test_unicode_form_and_surrounding_whitespace_do_not_count(score, name, pair):
    completion, reference = pair
    other = f"\n {unicodedata.normalize('NFD', completion)}\t"
    assert score(name, other, f" {unicodedata.normalize('NFD', reference)}\n") == score(name, completion, reference)


@each_reward
@unhurried
@given(completions=st.lists(texts, min_size=2, max_size=4), reference=texts)
def test_none_depends_on_the_reference_alone(score, name, completions, reference):
    """Else part of a GRPO group would count as 0 beside members with a score."""
    assert len({score(name, completion, reference) is None for completion in completions}) == 1


@each_reward
@unhurried
@given(data=st.data(), batch=st.lists(pairs, max_size=6))
def test_permuting_pairs_permutes_scores(orms, name, data, batch):
    reward = orms[name](args=None)

    def scored(batch):
        return reward([completion for completion, _ in batch], solution=[reference for _, reference in batch])

    order = data.draw(st.permutations(range(len(batch))))
    scores = scored(batch)
    assert scored([batch[i] for i in order]) == [scores[i] for i in order]


@each_reward
def test_each_completion_is_scored_against_its_own_reference(orms, name):
    """Scored against the first reference, the second and third completions would be wrong in every respect."""
    truths = ["a", "Привет, мир", "今天天气真的很好"]
    assert orms[name](args=None)(truths, solution=truths) == [BEST[name]] * 3


@each_reward
def test_a_row_without_solution_is_not_applicable(orms, name):
    assert orms[name](args=None)(["abc", "abc"], solution=[None, "abc"]) == [None, BEST[name]]


def test_a_missing_column_is_named_with_the_remedy(orms):
    with pytest.raises(ValueError, match=r"ocr_cer: .*no column 'solution'.*Add the true text"):
        orms["ocr_cer"](args=None)(["abc"], messages=[[]])


def test_a_solution_that_is_not_text_is_refused(orms):
    with pytest.raises(ValueError, match="'solution' must be text, got 42"):
        orms["ocr_cer"](args=None)(["42"], solution=[42])


def test_batches_of_different_lengths_are_refused(orms):
    with pytest.raises(ValueError):
        orms["ocr_cer"](args=None)(["a", "b"], solution=["a"])


def test_rewards_run_in_ms_swifts_own_scoring(orms):
    """Columns reach the rewards as swift passes them, and None becomes its "not applicable"."""
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import compute_rewards_per_func

    samples = [
        GRPOSample(messages=[{"role": "assistant", "content": said}], extra={"solution": true})
        for said, true in [("кот", "кит"), ("123", "123")]
    ]
    rewards = compute_rewards_per_func(samples, [orms[name](args=None) for name in RANGES], None, device="cpu")
    assert rewards[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 1, 0, 1])
    assert rewards[1].tolist() == pytest.approx([1, 1, 1, 1, 0, float("nan")], nan_ok=True)


@each_reward
def test_the_logged_name_is_the_flag_name(orms, name):
    """ms-swift logs rewards/<class name>/mean."""
    assert orms[name].__name__ == name


@pytest.mark.parametrize("plugin", sorted(PLUGINS.glob("*.py")), ids=lambda plugin: plugin.stem)
def test_a_plugins_name_hides_no_module(plugin):
    """ms-swift puts the plugins' folder first on sys.path, where `utils.py` would replace someone's `utils`."""
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != PLUGINS]
    assert plugin.stem not in sys.stdlib_module_names
    assert PathFinder.find_spec(plugin.stem, elsewhere) is None
