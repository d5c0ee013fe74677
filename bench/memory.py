"""How near does the counted memory of a training come to what it takes? Real trainings by ms-swift, on a CPU.

    bash bench/setup.sh && .venv/bin/python bench/memory.py --json docs/measured/memory.json

Each configuration is trained for three steps by ms-swift's own trainer, in this process, while torch's profiler reports
every allocation and release of the CPU's allocator: the peak between the first step and the last, plus the weights that
were there before. Beside it what `prunekit.memory` counts for the same line. Text models are small ones of each family
with random weights; SmolLM2-135M and the embedded model are trained ones. Prints a line each; takes minutes.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")

import torch
import transformers as hf
from materials import EMBEDDED, embedded_data, result_file, smollm2
from torch.profiler import ProfilerActivity, profile, record_function

from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.msswift.line import parse
from prunekit.training.memory import Training, estimate

PLUGINS = Path(__file__).parents[1] / "plugins"
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
GPT2 = {"vocab_size": 4096, "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 2048}
TEXT = {
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "qwen3-untied": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES | {"num_hidden_layers": 12})),
    "qwen3_moe": lambda: (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**SIZES, **MIXTURE)),
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=None)),
    "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)),
}
CPU = [
    *("--use_cpu", "true", "--fp16", "false", "--dataloader_num_workers", "0", "--check_model", "false"),
    *("--add_version", "false", "--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no"),
    *("--logging_steps", "1", "--max_steps", "3", "--split_dataset_ratio", "0"),
    *("--freeze_vit", "false", "--freeze_aligner", "false", "--dataset_num_proc", "1"),
]
FULL = ["--tuner_type", "full"]
LORA = ["--tuner_type", "lora", "--target_modules", "all-linear", "--lora_rank", "16", "--lora_dropout", "0.05"]
GKD = ["--rlhf_type", "gkd", "--lmbda", "0", "--beta", "1", "--temperature", "0.9", *FULL]
GRPO = [
    *("--rlhf_type", "grpo", "--beta", "0", "--num_generations", "4", "--max_completion_length", "64"),
    *("--reward_funcs", "format", *FULL),
]
PLAIN, CHECKPOINTED = ["--gradient_checkpointing", "false"], ["--gradient_checkpointing", "true"]
BF16 = ["--torch_dtype", "bfloat16", "--bf16", "true"]
MIXED = ["--torch_dtype", "float32", "--bf16", "true"]
FP32 = ["--torch_dtype", "float32", "--bf16", "false"]


def sized(batch: int, length: int, accumulation: int = 1) -> list[str]:
    return [
        *("--per_device_train_batch_size", str(batch), "--max_length", str(length)),
        *("--gradient_accumulation_steps", str(accumulation)),
    ]


# model, line; GRPO's lengths are of prompts
CASES: list[tuple[str, list[str]]] = [
    ("qwen3", [*FULL, *FP32, *PLAIN, *sized(1, 512)]),
    ("qwen3", [*FULL, *FP32, *CHECKPOINTED, *sized(1, 512)]),
    ("qwen3", [*FULL, *FP32, *PLAIN, *sized(4, 256)]),
    ("qwen3", [*FULL, *FP32, *CHECKPOINTED, *sized(4, 1024)]),
    ("qwen3", [*FULL, *FP32, *PLAIN, *sized(2, 256, 4)]),
    ("qwen3", [*FULL, *MIXED, *PLAIN, *sized(2, 512)]),
    ("qwen3", [*FULL, *MIXED, *CHECKPOINTED, *sized(2, 512)]),
    ("qwen3", [*FULL, *BF16, *PLAIN, *sized(2, 512)]),
    ("qwen3-untied", [*FULL, *FP32, *PLAIN, *sized(2, 512)]),
    ("qwen3-untied", [*FULL, *FP32, *CHECKPOINTED, *sized(2, 512)]),
    ("qwen3-untied", [*LORA, *BF16, *CHECKPOINTED, *sized(2, 512)]),
    ("qwen3-untied", [*LORA, *FP32, *PLAIN, *sized(2, 512)]),
    ("qwen3_moe", [*FULL, *FP32, *PLAIN, *sized(2, 256)]),
    ("qwen3_moe", [*FULL, *FP32, *CHECKPOINTED, *sized(2, 256)]),
    ("llama", [*FULL, *FP32, *PLAIN, *sized(2, 512)]),
    ("llama", [*FULL, *MIXED, *CHECKPOINTED, *sized(1, 2048)]),
    ("mistral", [*FULL, *FP32, *PLAIN, *sized(2, 512)]),
    ("gpt2", [*FULL, *FP32, *PLAIN, *sized(2, 512)]),
    ("gpt2", [*FULL, *FP32, *CHECKPOINTED, *sized(2, 1024)]),
    ("embedded", [*FULL, *FP32, *PLAIN, *sized(4, 128)]),
    ("embedded", [*FULL, *FP32, *CHECKPOINTED, *sized(8, 128)]),
    ("embedded", [*FULL, *MIXED, *PLAIN, *sized(8, 128)]),
    ("embedded", [*LORA, *FP32, *PLAIN, *sized(8, 128)]),
    ("embedded", [*GKD, *FP32, *PLAIN, *sized(4, 128), "--teacher_model", "embedded"]),
    ("qwen3", [*GKD, *FP32, *PLAIN, *sized(2, 512), "--teacher_model", "qwen3-untied"]),
    ("qwen3", [*GKD, *FP32, *CHECKPOINTED, *sized(2, 512), "--teacher_model", "qwen3-untied"]),
    ("qwen3", [*GKD, *FP32, *CHECKPOINTED, *sized(4, 512), *("--teacher_model", "qwen3", "--gkd_logits_topk", "32")]),
    ("qwen3", [*GRPO, *FP32, *PLAIN, *sized(4, 256)]),
    ("qwen3", [*GRPO, *FP32, *CHECKPOINTED, *sized(8, 256)]),
    ("smollm2", [*FULL, *FP32, *PLAIN, *sized(1, 256)]),
    ("smollm2", [*FULL, *FP32, *CHECKPOINTED, *sized(1, 512)]),
    ("smollm2", [*FULL, *MIXED, *CHECKPOINTED, *sized(1, 512)]),
    ("smollm2", [*FULL, *BF16, *PLAIN, *sized(1, 256)]),
    ("smollm2", [*LORA, *BF16, *CHECKPOINTED, *sized(1, 512)]),
    ("smollm2", [*LORA, *FP32, *PLAIN, *sized(1, 256)]),
    ("smollm2", [*GKD, *FP32, *CHECKPOINTED, *sized(1, 256), "--teacher_model", "smollm2"]),
]


class Recorder(hf.TrainerCallback):
    """Reads the peak off torch's profiler, from the first step on."""

    last: "Recorder"

    def __init__(self, args, trainer):
        self.trainer = trainer
        Recorder.last = self
        self.shapes: set[tuple[int, int, int, int]] = set()

    def on_train_begin(self, *_, **__):
        trainer = self.trainer
        models = [trainer.model, getattr(trainer, "teacher_model", None)]
        found = {}
        for model in filter(None, models):
            for tensor in (*model.parameters(), *model.buffers()):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.before = sum(found.values())
        compute, prepare = trainer.compute_loss, trainer._prepare_inputs

        def compute_loss(model, inputs, *args, **kwargs):
            given = inputs.get("model_inputs") or inputs
            grids, labels = given.get("image_grid_thw"), given.get("labels")
            rows, tokens = given["input_ids"].shape
            patches = 0 if grids is None else int(grids.prod(-1).max())
            # From the first token that is learnt on, as ms-swift keeps logits; RL has no labels
            learnt = inputs["grpo_batch"].logits_to_keep if labels is None else _learnt(given)
            self.shapes.add((rows, tokens, patches, learnt))
            return compute(model, inputs, *args, **kwargs)

        def prepare_inputs(inputs):
            with record_function("generation"):
                return prepare(inputs)

        trainer.compute_loss, trainer._prepare_inputs = compute_loss, prepare_inputs
        gc.collect()
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def on_train_end(self, *_, **__):
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        left = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "generation"]
        generates = getattr(self.trainer.args, "rlhf_type", "") == "grpo" or "GRPO" in type(self.trainer).__name__
        live = self.most = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += event.nbytes()
            if not (generates and any(start <= event.start_ns() <= end for start, end in left)):
                self.most = max(self.most, live)
        self.profile = None


