"""In which type a model is loaded."""

import pytest
import torch

from prunekit.checkpoint import open_checkpoint
from prunekit.model import load


@pytest.mark.parametrize(
    ("has", "parameters", "dtype"),
    [(True, 60e6, torch.bfloat16), (False, 60e6, torch.float32), (True, 40e6, torch.float32)],
)
def test_bfloat16_is_for_large_models_on_processors_that_have_it(monkeypatch, tiny, has, parameters, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": has})
    monkeypatch.setattr(load, "statistics", lambda checkpoint: {"parameters": parameters})
    checkpoint = open_checkpoint(tiny("llama"))
    assert load.load_model(checkpoint, "cpu").dtype == dtype
    assert load.load_model(checkpoint, "cpu", "float16").dtype == torch.float16
