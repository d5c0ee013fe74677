"""What several tests of taggers need."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from helpers.paths import ROOT


@pytest.fixture
def ner_run(monkeypatch):
    """ner_run(*arguments): the script in this process, which has its imports done."""
    spec = spec_from_file_location("ner_run", ROOT / "ner_run.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ner_run.py", *map(str, arguments)])
        module.main()

    return run
