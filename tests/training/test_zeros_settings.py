"""Settings of sparsity: words, the papers' schedules, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import PruneKitError
from prunekit.training.zeros_settings import Dynamic, Gradual, parse_settings


def test_schedules_are_the_papers_formulas():
    assert Gradual(0.8, 0.1, 4, "exponential").levels() == pytest.approx([0.1, 0.2, 0.4, 0.8])
    thirds = [0.8 + (0.1 - 0.8) * (1 - share / 3) ** 3 for share in range(4)]
    assert Gradual(0.8, 0.1, 4, "cubic").levels() == pytest.approx(thirds)
    assert Gradual(0.6, events=1).levels() == [0.6]


@given(st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(1, 30), st.sampled_from(["cubic", "exponential"]))
def test_sparsity_never_falls_and_ends_where_it_shall(sparsity, start, events, schedule):
    levels = Gradual(sparsity, start * sparsity, events, schedule).levels()
    assert len(levels) == events and levels[-1] == sparsity
    assert all(a <= b + 1e-12 for a, b in zip(levels, levels[1:]))


def test_the_share_that_moves_falls_along_a_cosine():
    dynamic = Dynamic(interval=10, share=0.4, until=0.5)
    shares = [dynamic.share_at(step, 200) for step in range(200)]
    assert [step for step, share in enumerate(shares) if share] == list(range(10, 100, 10))
    assert shares[50] == pytest.approx(0.2) and shares[10] == pytest.approx(0.2 * (1 + 0.9510565))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Gradual, "", "say how sparse it shall be"),
        (Gradual, "sparsity=1.2", "0 < start <= sparsity < 1"),
        (Gradual, "sparsity=half", "'sparsity=half' needs a number"),
        (Gradual, "sparsity=0.5 start=0.6", "0 < start <= sparsity"),
        (Gradual, "sparsity=0.5 sparsity=0.6", "each once"),
        (Gradual, "sparsity=0.5 event=4", "'event=4' isn't one of sparsity, start, events"),
        (Gradual, "sparsity=0.5 events=0", "events=0: at least 1"),
        (Gradual, "sparsity=0.5 schedule=linear", "choose one of cubic, exponential"),
        (Gradual, "sparsity=0.5 worse=-1", "worse=-1.0: a positive share"),
        (Dynamic, "interval=0", "interval=0: at least 1 step"),
        (Dynamic, "share=2", "share=2.0: above 0, at most 1"),
    ],
)
def test_bad_settings_are_named(kind, text, message):
    with pytest.raises(PruneKitError, match="^PRUNEKIT_X: ") as error:
        parse_settings(kind, text, "PRUNEKIT_X")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_are_words():
    found = parse_settings(Gradual, "sparsity=0.7 events=5 modules=mlp|o_proj worse=0.1", "X")
    assert found == Gradual(0.7, events=5, modules="mlp|o_proj", worse=0.1)
    assert parse_settings(Dynamic, "", "X") == Dynamic()
