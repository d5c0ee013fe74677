"""What a DeepSpeed configuration says of ZeRO, for all who ask."""

import json

import pytest

from prunekit.errors import PruneKitError
from prunekit.msswift.settings import DEEPSPEED, zero_optimization


@pytest.mark.parametrize("name", DEEPSPEED)
def test_ms_swifts_own_have_the_stage_of_their_names(name):
    assert zero_optimization(name)["stage"] == int(name[4])


@pytest.mark.parametrize(
    ("zero", "stage"),
    [({"stage": 3}, 3), ({"stage": "auto"}, 2), ({}, 0), ({"stage": 1, "offload_optimizer": {"stage": 3}}, 1)],
    ids=str,
)
def test_the_stage_is_that_of_zero_optimization_as_accelerate_and_deepspeed_fill_it_in(tmp_path, zero, stage):
    text = json.dumps({"zero_optimization": zero, "stage": 3, "mine": {"stage": 3}})
    file = tmp_path / "mine.json"
    file.write_text(text)
    for said in (text, text.replace('"', "'"), str(file)):
        assert zero_optimization(said) == zero | {"stage": stage}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("zero4", "no such file, and none of zero0, .*zero3_offload"),
        ("{", 'has no "zero_optimization"'),  # repaired, as ms-swift does
        ('{"stage": 3}', 'has no "zero_optimization"'),
        ('{"zero_optimization": true}', 'has no "zero_optimization"'),
        *(
            (json.dumps({"zero_optimization": {"stage": stage}}), f'"stage": {json.dumps(stage)} is none of 0, 1, 2')
            for stage in ("3", 4, -1, True, 2.0, None)
        ),
    ],
)
def test_a_configuration_without_a_stage_that_there_is_is_refused(said, message):
    with pytest.raises(PruneKitError, match=f"--teacher_deepspeed {'zero4' if said == 'zero4' else '{'}.*: {message}"):
        zero_optimization(said, "--teacher_deepspeed")
