"""What a teacher says, kept on the disk: packing, keys, shards, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from helpers.anything import QUICK
from helpers.paths import EMBEDDED
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prunekit.errors import PruneKitError
from prunekit.training.distillation_loss import TopK, distillation_loss, top_k
from prunekit.training.teacher_cache import Settings, TeacherCache, pack, row_key, unpack

SETTINGS = Settings(teacher="0123456789abcdef", vocabulary=500, top_k=8, temperature=1.0)


def said(tokens: int, settings: Settings = SETTINGS, sharpness: float = 3.0, seed: int = 0) -> TopK:
    logits = sharpness * torch.randn(tokens, settings.vocabulary, generator=torch.Generator().manual_seed(seed))
    return top_k(logits, torch.arange(tokens), settings.top_k)


def test_a_token_of_qwen3_takes_26_bytes():
    assert Settings("", 151936, 8, 1.0).token_bytes == 26


@QUICK
@given(vocabulary=st.integers(2, 200_000), k=st.integers(1, 40), tokens=st.integers(0, 5), sharpness=st.floats(0.1, 20))
def test_ids_come_back_as_they_were_and_probabilities_within_the_rounding(vocabulary, k, tokens, sharpness):
    vocabulary = min(vocabulary, 3000) if tokens else vocabulary
    settings = replace(SETTINGS, vocabulary=vocabulary, top_k=min(k, vocabulary))
    top = said(tokens, settings, sharpness)
    cells = pack(top, settings)
    assert cells.dtype == np.uint8 and cells.shape == (tokens, settings.token_bytes)
    back = unpack(cells, settings)
    assert torch.equal(back.indices, top.indices)
    both = [torch.cat([each.log_probs, each.log_tail[:, None]], -1).exp() for each in (top, back)]
    # Half a step of the fourth root in 8 bits is 0.8% of a probability of 1; the first has the errors of all others.
    torch.testing.assert_close(both[1].sum(-1), torch.ones(tokens))
    if tokens:
        assert (both[1][:, 1:] - both[0][:, 1:]).abs().max() <= 0.01
        assert (both[1][:, 0] - both[0][:, 0]).abs().max() <= 0.002 * settings.top_k + 0.01


def test_ids_use_all_bits_of_the_vocabulary():
    settings = replace(SETTINGS, vocabulary=2**17, top_k=2)
    top = TopK(torch.tensor([[2**17 - 1, 2**16]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log())
    assert unpack(pack(top, settings), settings).indices.tolist() == [[2**17 - 1, 2**16]]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_a_teacher_finds_impossible_leaves_every_loss_finite(beta):
    logits = torch.full((2, 500), -1e4)
    logits[:, 7] = 1e4
    kept = unpack(pack(top_k(logits, torch.arange(2), 8), SETTINGS), SETTINGS)
    student = torch.zeros(2, 500, requires_grad=True)
    loss = distillation_loss(student, torch.arange(2), kept, beta=beta)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_the_gradient_from_a_cache_is_nearly_that_of_the_top_k_it_was_filled_with():
    top = said(300)
    gradients = []
    for teacher in (top, unpack(pack(top, SETTINGS), SETTINGS)):
        student = torch.randn(300, 500, generator=torch.Generator().manual_seed(1)).requires_grad_()
        distillation_loss(student, torch.arange(300), teacher).backward()
        gradients.append(student.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9999


ENCODED = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "pixel_values": torch.ones(4, 6), "length": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": [1, 2, 4]},
        {"labels": [-100, -100, 3]},
        {"pixel_values": torch.ones(4, 6).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.001))},
        {"pixel_values": torch.ones(6, 4)},
        {"pixel_values": torch.ones(4, 6).double()},
        {"image_grid_thw": torch.tensor([[1, 2, 2]])},
        {"pixel_values": None},
        {"pixel_values": np.ones((4, 6), np.float32) * 1.001},
        {"pixel_values": [torch.ones(4, 6)]},
    ],
)
def test_whatever_the_model_sees_of_a_row_changes_its_key(change):
    assert row_key(ENCODED | change) != row_key(ENCODED)


def test_a_key_depends_on_neither_order_nor_notes_on_a_row():
    other = dict(reversed(list((ENCODED | {"length": 5}).items())))
    assert row_key(other) == row_key(ENCODED)


def test_a_number_in_the_middle_of_a_large_array_changes_a_key():
    one, other = np.zeros((2, 100_000), np.float32)
    other[50_000] = 1
    assert row_key({"images": [one]}) != row_key({"images": [other]})


def test_tensors_in_bf16_have_keys():
    assert row_key({"pixel_values": torch.ones(2, dtype=torch.bfloat16)})


@pytest.fixture
def filled(tmp_path):
    """A cache of three rows, of 5, 0 and 2 tokens."""
    cache = TeacherCache(tmp_path / "cache", SETTINGS)
    for number, tokens in enumerate((5, 0, 2)):
        cache.add(bytes([number]) * 16, said(tokens, seed=number))
    cache.flush()
    return tmp_path / "cache"


def test_rows_come_back_in_the_order_asked_for(filled):
    found = TeacherCache(filled).look_up([b"\2" * 16, b"\1" * 16, b"\0" * 16, b"\2" * 16])
    wanted = [said(2, seed=2).indices, said(5, seed=0).indices, said(2, seed=2).indices]
    assert torch.equal(found.indices, torch.cat(wanted))


def test_a_row_that_is_not_there_is_named_with_the_mend(filled):
    with pytest.raises(PruneKitError, match="has no row 7 of train.jsonl as it is now.*REFILL=1"):
        TeacherCache(filled).look_up([b"\7" * 16], ["row 7 of train.jsonl"])


def test_what_is_there_is_not_written_again(filled):
    cache = TeacherCache(filled, SETTINGS)
    cache.add(b"\0" * 16, said(5))
    cache.flush()
    assert len(list(filled.glob("*.safetensors"))) == 1


def test_two_processes_may_fill_a_cache_at_once(tmp_path):
    caches = [TeacherCache(tmp_path / "cache", SETTINGS) for _ in range(2)]
    for number, cache in enumerate(caches):
        cache.add(bytes([number]) * 16, said(3))
        cache.add(b"\6" * 16, said(4))
        cache.flush()
    assert len(TeacherCache(tmp_path / "cache")) == 3


def test_many_may_begin_a_cache_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            at_once = Barrier(8)
            begun = [pool.submit(_begin, tmp_path / str(number), at_once) for _ in range(8)]
            assert [each.result() for each in begun] == [SETTINGS] * 8
            assert [each.name for each in (tmp_path / str(number)).iterdir()] == ["cache.json"]


def _begin(folder, at_once):
    at_once.wait()
    return TeacherCache(folder, SETTINGS).settings


def test_many_tokens_are_written_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.training.teacher_cache.SHARD_TOKENS", 4)
    cache = TeacherCache(tmp_path / "cache", SETTINGS)
    cache.add(b"\1" * 16, said(5))
    assert len(TeacherCache(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    "change", [{"teacher": "f" * 16}, {"top_k": 4}, {"temperature": 0.9}, {"vocabulary": 501}], ids=lambda x: str(x)
)
def test_a_cache_of_other_settings_is_refused(filled, change):
    with pytest.raises(PruneKitError, match=f"another {next(iter(change)).replace('_', ' ')}.*choose another CACHE"):
        TeacherCache(filled, replace(SETTINGS, **change))


def test_a_torn_shard_is_named_with_the_mend(filled):
    [shard] = filled.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(PruneKitError, match=f"{shard.name}: a torn shard.*remove it.*REFILL=1"):
        TeacherCache(filled)


def test_a_shard_of_another_cache_is_named(filled):
    [shard] = filled.glob("*.safetensors")
    tensors = load_file(shard)
    save_file(tensors | {"tokens": tensors["tokens"][:, :-1].copy()}, shard)
    with pytest.raises(PruneKitError, match="isn't of this cache"):
        TeacherCache(filled)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(PruneKitError, match="is in use, and no teacher's cache"):
        TeacherCache(tmp_path, SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path / "cache", SETTINGS)
    cache.add(b"\1" * 16, said(5))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.flush()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["cache.json"]


def test_the_command_says_what_a_cache_holds(filled, script):
    done = script("prunekit.training.teacher_cache", filled)
    assert done.returncode == 0
    assert done.stdout.startswith("3 rows, 7 tokens of 17 bytes, ") and "top 8 at temperature 1" in done.stdout


def test_the_command_refuses_a_cache_of_other_settings_in_one_line(filled, script_here):
    done = script_here(
        "prunekit.training.teacher_cache",
        filled,
        "--teacher",
        EMBEDDED,
        "--",
        "--rlhf_type",
        "gkd",
        "--gkd_logits_topk",
        8,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "filled with another teacher" in done.stderr


def test_the_command_refuses_what_is_no_cache_in_one_line(tmp_path, script_here):
    done = script_here("prunekit.training.teacher_cache", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no teacher's cache" in done.stderr
