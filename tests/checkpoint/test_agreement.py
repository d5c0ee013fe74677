"""What config.json says is what the weights hold."""

import json
import tracemalloc

import pytest
from helpers.checkpoints import refused


def miscounting(own, layers):
    folder = own("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder


@pytest.mark.parametrize("layers", [4, 6, 10**8])
def test_a_config_that_miscounts_layers_is_refused(layers, own):
    refused(miscounting(own, layers), f"says num_hidden_layers = {layers}, the weights hold text layers 0-4")


def test_a_config_is_checked_in_a_moment_whatever_it_counts(own):
    folder = miscounting(own, 10**8)
    tracemalloc.start()
    refused(folder, "says num_hidden_layers = 100000000, the weights hold text layers 0-4")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7
