"""A tiny Qwen3.5, trained here on bytes of Python docstrings, and what cuts of its two kinds of layers lose untrained.

    bash bench/setup.sh && .venv/bin/python bench/hybrid.py --json docs/measured/hybrid.json

Four layers, of which every other attends fully (QK-norm, RoPE on a quarter of each head, output gates), the rest
linearly. RUNS/hybrid/model is made by --steps of AdamW, minutes on a CPU; a folder that is there isn't made again. Loss
is in nats a byte on rows of modules that neither training nor calibration saw, nor a docstring of theirs elsewhere.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import transformers as hf
from materials import modules, result_file

from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.data.batches import Calibration
from prunekit.model.scores import score_batches
from prunekit.surgery.cut import Cut, write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.kv_fit import fit_kv
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.layers_fit import fit_layers

LENGTH, ROWS = 64, 16  # linear attention computes in chunks of 64
TEXT = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "tie_word_embeddings": True,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 96}  # sees nothing


def rows_of_bytes(texts: list[str]) -> torch.Tensor:
    data = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in rows.split(ROWS)]


def train(rows: torch.Tensor, steps: int, folder: Path) -> None:
    torch.manual_seed(0)
    config = hf.Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    model = hf.Qwen3_5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps))
        x = rows[torch.randint(len(rows), (ROWS,))]
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    model.save_pretrained(folder)


def load(folder: Path) -> torch.nn.Module:
    return hf.Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument(
        "--rows", type=int, default=96, help="to fit on, a quarter as many to judge fits, as many to test"
    )
    parser.add_argument("--json", type=result_file, required=True)
    arguments = parser.parse_args()
    found_in = modules()
    half = len(found_in) * 3 // 4
    known, unknown = (rows_of_bytes(sum(part, [])) for part in (found_in[:half], found_in[half:]))
    folder = arguments.runs / "hybrid" / "model"
    if not folder.exists():
        train(known, arguments.steps, folder)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))[: arguments.rows * 5 // 4]
    fit, judge = known[order].split(arguments.rows)
    data = Calibration(batches(fit), batches(judge), fit.numel() + judge.numel(), {"path": "docstrings"})
    tests = batches(unknown[torch.randperm(len(unknown), generator=torch.Generator().manual_seed(2))][: arguments.rows])
    checkpoint = open_checkpoint(folder)
    found: dict[str, dict[str, float]] = {"base": score_batches(load(folder), tests)}

    def judge_cut(name: str, cut: Cut) -> None:
        out = arguments.runs / "hybrid" / name
        write_cut(cut, out, overwrite=True)
        found[name] = score_batches(load(out), tests)
        print(name, found[name], flush=True)
        write_json(arguments.json, {"steps": arguments.steps, "rows": arguments.rows, "on unknown modules": found})

    for kv_heads in (2, 1):
        judge_cut(f"kv{kv_heads}-mean", cut_kv(plan_kv(checkpoint, kv_heads)))
        plan = plan_kv(checkpoint, kv_heads, "calibrated")
        for refine in (0, 100):
            judge_cut(f"kv{kv_heads}-calibrated-{refine}", fit_kv(plan, load(folder), data, refine, quiet=True))
    for layer in (1, 2):
        layers = plan_layers(checkpoint, text=[layer])
        judge_cut(f"without-{layer}", cut_layers(layers))
        judge_cut(f"without-{layer}-healed", fit_layers(layers, load(folder), data, quiet=True))


if __name__ == "__main__":
    main()
