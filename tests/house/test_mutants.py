"""The table of mistakes is of the code as it is."""

import pytest
from helpers.paths import ROOT
from mutant_table import FILES
from mutants import stale


@pytest.mark.parametrize("file", FILES)
def test_every_mistake_can_still_be_made_in_its_file(file):
    text, (_, mutants) = (ROOT / file).read_text(), FILES[file]
    assert [f"{mutant.old!r}: {why}" for mutant in mutants if (why := stale(mutant, text))] == []


@pytest.mark.parametrize("file", FILES)
def test_no_mistake_is_only_one_of_grammar(file):
    """That would be killed by whatever test, and say nothing."""
    text, (_, mutants) = (ROOT / file).read_text(), FILES[file]
    for mutant in mutants:
        compile(text.replace(mutant.old, mutant.new), file, "exec")
