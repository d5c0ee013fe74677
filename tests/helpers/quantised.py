"""Folders quantised as llm-compressor does it, by a few lines of torch: for tests without that package."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import open_checkpoint
from prunekit.serving.quantise import plan_quantise

LARGEST = 448  # of E4M3


def fp8_config(ignore):
    scale = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": scale | {"strategy": "channel", "dynamic": False},
        "input_activations": scale | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def write_fp8(source, out):
    """FP8 of the projections that a plan names, in OUT: weights and config.json, all other files as they are."""
    plan = plan_quantise(open_checkpoint(source), "fp8")
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    for name in plan.modules:
        weight = weights[f"{name}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        weights[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{name}.weight_scale"] = scale
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": fp8_config(plan.ignore)}))
    return out
