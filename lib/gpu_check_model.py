"""Write a small Qwen3-VL of random weights, with the head sizes of the 8B one (128 and 72), which kernels depend on.

python lib/gpu_check_model.py OUT
"""

import sys
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

EMBEDDED = Path(__file__).resolve().parents[1] / "examples/tiny_ocr/model"

torch.manual_seed(0)
config = Qwen3VLConfig.from_pretrained(EMBEDDED)
sizes = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
for name, value in sizes.items():
    setattr(config.text_config, name, value)
for name, value in {"hidden_size": 288, "intermediate_size": 1152, "out_hidden_size": 512}.items():
    setattr(config.vision_config, name, value)
config.text_config.rope_parameters["mrope_section"] = [24, 20, 20]
Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(EMBEDDED).save_pretrained(sys.argv[1])
