"""A scan's records: what a kill tore, damage, tables, paired differences."""

import json
import math

import numpy as np
import pytest
from helpers.scans import record, sample
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import PruneKitError
from prunekit.knockout.records import Records, paired


def test_what_a_kill_tore_is_dropped_and_the_rest_kept(tmp_path):
    file = tmp_path / "records.jsonl"
    records = Records(file)
    for batch in range(3):
        records.add(record([], batch, {"baseline": sample(1.0)}))
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("{", 0, -30)])
    assert sorted(Records(file).scores) == [((), 0), ((), 1)]
    Records(file).add(record([], 2, {"baseline": sample(1.0)}))
    assert sorted(Records(file).scores) == [((), 0), ((), 1), ((), 2)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "{", lambda r: "5", lambda r: "[]", lambda r: "{}", lambda r: "[" * 100_000, lambda r: "1" * 5000,
        lambda r: json.dumps(r | {"gone": 3}), lambda r: json.dumps(r | {"gone": [3]}),
        lambda r: json.dumps(r | {"batch": "0"}),
        lambda r: json.dumps(r | {"scores": [1]}), lambda r: json.dumps(r | {"scores": {"baseline": {}}}),
        lambda r: json.dumps(r | {"scores": {"baseline": sample(1.0) | {"loss": [1.0, 2.0]}}}),
        lambda r: json.dumps(r | {"scores": {"baseline": sample("1")}}),
        lambda r: json.dumps(r | {"influence": {"a": 1}}),
        lambda r: json.dumps(r | {"seconds": {}}),
        lambda r: json.dumps({key: value for key, value in r.items() if key != "influence"}),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_by_its_line(tmp_path, damage):
    good = record([], 0, {"baseline": sample(1.0)})
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(good) + "\n" + damage(good) + "\n")
    with pytest.raises(PruneKitError, match="records.jsonl line 2.*run again") as refused:
        Records(file)
    assert "\n" not in str(refused.value)


def test_records_in_no_encoding_are_a_users_error(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(PruneKitError, match="line 1"):
        Records(tmp_path / "records.jsonl")


def test_a_record_of_more_candidates_adds_to_the_batch_s_earlier_ones():
    records = Records(None)
    records.add(record([], 0, {"baseline": sample(1.0), "text-00": sample(2.0)}))
    records.add(record([], 0, {"baseline": sample(1.0), "text-01": sample(3.0)}))
    assert set(records.scores[(), 0]) == {"baseline", "text-00", "text-01"}


def test_a_table_has_the_samples_that_all_names_were_scored_on():
    records = Records(None)
    records.add(record([], 0, {"baseline": sample(1.0), "text-00": sample(2.0)}))
    records.add(record([], 1, {"baseline": sample(1.0)}))
    assert len(records.table([], ["baseline"])["baseline"]["loss"]) == 2
    assert len(records.table([], ["baseline", "text-00"])["baseline"]["loss"]) == 1


@given(st.integers(3, 40), st.floats(-2, 2), st.integers(0, 99))
def test_a_paired_difference_is_the_one_per_token_and_its_error_that_of_a_ratio(count, shift, seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 9, count).astype(float)
    noise = generator.normal(size=count)
    one = {"loss": generator.normal(size=count), "tokens": tokens}
    other = {"loss": one["loss"] + shift * tokens + noise, "tokens": tokens}
    mean, error = paired({"a": other, "b": one}, "a", "b", "loss")
    assert mean == pytest.approx(shift + noise.sum() / tokens.sum(), abs=1e-9)
    rest = noise - noise.sum() / tokens.sum() * tokens
    assert error == pytest.approx(math.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum(), abs=1e-9)
