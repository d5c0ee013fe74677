"""A tiny Qwen3-VL of many skills and its data, from nothing.

    python examples/tiny_vl/tiny_vl.py data --out runs/tiny_vl_data
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/tiny_vl/tiny_vl.py train --out runs/tiny_vl

`data` draws every data set, always the same for the same --seed. `train` makes OUT/model on scenes drawn on the fly,
none of them held out; what a skill lacks decides how much of it comes next. A training that was killed goes on by the
same command. OUT/log.jsonl has what was measured, OUT/curves.png shows it. A GPU is used where there is one; give it
processes that draw (--workers) and one training process alone.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny_ocr"))

import skills  # noqa: E402
from skills import HARD, PLAIN, SIZES, SKILLS, Look, Scene  # noqa: E402
from tiny_ocr import CYRILLIC, SPECIAL, image_name, processor_of, write_rows  # noqa: E402

from prunekit.arguments import share  # noqa: E402
from prunekit.checkpoint import fingerprint, new_folder, open_checkpoint  # noqa: E402
from prunekit.checkpoint.work_folder import claim_folder  # noqa: E402
from prunekit.errors import run_script  # noqa: E402
from prunekit.model.load import has_bfloat16  # noqa: E402

# name of the file, rows, skills, look
DATASETS: dict[str, tuple[int, tuple[str, ...], Look]] = {
    "train": (20000, SKILLS, PLAIN),
    "val": (480, SKILLS, PLAIN),
    "test": (1600, SKILLS, PLAIN),
    "cyrillic_train": (4000, ("cyrillic",), PLAIN),
    "cyrillic_val": (200, ("cyrillic",), PLAIN),
    "rl_train": (768, ("read",), HARD),
    "rl_val": (300, ("read",), HARD),
}
HELD_OUT = ("val", "test", "cyrillic_val", "rl_val")
CHUNK = 500  # rows that share a random generator, so that chunks can be drawn side by side


def plan_rows(name: str, seed: int, banned: frozenset[str]) -> list[Scene]:
    """A data set's scenes, its skills by turns; none has a banned key, and none is there twice."""
    rows, names, _ = DATASETS[name]
    rng = np.random.default_rng([seed, list(DATASETS).index(name)])
    scenes: dict[object, Scene] = {}
    while len(scenes) < rows:
        scene = skills.plan(rng, names[len(scenes) % len(names)])
        if not scene.keys & banned:
            scenes.setdefault((scene.keys, scene.turns[0]), scene)
    return list(scenes.values())


@functools.cache
def held_out_keys(seed: int) -> frozenset[str]:
    """The keys of every scene of the validation and test sets."""
    return frozenset(key for name in HELD_OUT for scene in plan_rows(name, seed, frozenset()) for key in scene.keys)


def pictures(name: str, scenes: list[Scene], seed: int, chunk: int) -> list[np.ndarray | None]:
    """Draw a data set's scenes number chunk * CHUNK and on, up to CHUNK of them."""
    rng = np.random.default_rng([seed, list(DATASETS).index(name), 1, chunk])
    return [skills.draw(rng, scene, DATASETS[name][2]) for scene in scenes[chunk * CHUNK : (chunk + 1) * CHUNK]]


def _save_chunk(folder: Path, name: str, scenes: list[Scene], seed: int, chunk: int) -> int:
    drawn = pictures(name, scenes, seed, chunk)
    for number, picture in enumerate(drawn, chunk * CHUNK):
        if picture is not None:
            Image.fromarray(picture).save(folder / image_name(name, number), compress_level=1)
    return len(drawn)


def _row(scene: Scene, image: Path) -> dict:
    prompt, answer = scene.turns[0]
    has_image = SIZES[scene.skill] is not None
    return {
        "messages": [
            {"role": "user", "content": f"<image>{prompt}" if has_image else prompt},
            {"role": "assistant", "content": answer},
        ],
        # ms-swift reads relative image paths from the working directory.
        "images": [str(image)] if has_image else [],
        "solution": answer,
        "skill": scene.skill,
    }


