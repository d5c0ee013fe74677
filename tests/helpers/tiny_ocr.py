"""The script that made the embedded model, as a module: its words, pictures and prompt."""

import importlib.util
import json
import sys

import torch
from helpers.paths import EMBEDDED, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

spec = importlib.util.spec_from_file_location("tiny_ocr", ROOT / "examples/tiny_ocr/tiny_ocr.py")
tiny_ocr = sys.modules["tiny_ocr"] = importlib.util.module_from_spec(spec)  # by name for its worker processes
spec.loader.exec_module(tiny_ocr)


def write_word(draw, image):
    """Draw a Latin word into a picture file. Returns the row that asks for it, as ms-swift's messages."""
    word = tiny_ocr.make_word(draw, "latin", (3, 8))
    Image.fromarray(tiny_ocr.render(draw, word, tiny_ocr.PLAIN)).save(image)
    question = {"role": "user", "content": f"<image>{tiny_ocr.PROMPT}"}
    return {"messages": [question, {"role": "assistant", "content": word}], "images": [str(image)]}


def save_tiny_ocr_with_wide_heads(folder):
    """The embedded model with head_dim 32 instead of 16, and the same function.

    Each half of a head, which RoPE turns against the other, is padded with zeros from 8 to 16. The square of
    rope_theta gives the first 8 the old frequencies, the norms' weight makes up for the mean over twice as many and
    for the scale of the scores.
    """
    processor, model = AutoProcessor.from_pretrained(EMBEDDED), {}
    for name, values in load_file(EMBEDDED / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_norm.weight", "k_norm.weight")):
            halves = values.reshape(-1, 2, 8, *values.shape[1:])
            values = torch.cat([halves, torch.zeros_like(halves)], 2).reshape(-1, *values.shape[1:])
        elif name.endswith("self_attn.o_proj.weight"):
            halves = values.reshape(len(values), -1, 2, 8)
            values = torch.cat([halves, torch.zeros_like(halves)], 3).reshape(len(values), -1)
        model[name] = values.float() / 2**0.5 if name.endswith("k_norm.weight") else values.float()
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"dtype": "float32"}
    config["text_config"]["head_dim"] = 32
    config["text_config"]["rope_parameters"] |= {"rope_theta": 1e8, "mrope_section": [12, 2, 2]}
    processor.save_pretrained(folder)
    save_file(model, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
