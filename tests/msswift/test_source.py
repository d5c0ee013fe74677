"""What is read of ms-swift's source is what the installed one says."""

import pytest

from prunekit.msswift.line import CLASSES, parser


@pytest.fixture(scope="session")
def swift_parsers():
    import swift
    from swift.utils.utils import _patch_get_type_hints
    from transformers import HfArgumentParser

    with _patch_get_type_hints():
        return {kind: HfArgumentParser([getattr(swift, name)], add_help=False) for kind, (_, name) in CLASSES.items()}


# what the source alone doesn't tell
LOOSER = {"parallelism_config", "log_level", "log_level_replica", "generation_config"}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_parser_is_the_one_that_swift_makes(kind, swift_parsers):
    def described(made):
        return {
            tuple(action.option_strings): (
                type(action).__name__,
                getattr(action.type, "__qualname__", None),
                action.nargs,
                action.const,
                tuple(action.choices or ()),
                action.required,
                None if action.dest == "optim" else action.default,
            )
            for action in made._actions
            if action.dest not in LOOSER
        }

    assert described(parser(kind)) == described(swift_parsers[kind])
    assert parser(kind)._option_string_actions.keys() == swift_parsers[kind]._option_string_actions.keys()
