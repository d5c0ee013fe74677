"""What ms-swift's own argument classes take."""

import pytest


@pytest.fixture(scope="session")
def parsers():
    from swift import ExportArguments, RLHFArguments, RolloutArguments, SftArguments
    from swift.utils.utils import _patch_get_type_hints
    from transformers import HfArgumentParser

    classes = {
        "sft": SftArguments,
        "rlhf": RLHFArguments,
        "export": ExportArguments,
        "rollout": RolloutArguments,
    }
    with _patch_get_type_hints():
        return {kind: HfArgumentParser([cls]) for kind, cls in classes.items()}
