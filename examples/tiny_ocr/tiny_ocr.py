"""The embedded model and its data: a tiny Qwen3-VL that reads rendered words.

    python examples/tiny_ocr/tiny_ocr.py data --out runs/tiny_ocr_data
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/tiny_ocr/tiny_ocr.py train --out runs/tiny_ocr

`data` renders every dataset of the demo, always the same for the same --seed. `train` makes the model of
`examples/tiny_ocr/model` from nothing, on words rendered on the fly that never include a held-out one.
"""

import argparse
import json
import math
import os
import string
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prunekit.arguments import share
from prunekit.checkpoint import check_out, new_folder
from prunekit.errors import run_script

HEIGHT, WIDTH = 32, 192  # six image tokens: patches of 16 pixels, merged 2 by 2
FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
PROMPT = "Read the text."
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
# Letters that a Latin reader would take for Latin ones, in either case: a word of these alone has no script.
LOOKALIKES = frozenset("авекмнорстухАВЕКМНОРСТУХ")


@dataclass(frozen=True)
class Look:
    """How hard a rendering is: font sizes, shift in pixels, noise and contrast in grey levels, rotation in degrees."""

    sizes: tuple[int, int] = (20, 26)
    noise: float = 12.0
    rotation: float = 1.5
    contrast: int = 90
    shift: float = 20.0


PLAIN = Look()
HARD = Look(sizes=(15, 21), noise=34.0, rotation=3.0, contrast=60)

# name of the file, rows, script, word lengths, look
DATASETS = {
    "train": (16000, "latin", (3, 8), PLAIN),
    "val": (300, "latin", (3, 8), PLAIN),
    "test": (1000, "latin", (3, 8), PLAIN),
    "cyrillic_train": (4000, "cyrillic", (3, 6), PLAIN),
    "cyrillic_val": (200, "cyrillic", (3, 6), PLAIN),
    "rl_train": (1024, "latin", (5, 9), HARD),
    "rl_val": (300, "latin", (5, 9), HARD),
}
HELD_OUT = ("val", "test", "cyrillic_val", "rl_val")


def make_word(rng: np.random.Generator, script: str, lengths: tuple[int, int]) -> str:
    """A random word: lower, upper or title case, a number, or a code of capitals and digits."""
    length = int(rng.integers(lengths[0], lengths[1] + 1))
    style = rng.choice(["lower", "upper", "title", "digits", "code"], p=[0.3, 0.2, 0.2, 0.1, 0.2])
    if script == "cyrillic":
        while True:
            word = "".join(rng.choice(list(CYRILLIC), length))
            word = {"lower": word, "upper": word.upper(), "title": word.capitalize()}.get(style, word)
            if sum(letter not in LOOKALIKES for letter in word) * 2 >= length:
                return word
    alphabet = {"digits": string.digits, "code": string.ascii_uppercase + string.digits}
    word = "".join(rng.choice(list(alphabet.get(style, string.ascii_lowercase)), length))
    return {"upper": word.upper(), "title": word.capitalize()}.get(style, word)


_fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if (name, size) not in _fonts:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
        _fonts[name, size] = ImageFont.truetype(str(path), size)
    return _fonts[name, size]


