"""Tensors on disk."""

import errno
import os

import pytest
import torch

from prunekit.checkpoint import scratch_folder
from prunekit.errors import PruneKitError
from prunekit.model.offload import on_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_on_disk_is_the_same_and_its_file_has_no_name(dtype, tmp_path):
    tensor = torch.arange(60).view(3, 4, 5).to(dtype)
    stored = on_disk(tmp_path)(tensor)
    assert torch.equal(stored, tensor) and stored.dtype == dtype
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(PruneKitError, match="out: the disk is full"),
        scratch_folder(tmp_path / "out") as folder,
    ):
        on_disk(folder)(torch.ones(3))
    assert not list(tmp_path.iterdir())