def make_data(out: Path, seed: int, part: float = 1.0) -> None:
    """Write NAME.jsonl (ms-swift messages with images; the truth again in `solution`, and the `skill`) and images.

    Of every data set the first `part` (a share) of its scenes, the same as in all of it.
    """
    from tqdm import tqdm

    banned = held_out_keys(seed)
    scenes_of = {name: plan_rows(name, seed, frozenset() if name in HELD_OUT else banned) for name in DATASETS}
    scenes_of = {name: scenes[: math.ceil(len(scenes) * part)] for name, scenes in scenes_of.items()}
    with new_folder(out) as folder, ProcessPoolExecutor() as pool:
        (folder / "images").mkdir()
        drawing = [
            pool.submit(_save_chunk, folder, name, scenes, seed, chunk)
            for name, scenes in scenes_of.items()
            for chunk in range(math.ceil(len(scenes) / CHUNK))
        ]
        with tqdm(total=sum(map(len, scenes_of.values())), desc="draw", unit="row") as progress:
            for chunk in as_completed(drawing):
                progress.update(chunk.result())
        rows_of = {
            name: [_row(scene, out.resolve() / image_name(name, number)) for number, scene in enumerate(scenes)]
            for name, scenes in scenes_of.items()
        }
        # As in tiny_ocr: a LoRA that sees the new script alone unlearns the rest, and so does a recovery without the
        # little Cyrillic that the base can read.
        known, cyrillic = rows_of["train"], rows_of["cyrillic_train"]
        rows_of["train"] = known + cyrillic[: len(cyrillic) // 4]
        rows_of["lora_train"] = cyrillic + known[: len(cyrillic) * 3 // 2]
        rows_of["rl_mixed"] = rows_of["rl_train"] + cyrillic[: len(rows_of["rl_train"]) // 3]
        write_rows(folder, rows_of)


VOCABULARY = 2304
# Words without a space before them. A merge that begins inside a word would hide letters of an answer in a token and
# make reading harder, so these are tokens of their own, as the roles are. So are colours and places, of which answers
# are made: spelled, most of their letters would follow from the first and teach nothing.
FIRST_WORDS = ("system", "user", "assistant", "Read", "How", "What", "Where", "Which", "Add", "Repeat")
FIRST_WORDS += (*skills.COLOURS, "top", "middle", "bottom")


def learn_merges(texts: list[str], number: int) -> list[tuple[str, str]]:
    """The byte-level BPE merges of a text that begin at a space, the most frequent first.

    As BPE learns them, but for pairs that begin inside a word: answers and what stands in a picture come as letters.
    """
    from collections import Counter

    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    split: pre_tokenizers.PreTokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text) if word.startswith("Ġ"))
    starts: Counter[str] = Counter()
    for word, count in words.items():
        for end in range(2, len(word) + 1):
            starts[word[:end]] += count
    best = sorted(starts, key=lambda start: (-starts[start], len(start), start))[:number]
    return [(start[:-1], start[-1]) for start in best]


def build_processor():
    """A Qwen3VLProcessor with Qwen's pre-tokenizer and a byte-level BPE learned on our prompts."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    # The vocabulary is the same for every seed of the data, so that models of two seeds can be compared and merged.
    rng = np.random.default_rng(10)
    texts = [skills.plan(rng, skill).turns[0][0] for skill in SKILLS for _ in range(3000 if skill == "copy" else 200)]
    texts.append("".join(f" {word}" for word in skills.LEXICON))
    split = ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [split.pre_tokenize_str(letter)[0][0] for letter in CYRILLIC + CYRILLIC.upper()]  # two bytes each
    merges = [(letter[0], letter[1]) for letter in letters]
    merges += learn_merges(texts, VOCABULARY - 256 - len(merges) - len(SPECIAL) - len(FIRST_WORDS))
    tokens = sorted(ByteLevel.alphabet()) + [one + two for one, two in merges]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in FIRST_WORDS])
    return processor_of(tokenizer)


def build_model(processor):
    """A random Qwen3-VL of 6.1 million parameters: QK-norm, GQA 8:4, head_dim 32, M-RoPE, DeepStack from 3 blocks."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 8,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": 16,
            "out_hidden_size": 128,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [2, 4, 6],
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


QUESTIONS = 32  # in a micro-batch, all of one skill
REVIEW = 50  # steps between two looks at what is learned
CYRILLIC_SHARE = 0.02  # enough to see the letters, far too little to read them well
# A skill waits until reading has come to this level: it needs the letters.
WAITS = {"line": 2, "add": 2, "cyrillic": 2}
# Reading carries lines and sums too. Pictures of things are few, with three questions each.
WEIGHTS = {"read": 7, "count": 2, "place": 2, "add": 2, "copy": 6}


def _top(skill: str) -> int:
    return len(skills.LEVELS[skill]) - 1


def turns_of(skill: str) -> int:
    """How many questions are asked about one picture: seeing it costs more than another question."""
    return {"line": 3, "count": 4, "place": 3, "bars": 3}.get(skill, 1)


@dataclass
class Curriculum:
    """What comes next, by what is learned: level and share of each skill. Rates: of answers without a mistake."""

    levels: dict[str, int]
    rates: dict[str, float]
    done: float = 0.0

    @classmethod
    def begin(cls, trained: bool) -> "Curriculum":
        return cls({skill: trained * _top(skill) for skill in SIZES}, dict.fromkeys(SIZES, 0.9 * trained))

    def review(self, right: dict[str, int], asked: dict[str, int], done: float) -> None:
        """Take in the answers since the last review; `done` is the share of the training behind us."""
        self.done = done
        for skill in SIZES:
            top, level = _top(skill), self.levels[skill]
            rate = right[skill] / max(1.0, asked[skill])
            if asked[skill]:
                self.rates[skill] += 0.5 * (rate - self.rates[skill])
            # The last two fifths are like the test for all, however far they came.
            least = math.ceil(top * min(1.0, max(0.0, done - 0.3) / 0.3))
            if skill == "cyrillic":
                self.levels[skill] = min(top, self.levels["read"])
            elif level < top and (rate > 0.7 or level < least):
                self.levels[skill], self.rates[skill] = level + 1, 0.5

    def shares(self) -> dict[str, float]:
        """The share of micro-batches by skill, sum 1."""
        weights = {}
        for skill in SKILLS:
            missing = 1 - self.rates[skill] * (self.levels[skill] + 1) / (_top(skill) + 1)
            waits = self.levels["read"] < WAITS.get(skill, 0) and self.done < 0.25
            weights[skill] = 0.0 if waits else (0.1 + missing) * WEIGHTS.get(skill, 1)
        cyrillic = CYRILLIC_SHARE if self.levels["read"] >= WAITS["cyrillic"] else 0.0
        scale = (1 - cyrillic) / sum(weights.values())
        return {skill: weight * scale for skill, weight in weights.items()} | {"cyrillic": cyrillic}


def pick_skills(shares: dict[str, float], number: int, seed: int, step: int) -> list[str]:
    """The skills of a step's micro-batches: each as often as its share says, but for one."""
    ends = np.cumsum([shares[skill] for skill in SIZES])
    places = (np.random.default_rng([seed, 2, step]).random() + np.arange(number)) / number
    return [list(SIZES)[min(int(index), len(SIZES) - 1)] for index in np.searchsorted(ends / ends[-1], places, "right")]


def places_of(rank: int, world: int, number: int) -> list[int]:
    """Which of a step's micro-batches a process has: dealt to and fro, as the first are the dearest."""
    turn = [*range(world), *reversed(range(world))]
    return [place for place in range(number) if turn[place % len(turn)] == rank]


def draw_batch(where: tuple[int, int, int], skill: str, level: int) -> tuple[list[Scene], np.ndarray | None]:
    """The micro-batch at `where` (seed, step, number): nothing else decides about chance."""
    rng, banned = np.random.default_rng([where[0], 3, *where[1:]]), held_out_keys(where[0])
    scenes: list[Scene] = []
    while len(scenes) < QUESTIONS // turns_of(skill):
        scene = skills.plan(rng, skill, level)
        if not scene.keys & banned:
            scenes.append(scene)
    look = PLAIN.eased(skills.LEVELS[skill][level][1])
    drawn = [skills.draw(rng, scene, look) for scene in scenes]
    return scenes, None if drawn[0] is None else np.stack(drawn)


def _up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit


class Batches:
    """Turns scenes and their pictures, all of one skill, into what a Network takes."""

    def __init__(self, processor, device):
        self.processor, self.device = processor, device
        self._known: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 20_000:
                self._known.clear()
            self._known[text] = self.processor.tokenizer(text)["input_ids"]
        return self._known[text]

    def __call__(self, scenes: list[Scene], drawn: np.ndarray | None, turns: int) -> dict:
        """Network's arguments; with them `labels` (tokens of answers, -100) and `owner` (a token's question)."""
        import torch

        tokens = 0 if drawn is None else drawn.shape[1] * drawn.shape[2] // skills.CELL**2
        image = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>" if tokens else ""
        rows, places, labels, owner, questions = [], [], [], [], 0
        for number, scene in enumerate(scenes):
            row: list[int] = []
            for turn, (prompt, answer) in enumerate(scene.turns[:turns]):
                row += self._encode(f"<|im_start|>user\n{'' if turn else image}")
                row += self._encode(prompt)
                row += self._encode("<|im_end|>\n<|im_start|>assistant\n")
                said = self._encode(answer) + self._encode("<|im_end|>\n")  # ms-swift's loss has the line end, too
                places += [(number, len(row) - 1 + index) for index in range(len(said))]
                labels += said
                owner += [questions] * len(said)
                row += said
                questions += 1
            rows.append(row)
        # Few shapes: oneDNN makes a kernel for each, which takes as long as using it, and keeps a thousand.
        length = _up(max(map(len, rows)), 4)
        more = _up(len(labels), 32) - len(labels)
        places, labels, owner = places + places[:1] * more, labels + [-100] * more, owner + owner[-1:] * more
        padded = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.tensor(row)
        patches = None
        if drawn is not None:
            pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
            patches = self.processor.image_processor.patchify(pixels, 16, 2, 2)[0].to(self.device)
        return {
            "ids": padded.to(self.device),
            "answers": torch.tensor([number * length + place for number, place in places], device=self.device),
            "patches": patches,
            "size": None if drawn is None else (drawn.shape[1] // skills.CELL, drawn.shape[2] // skills.CELL),
            "labels": torch.tensor(labels, device=self.device),
            "owner": torch.tensor(owner, device=self.device),
        }


def right_answers(logits, labels, owner):
    """Which questions are answered without a mistake, teacher-forced (so equal to greedy decoding). bool (questions)"""
    import torch

    right = torch.ones(int(owner[-1]) + 1, dtype=torch.bool, device=labels.device)
    right[owner[(logits.argmax(-1) != labels) & (labels != -100)]] = False
    return right


def measure(network, batches: Batches, name: str, seed: int, cache: dict) -> dict[str, float]:
    """The share of a data set's questions that are answered without a mistake, by skill."""
    import torch

    if name not in cache:
        scenes = plan_rows(name, seed, frozenset())
        chunks = range(math.ceil(len(scenes) / CHUNK))
        cache[name] = scenes, [picture for chunk in chunks for picture in pictures(name, scenes, seed, chunk)]
    scenes, drawn = cache[name]
    rates = {}
    for skill in dict.fromkeys(scene.skill for scene in scenes):
        numbers = [number for number, scene in enumerate(scenes) if scene.skill == skill]
        right = 0
        for start in range(0, len(numbers), QUESTIONS):
            some = numbers[start : start + QUESTIONS]
            stack = None if SIZES[skill] is None else np.stack([drawn[number] for number in some])
            batch = batches([scenes[number] for number in some], stack, 1)
            labels, owner = batch.pop("labels"), batch.pop("owner")
            with torch.no_grad():
                right += int(right_answers(network(**batch), labels, owner).sum())
        rates[skill] = round(right / len(numbers), 4)
    return rates


MUON_RATE, ADAMW_RATE = 0.015, 1.5e-3  # between 0.4 and 2 times of these reading begins as fast


class Optimizer:
    """Muon (Jordan 2024) for matrices, AdamW for the rest, on fp32 masters of a model in bf16.

    Matrices of one shape are a stack, which processes share out between them.
    """

    def __init__(self, model, rank: int, world: int):
        import torch

        self.rank, self.world = rank, world
        self.live = dict(model.named_parameters())
        self.tensors = {f"master.{name}": parameter.detach().float().clone() for name, parameter in self.live.items()}
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.live.items():
            if parameter.ndim == 2 and "embed" not in name:
                shapes.setdefault(tuple(parameter.shape), []).append(name)
        self.stacks = list(shapes.values())
        matrices = {name for names in self.stacks for name in names}
        self.others = [name for name in self.live if name not in matrices]
        for number, names in enumerate(self.stacks):
            self.tensors[f"momentum.{number}"] = torch.zeros(len(names), *self.live[names[0]].shape)
        for name in self.others:
            for kind in ("mean", "square"):
                self.tensors[f"{kind}.{name}"] = torch.zeros_like(self.tensors[f"master.{name}"])
        device = next(model.parameters()).device
        self.fast = torch.bfloat16 if has_bfloat16(device.type) else torch.float32
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        # One stretch of memory, stacks first: summed over processes, and each stack seen, without a copy.
        shapes_of = [(len(names), *self.live[names[0]].shape) for names in self.stacks]
        shapes_of += [tuple(self.live[name].shape) for name in self.others]
        sizes = [math.prod(shape) for shape in shapes_of]
        self.flat = torch.zeros(sum(sizes), device=device)
        parts = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes_of, strict=True)]
        self.stacked, others = parts[: len(self.stacks)], parts[len(self.stacks) :]
        pairs = zip(self.stacks, self.stacked, strict=True)
        self.gradients = {name: each for names, stack in pairs for name, each in zip(names, stack, strict=True)}
        self.gradients |= zip(self.others, others, strict=True)

    def collect(self) -> None:
        """Add the model's gradients to ours and clear them: sums in bf16 would lose the small ones."""
        for name, parameter in self.live.items():
            if parameter.grad is not None:
                self.gradients[name] += parameter.grad
                parameter.grad = None

    def step(self, number: int, micro_batches: int, rate: float) -> None:
        """The step of this number, from the sum over so many micro-batches, at a share of the full rate."""
        import torch.distributed as dist

        if self.world > 1:
            dist.all_reduce(self.flat)
        self.flat *= 1 / self.flat.norm().clamp(min=micro_batches)  # the mean, clipped to a norm of 1
        for index, (names, stack) in enumerate(zip(self.stacks, self.stacked, strict=True)):
            momentum = self.tensors[f"momentum.{index}"].lerp_(stack, 0.05)
            share = math.ceil(len(stack) / self.world)
            mine = slice(self.rank * share, (self.rank + 1) * share)
            updates = self._gather(self._orthogonal(stack[mine].lerp(momentum[mine], 0.95)), share)
            speed = MUON_RATE * rate * max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
            for name, update in zip(names, updates[: len(names)].float(), strict=True):
                self.tensors[f"master.{name}"].mul_(1 - 0.01 * MUON_RATE * rate).sub_(update, alpha=speed)
        for name in self.others:
            gradient, master = self.gradients[name], self.tensors[f"master.{name}"]
            mean = self.tensors[f"mean.{name}"].lerp_(gradient, 0.1)
            square = self.tensors[f"square.{name}"].lerp_(gradient.square(), 0.05)
            size = (square / (1 - 0.95 ** (number + 1))).sqrt_().add_(1e-8)
            master.mul_(1 - 0.01 * ADAMW_RATE * rate)
            master.addcdiv_(mean, size, value=-ADAMW_RATE * rate / (1 - 0.9 ** (number + 1)))
        self.flat.zero_()
        self.publish()

    def publish(self) -> None:
        """Give the model its weights."""
        import torch

        with torch.no_grad():
            for name, parameter in self.live.items():
                parameter.copy_(self.tensors[f"master.{name}"])

    def _orthogonal(self, stack):
        """Newton-Schulz iterations. (matrices, rows, columns), fp32 to what is fast here"""
        import torch

        flipped = stack.shape[1] > stack.shape[2]
        mine = (stack.mT if flipped else stack).to(self.fast, memory_format=torch.contiguous_format)
        mine = mine / (mine.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(self.fast)
        for _ in range(5):
            square = mine @ mine.mT
            factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
            mine = torch.baddbmm(mine, factor, mine, beta=3.4445)
        return mine.mT if flipped else mine

    def _gather(self, mine, share: int):
        """The processes' shares of a stack, one behind the other; what is missing at its end is zeros."""
        import torch
        import torch.distributed as dist

        if self.world == 1:
            return mine
        padded = torch.zeros(share, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        padded[: len(mine)] = mine
        whole = torch.empty(self.world * share, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        dist.all_gather(list(whole.split(share)), padded)
        return whole


def halve(model) -> None:
    """Turn the parameters to bf16, but not the frequencies of positions, as in a model that transformers loads."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """As a share of the full one: a short warm-up, then down in a straight line, to 1% (Bergsma et al. 2025)."""
    return min(1.0, (step + 1) / 60) * (peak - (peak - 0.01) * step / steps)


def save_state(out: Path, tensors: dict, story: dict) -> None:
    """OUT/state.safetensors, whole or as before, and OUT/log.jsonl."""
    from safetensors.torch import save_file

    partial = out / ".state.new"
    save_file(tensors, partial, {"story": json.dumps(story)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(out / "state.safetensors")
    text = "".join(json.dumps(line) + "\n" for line in story["log"])
    (out / ".log.new").write_text(text)
    (out / ".log.new").replace(out / "log.jsonl")


def save_curves(out: Path, log: list[dict]) -> None:
    """OUT/curves.png: what of the validation sets is answered without a mistake, by questions seen."""
    from prunekit.report.style import COOL, WARM, new_figure, save_figure

    measured = [line for line in log if "measured" in line]
    figure, axes = new_figure(1, 9, 5)
    for colour, skill in zip(COOL, measured[-1]["measured"], strict=False):
        seen = [line["questions"] / 1e3 for line in measured]
        style = "--" if skill not in SKILLS else "-"
        axes[0, 0].plot(seen, [line["measured"][skill] for line in measured], style, color=colour, label=skill)
    axes[0, 0].axhline(0.95, color=WARM[0], linewidth=0.8)
    axes[0, 0].set(xlabel="questions seen, thousands", ylabel="answers without a mistake", ylim=(0, 1.02))
    axes[0, 0].legend(loc="lower right", ncols=2)
    save_figure(figure, out / "curves.png")


def train(args: argparse.Namespace) -> None:
    """Train from nothing, from a model, or on from OUT's last state; rank 0 writes."""
    import torch
    import torch.distributed as dist

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    settings = {"steps": args.steps, "micro_batches": args.micro_batches, "seed": args.seed, "processes": world}
    if args.base:
        settings |= {"base": fingerprint(open_checkpoint(args.base)), "rate": args.rate}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    claim = claim_folder(args.out, settings, "training") if rank == 0 else contextlib.nullcontext()
    with claim:
        if world > 1:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        if (args.out / "model").exists():
            print(f"{args.out / 'model'}: finished")
        else:
            _train(args, device, rank, world)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()


def _train(args: argparse.Namespace, device, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist
    from network import Network
    from safetensors import safe_open

    out, steps, seed, workers = args.out, args.steps, args.seed, args.workers
    number = args.micro_batches * world  # micro-batches a step
    places = places_of(rank, world, number)
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor)
    if args.base:
        model.load_state_dict(type(model).from_pretrained(args.base, dtype=torch.float32).state_dict())
    optimizer = Optimizer(model.to(device), rank, world)
    if has_bfloat16(device.type):
        halve(model)
    compiled = args.compile
    if compiled is None:
        compiled = device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None
    network, batches = Network(model, compiled), Batches(processor, device)
    story = {
        "step": 0,
        "questions": 0,
        "seconds": 0.0,
        "curriculum": vars(Curriculum.begin(bool(args.base))),
        "log": [],
    }
    if (state := out / "state.safetensors").exists():
        with safe_open(state, "pt", device=str(device)) as file:
            story = json.loads(file.metadata()["story"])
            for name, tensor in optimizer.tensors.items():
                tensor.copy_(file.get_tensor(name))
        optimizer.publish()
    curriculum, cache = Curriculum(**story["curriculum"]), {}
    start, before = time.time(), story["seconds"]
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else contextlib.nullcontext()
    with pool:
        for first in range(story["step"], steps, REVIEW):
            here = range(first, min(first + REVIEW, steps))
            picked = {step: pick_skills(curriculum.shares(), number, seed, step) for step in here}
            mine = [(step, place) for step in here for place in places]
            which = [picked[step][place] for step, place in mine]
            jobs = (
                [(seed, step, place) for step, place in mine],
                which,
                [curriculum.levels[skill] for skill in which],
            )
            drawn = pool.map(draw_batch, *jobs) if workers else map(draw_batch, *jobs)
            tallies = torch.zeros(3, len(SIZES), device=device)  # right, asked, loss by skill
            for step in here:
                for skill in (picked[step][place] for place in places):
                    batch = batches(*next(drawn), turns_of(skill))
                    labels, owner = batch.pop("labels"), batch.pop("owner")
                    logits = network(**batch)
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                    loss.backward()
                    optimizer.collect()
                    right = right_answers(logits.detach(), labels, owner)
                    column = tallies[:, list(SIZES).index(skill)]
                    column += torch.stack(
                        [right.sum(), right.new_tensor(len(right), dtype=torch.long), len(right) * loss.detach()]
                    )
                optimizer.step(step, number, learning_rate(step, steps, args.rate))
            if world > 1:
                dist.all_reduce(tallies)
            done = here[-1] + 1
            right, asked, losses = (
                {skill: row[index] for index, skill in enumerate(SIZES)} for row in tallies.tolist()
            )
            curriculum.review(right, asked, done / steps)
            story |= {
                "step": done,
                "questions": story["questions"] + int(sum(asked.values())),
                "seconds": round(before + time.time() - start, 1),
                "curriculum": vars(curriculum),
            }
            line = {key: story[key] for key in ("step", "questions", "seconds")}
            line |= {
                "loss": {skill: round(losses[skill] / asked[skill], 4) for skill in SIZES if asked[skill]},
                "right": {skill: round(right[skill] / asked[skill], 3) for skill in SIZES if asked[skill]},
                "levels": dict(curriculum.levels),
                "shares": {skill: round(share, 3) for skill, share in curriculum.shares().items()},
            }
            if rank == 0:
                if done % args.measure_every < REVIEW or done == steps:
                    line["measured"] = measure(network, batches, "val", seed, cache)
                    for name, skill in (("cyrillic_val", "cyrillic"), ("rl_val", "hard")):
                        line["measured"][skill] = next(iter(measure(network, batches, name, seed, cache).values()))
                story["log"].append(line)
                shown = " ".join(f"{skill} {rate:.2f}" for skill, rate in line.get("measured", line["right"]).items())
                kind = "held out" if "measured" in line else "training"
                print(
                    f"{done}/{steps} steps, {story['questions']} questions, {line['seconds']:.0f} s, {kind}: {shown}",
                    flush=True,
                )
                if done % args.save_every < REVIEW or done == steps:
                    save_state(out, optimizer.tensors, story)
                    if any("measured" in each for each in story["log"]):
                        save_curves(out, story["log"])
    if rank == 0:
        for parameter in model.parameters():  # as it is saved; buffers stay, as in `halve`
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
        print("test", json.dumps(measure(network, batches, "test", seed, cache)))
        halve(model)
        model.config.dtype = torch.bfloat16
        with new_folder(out / "model") as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "train"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0)
        if name == "data":
            command.add_argument("--share", type=share, default=1.0, help="of every data set's rows (default: all)")
    command.add_argument("--steps", type=int, default=11000, help="optimizer steps (default: %(default)s)")
    command.add_argument(
        "--micro-batches",
        type=int,
        default=2,
        help=f"of {QUESTIONS} questions of one skill, for each process and step (default: %(default)s)",
    )
    command.add_argument("--save-every", type=int, default=200, help="steps (default: %(default)s)")
    command.add_argument("--measure-every", type=int, default=500, help="steps (default: %(default)s)")
    command.add_argument("--workers", type=int, default=0, help="processes that draw, for GPUs (default: %(default)s)")
    command.add_argument(
        "--base", type=Path, metavar="MODEL", help="go on from its weights, all skills at their hardest"
    )
    command.add_argument("--rate", type=share, default=1.0, help="of learning, a share of the full one (default: all)")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="layers by torch.compile (default: on CPUs, where there is a C++ compiler)",
    )
    args = parser.parse_args()
    if args.command == "data":
        make_data(args.out, args.seed, args.share)
    else:
        train(args)


if __name__ == "__main__":
    run_script(main)