def render(rng: np.random.Generator, word: str, look: Look) -> np.ndarray:
    """Draw a word. Returns grey levels, uint8 (HEIGHT, WIDTH)."""
    name, size = FONTS[rng.integers(len(FONTS))], int(rng.integers(look.sizes[0], look.sizes[1] + 1))
    while (box := font(name, size).getbbox(word))[2] - box[0] > WIDTH - 8:
        size -= 1
    ink = int(rng.integers(0, 110))
    paper = int(rng.integers(ink + look.contrast, 256))
    image = Image.new("L", (WIDTH, HEIGHT), paper)
    slack = WIDTH - (box[2] - box[0]) - 4, HEIGHT - (box[3] - box[1]) - 4
    x = 2 - box[0] + rng.uniform(0, min(look.shift, slack[0]))
    y = 2 - box[1] + max(slack[1], 0) * (0.5 + rng.uniform(-0.5, 0.5) * min(1, look.shift / 20))
    ImageDraw.Draw(image).text((x, y), word, fill=ink, font=font(name, size))
    angle = rng.uniform(-look.rotation, look.rotation) * min(1.0, 60 / (box[2] - box[0]))
    pixels = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper), np.float32)
    pixels = pixels + rng.normal(0, rng.uniform(0, look.noise), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def held_out_words(seed: int) -> frozenset[str]:
    """Every word of the validation and test sets, which no training set may hold."""
    return frozenset(word for name in HELD_OUT for word in _words(name, seed, frozenset()))


def _words(name: str, seed: int, banned: frozenset[str]) -> list[str]:
    rows, script, lengths, _ = DATASETS[name]
    rng = np.random.default_rng([seed, list(DATASETS).index(name)])
    words: dict[str, None] = {}
    while len(words) < rows:
        word = make_word(rng, script, lengths)
        if word not in banned:
            words[word] = None
    return list(words)


CHUNK = 1000  # rows that share a random generator, so that chunks can be drawn side by side


def pictures(name: str, words: list[str], seed: int, chunk: int) -> np.ndarray:
    """Draw a data set's words number chunk * CHUNK and on. Returns uint8 (up to CHUNK, HEIGHT, WIDTH)."""
    rng = np.random.default_rng([seed, list(DATASETS).index(name), 1, chunk])
    return np.stack([render(rng, word, DATASETS[name][3]) for word in words[chunk * CHUNK : (chunk + 1) * CHUNK]])


def image_name(name: str, number: int) -> str:
    """Where in the data's folder a row's picture is."""
    return f"images/{name}_{number:05d}.png"


def _save_chunk(folder: Path, name: str, words: list[str], seed: int, chunk: int) -> int:
    drawn = pictures(name, words, seed, chunk)
    for number, picture in enumerate(drawn, chunk * CHUNK):
        Image.fromarray(picture).save(folder / image_name(name, number), compress_level=1)
    return len(drawn)


def make_data(out: Path, seed: int, part: float = 1.0) -> None:
    """Write NAME.jsonl (ms-swift messages with images; the truth again in the column `solution`) and images.

    Of every data set the first `part` (a share) of its words, the same as in all of it.
    """
    from tqdm import tqdm

    banned = held_out_words(seed)
    words_of = {name: _words(name, seed, frozenset() if name in HELD_OUT else banned) for name in DATASETS}
    words_of = {name: words[: math.ceil(len(words) * part)] for name, words in words_of.items()}
    with new_folder(out) as folder, ProcessPoolExecutor() as pool:
        (folder / "images").mkdir()
        drawing = [
            pool.submit(_save_chunk, folder, name, words, seed, chunk)
            for name, words in words_of.items()
            for chunk in range(math.ceil(len(words) / CHUNK))
        ]
        with tqdm(total=sum(map(len, words_of.values())), desc="render", unit="image") as progress:
            for chunk in as_completed(drawing):
                progress.update(chunk.result())
        rows_of = {
            name: [
                {
                    "messages": [
                        {"role": "user", "content": f"<image>{PROMPT}"},
                        {"role": "assistant", "content": word},
                    ],
                    # ms-swift reads relative image paths from the working directory.
                    "images": [str(out.resolve() / image_name(name, number))],
                    "solution": word,
                }
                for number, word in enumerate(words)
            ]
            for name, words in words_of.items()
        }
        # A LoRA that sees the new script alone unlearns Latin, and a recovery without the little Cyrillic that the
        # base can read unlearns that.
        latin, cyrillic = rows_of["train"], rows_of["cyrillic_train"]
        rows_of["train"] = latin + cyrillic[: len(cyrillic) // 2]
        rows_of["lora_train"] = cyrillic + latin[: len(cyrillic) * 3 // 2]
        write_rows(folder, rows_of)


def write_rows(folder: Path, rows_of: dict[str, list[dict]]) -> None:
    """NAME.jsonl of every data set."""
    for name, rows in rows_of.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
# One token for each word of the prompt keeps sequences, and with them every step, short.
PROMPT_WORDS = ("system", "user", "assistant", "Read", " the", " text")


def build_processor():
    """A Qwen3VLProcessor over 256 bytes, the special tokens and the prompt's words."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    alphabet = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in PROMPT_WORDS])
    return processor_of(tokenizer)


def processor_of(tokenizer):
    """A Qwen3VLProcessor with this tokenizer: patches of 16 pixels, merged 2 by 2."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    vision = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    vision |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512}, **vision)
    videos = Qwen3VLVideoProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512}, **vision)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(processor):
    """A random Qwen3-VL of 2.3 million parameters: QK-norm, GQA 8:4, head_dim 16, DeepStack from 3 blocks."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 6,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 16,
            "out_hidden_size": 96,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 3, 4],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    return model


class Batches:
    """Turns words and pictures into model inputs; every picture has one size, so positions never change."""

    def __init__(self, processor, model):
        import torch

        self.processor = processor
        image = Image.new("L", (WIDTH, HEIGHT))
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        encoded = processor(text=[text], images=[image], return_tensors="pt")
        self.prompt = encoded["input_ids"][0].tolist()
        self.grid = encoded["image_grid_thw"]
        self.types = encoded["mm_token_type_ids"]
        positions, _ = model.model.get_rope_index(encoded["input_ids"], self.types, image_grid_thw=self.grid)
        after = torch.arange(64) + positions.max() + 1
        self.positions = torch.cat([positions, after.expand(3, 1, -1)], dim=2)

    def __call__(self, words: list[str], pictures: np.ndarray) -> dict:
        """words: B strings; pictures: uint8 (B, HEIGHT, WIDTH)."""
        import torch

        answers = self.processor.tokenizer([f"{word}<|im_end|>\n" for word in words])["input_ids"]
        longest = max(map(len, answers))
        ids = torch.zeros(len(words), len(self.prompt) + longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        ids[:, : len(self.prompt)] = torch.tensor(self.prompt)
        for row, answer in enumerate(answers):
            end = len(self.prompt) + len(answer)
            ids[row, len(self.prompt) : end] = labels[row, len(self.prompt) : end] = torch.tensor(answer)
        pixels = torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
        patches, _, _ = self.processor.image_processor.patchify(pixels, 16, 2, 2)
        types = torch.zeros_like(ids)
        types[:, : len(self.prompt)] = self.types
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": self.positions[:, :, : ids.shape[1]].expand(-1, len(words), -1),
            "mm_token_type_ids": types,
            "pixel_values": patches.flatten(0, 1),
            "image_grid_thw": self.grid.expand(len(words), -1),
        }


def curriculum(done: float) -> tuple[int, int]:
    """Word lengths by the share of training that is done: single letters first."""
    return (1, 1) if done < 0.04 else (1, 3) if done < 0.12 else (1, 8) if done < 0.3 else (3, 8)


def accuracy(model, batches: Batches, name: str, seed: int) -> tuple[float, float]:
    """token_acc and the share of words read without a mistake, teacher-forced (so equal to greedy decoding's)."""
    import torch

    words = _words(name, seed, frozenset())
    drawn = np.concatenate([pictures(name, words, seed, chunk) for chunk in range(math.ceil(len(words) / CHUNK))])
    right = total = exact = 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(words), 100):
            batch = batches(words[start : start + 100], drawn[start : start + 100])
            labels = batch.pop("labels")[:, 1:]
            correct = model(**batch).logits[:, :-1].argmax(-1) == labels
            counted = labels != -100
            right += int((correct & counted).sum())
            total += int(counted.sum())
            exact += int((correct | ~counted).all(1).sum())
    model.train()
    return right / total, exact / len(words)


def train(out: Path, steps: int, batch_size: int, seed: int, overwrite: bool) -> None:
    """Train from scratch with Muon (Jordan 2024) for matrices and AdamW for the rest; rank 0 writes OUT in bf16."""
    import torch
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        check_out(out, overwrite=overwrite)
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor)
    batches = Batches(processor, model)
    net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))),
        )
        for optimizer in optimizers
    ]
    banned = held_out_words(seed)
    rng = np.random.default_rng([seed, 1000 + rank])
    start = time.time()
    for step in range(steps):
        words: list[str] = []
        while len(words) < batch_size:
            # A few Cyrillic words: enough to see the letters, far too few to read them well.
            script = "cyrillic" if rng.random() < 0.03 else "latin"
            lengths = curriculum(step / steps)
            word = make_word(rng, script, lengths if script == "latin" else (1, min(6, lengths[1])))
            if word not in banned:
                words.append(word)
        ease = min(1.0, step / steps / 0.4)
        look = replace(PLAIN, noise=PLAIN.noise * ease, rotation=PLAIN.rotation * ease, shift=PLAIN.shift * ease)
        drawn = np.stack([render(rng, word, look) for word in words])
        loss = net(**batches(words, drawn)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedule, strict=True):
            optimizer.step()
            scheduler.step()
        net.zero_grad()
        if rank == 0 and (step % 50 == 0 or step == steps - 1):
            line = f"step {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s"
            if step % 400 == 0 or step == steps - 1:
                for name in ("val", "cyrillic_val", "rl_val"):
                    line += "  {} token_acc {:.3f} exact {:.3f}".format(name, *accuracy(model, batches, name, seed))
            print(line, flush=True)
    if rank == 0:
        model = model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        with new_folder(out, overwrite=overwrite) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        print(
            "test token_acc {:.4f} exact {:.4f} (weights rounded to bf16)".format(
                *accuracy(model.float(), batches, "test", seed)
            )
        )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "train"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0)
        if name == "data":
            command.add_argument("--share", type=share, default=1.0, help="of every data set's rows (default: all)")
    command.add_argument("--overwrite", action="store_true")
    command.add_argument("--steps", type=int, default=3600, help="optimizer steps (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=64, help="words a process (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "data":
        make_data(args.out, args.seed, args.share)
    else:
        train(args.out, args.steps, args.batch_size, args.seed, args.overwrite)


if __name__ == "__main__":
    run_script(main)