def _learnt(inputs: dict) -> int:
    """Tokens of a batch's rows that are learnt: ms-swift has cut the labels to them and one more, unless it will."""
    labels = inputs["labels"]
    if labels.shape[1] < inputs["input_ids"].shape[1]:
        return labels.shape[1] - 1
    return labels.shape[1] - int((labels != -100).int().argmax(-1).min())


def tokenizer_of(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (EMBEDDED / name).exists():
            shutil.copy(EMBEDDED / name, folder)


def model_folder(name: str, runs: Path) -> Path:
    if name == "embedded":
        return EMBEDDED
    if name == "smollm2":
        return smollm2(runs / "smollm2")
    folder = runs / "memory" / name
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        cls, config = TEXT[name]()
        cls(config).save_pretrained(folder)
        tokenizer_of(folder)
    return folder


def rows_for(name: str, runs: Path, grpo: bool) -> Path:
    """Rows longer than any `--max_length` here, so that all are cut to it; of the embedded model one of its own."""
    file = runs / "memory" / f"rows-{name == 'embedded'}-{grpo}.jsonl"
    if name == "embedded":  # one row, so that all are of one length
        file.parent.mkdir(parents=True, exist_ok=True)
        with (embedded_data(runs / "tiny_vl") / "train.jsonl").open() as rows:
            file.write_text(next(rows) * 64)
        return file
    long = "The quick brown fox jumps over the lazy dog. " * 200
    question, answer = (long[:200], "a") if grpo else ("a", long)
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{json.dumps(row)}\n" * 64)
    return file


def train(name: str, line: list[str], runs: Path) -> tuple[Recorder, list[str]]:
    from swift import rlhf_main, sft_main

    rlhf = "--rlhf_type" in line
    model_type = json.loads((model_folder(name, runs) / "config.json").read_text())["model_type"]
    plugins = [str(PLUGINS / f"{each}.py") for each in ("images_and_answers", "gpt2_model")]
    if "--teacher_model" in line:
        plugins.append(str(PLUGINS / "distillation.py"))
        at = line.index("--teacher_model") + 1
        teacher = str(model_folder(line[at], runs))
        line = [*line[:at], teacher, *line[at + 1 :], "--teacher_model_type", model_type]
    template = {"embedded": "qwen3_vl", "smollm2": "chatml"}.get(name, "qwen")
    with tempfile.TemporaryDirectory() as out:
        whole = [
            *("--model", str(model_folder(name, runs)), "--model_type", model_type, "--template", template),
            *("--dataset", str(rows_for(name, runs, "grpo" in line)), "--output_dir", out, *CPU, *line),
            *("--truncation_strategy", "left" if "grpo" in line else "right"),
            *("--callbacks", "memory_recorder", "--external_plugins", *plugins),
        ]
        main = rlhf_main if rlhf else sft_main
        main(whole)
    return Recorder.last, whole


def measure(name: str, line: list[str], runs: Path) -> dict:
    recorder, whole = train(name, line, runs)
    measured = recorder.before + recorder.most
    batch, tokens, patches, learnt = map(max, zip(*recorder.shapes))
    swift = parse("rlhf" if "--rlhf_type" in line else "sft", whole)
    started = time.perf_counter()
    checkpoint = open_checkpoint(model_folder(name, runs))
    training = Training.of(swift, checkpoint, gpus=0, tokens=tokens, image=patches // 4, answer=learnt)
    counted = estimate(training)
    seconds = time.perf_counter() - started
    total = sum(counted.parts.values())
    own = total - counted.parts["weights"] - counted.parts.get("teacher", 0)
    gc.collect()
    return {
        "model": name,
        "line": " ".join(line),
        "batch": batch,
        "tokens": tokens,
        "image_tokens": patches // 4,
        "answer_tokens": learnt,
        "measured": measured,
        "counted": total,
        "error": round(total / measured - 1, 4),
        "error_without_weights": round(own / recorder.most - 1, 4),
        "parts": counted.parts,
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    numbers = range(len(CASES))
    parser.add_argument(
        "--cases", nargs="*", type=int, choices=numbers, metavar="N", help="numbers of configurations; default: all"
    )
    parser.add_argument("--json", type=result_file, help="also write the result here, into what is there")
    args = parser.parse_args()
    from swift.callbacks import callbacks_map

    callbacks_map["memory_recorder"] = Recorder
    rows = {}
    if args.json and args.json.is_file():  # of configurations that aren't measured anew
        rows = {row["case"]: row for row in json.loads(args.json.read_text())["configurations"]}
    for number in numbers if args.cases is None else args.cases:
        name, line = CASES[number]
        rows[number] = row = {"case": number, **measure(name, line, args.runs)}
        print(
            f"{number:3} {name:14}{row['measured'] / 1e6:9.1f} MB, counted {row['counted'] / 1e6:9.1f} "
            f"{row['error']:+7.2%} ({row['error_without_weights']:+.2%} without weights)  {row['seconds']} s  "
            f"{row['line']}",
            file=sys.stderr,
            flush=True,
        )
        if args.json:
            write_json(args.json, {"configurations": [rows[each] for each in sorted(rows)]})


if __name__ == "__main__":
    main()
