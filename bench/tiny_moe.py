"""Train a tiny mixture of experts to cut: a Qwen3-MoE of 4 layers and 16 experts, 4 of them a token.

    .venv/bin/python bench/tiny_moe.py runs/bench/tiny-moe --minutes 10

Three kinds of text, each of packages that .venv has: docstrings, Python's own source, and torch's C++ headers, in
tokens of a BPE of 1,024 that is trained on them. Files are split, so that no text of test.jsonl was trained on:
OUT/train.jsonl, OUT/calib.jsonl (of files trained on, as a user's data are) and OUT/test.jsonl hold rows
{"text": ..., "kind": ...}; OUT/model is a plain checkpoint with its tokenizer. AdamW, all in fp32, with transformers'
own loss that balances experts.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from materials import DOCUMENTED, _package, docstrings, texts_of
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, LENGTH, ROWS = 1024, 128, 16  # tokens; of a row; rows of a step
CHARACTERS = 400  # of a row of text: somewhat over 128 tokens
SIZES = {"train": 24_000, "calib": 1200, "test": 900}  # rows, of all kinds alike


def pieces(texts: Iterable[str]) -> list[str]:
    cut = (text[start : start + CHARACTERS] for text in texts for start in range(0, len(text), CHARACTERS))
    return [piece for piece in cut if len(piece) == CHARACTERS]


def kinds() -> dict[str, tuple[list[str], list[str]]]:
    """(to train on, held out) pieces of each kind of text; files are one or the other."""

    def read(files: Iterable[Path]) -> list[str]:
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]

    source, headers = Path(json.__file__).parents[1], _package("torch") / "include"
    files = {
        "docstrings": sorted(file for name in DOCUMENTED for file in _package(name).rglob("*.py")),
        "python": sorted(file for file in source.rglob("*.py") if not {"site-packages", "test"} & {*file.parts}),
        "c++": sorted(file for folder in ("c10", "torch") for file in (headers / folder).rglob("*.h")),
    }
    found = {}
    for kind, each in files.items():
        random.Random(0).shuffle(each)
        of = docstrings if kind == "docstrings" else read
        found[kind] = pieces(of(each[len(each) // 8 :])), pieces(of(each[: len(each) // 8]))
    return found


def write_data(folder: Path) -> dict[str, Path]:
    """train.jsonl, calib.jsonl and test.jsonl in the folder, by stem."""
    paths = {name: folder / f"{name}.jsonl" for name in SIZES}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {name: [] for name in SIZES}
    for kind, (trained, held_out) in kinds().items():
        for texts in (trained, held_out):
            random.Random(1).shuffle(texts)
        for name, size in SIZES.items():
            some = (held_out if name == "test" else trained)[: size // 3]
            rows[name] += [{"text": text, "kind": kind} for text in some]
    for name, path in paths.items():
        random.Random(2).shuffle(rows[name])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return paths


def train_tokenizer(rows: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    tokenizer.train_from_iterator(
        rows,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])


def new_model(experts: int, layers: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        num_experts=experts, num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=512,
        tie_word_embeddings=True, output_router_logits=True, router_aux_loss_coef=0.001,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def train(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, minutes: float, rate: float) -> float:
    """Train for so long on rows (n, LENGTH), drawn anew each time all were seen. Returns the last losses' mean."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    start, step, loss = time.monotonic(), 0, 0.0
    order = torch.randperm(len(tokens))
    while (done := (time.monotonic() - start) / 60 / minutes) < 1:
        some = order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 40, 1.0) * max(0.02, 1 - done)
        result = model(input_ids=tokens[some], labels=tokens[some], use_cache=False)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        own = float(result.loss.detach() - model.router_aux_loss_coef * result.aux_loss.detach())
        loss = own if not step else 0.98 * loss + 0.02 * own
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * done:.0f}%, loss {loss:.3f}", file=sys.stderr, flush=True)
    return loss


def tiny_moe(folder: Path, minutes: float = 10, experts: int = 16, layers: int = 4, rate: float = 3e-3) -> Path:
    """The folder, with data and a trained model; made if it isn't there."""
    if (folder / "model/model.safetensors").exists():
        return folder
    paths = write_data(folder)
    rows = texts_of(paths["train"])
    tokenizer = train_tokenizer(rows)
    encoded = [each.ids for each in tokenizer.backend_tokenizer.encode_batch(rows)]
    flat = torch.tensor([token for ids in encoded for token in [0, *ids]])
    tokens = flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH)
    model = new_model(experts, layers)
    loss = train(model, tokens, minutes, rate)
    print(f"{len(flat):,} tokens in all, loss {loss:.3f}", file=sys.stderr)
    model.config.output_router_logits = False
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/tiny-moe"))
    parser.add_argument("--minutes", type=float, default=10, help="of training (default: 10)")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    args = parser.parse_args()
    print(tiny_moe(args.out, args.minutes, args.experts, args.layers, args.rate))


if __name__ == "__main__":
    main()
