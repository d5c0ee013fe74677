"""How much memory of each GPU will a training take, part by part, and which setting saves how much?

    python -m prunekit.memory --stage sft --model checkpoints/pruned --gpus 8 --deepspeed zero2
    python -m prunekit.memory --stage gkd --model checkpoints/recovered --gpus 4 --teacher_model Qwen3-VL-8B-Instruct
    python -m prunekit.memory --stage lora --model checkpoints/mqa --gpus 1 --gpu-memory 24 --max_length 8192

Stages are full_run.sh (sft), distil.sh (gkd), rl_run.sh (grpo) and lora.sh (lora) with their own settings; ms-swift's
flags change them, as they do there. A step is gone through on fake tensors: nothing is trained, no weights are read, no
GPU is needed. Rows are as long as --max_length allows, images half of them (--tokens, --image-tokens, --answer-tokens
say otherwise, MAX_PIXELS how large an image may be). Prints a table, with --json JSON. Launchers print its first line
before they start. Not counted: CUDA's context, NCCL, fragmentation. Leave some GB.
"""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.arguments import Parser, finite_float, natural, positive_int
from prunekit.checkpoint import Checkpoint, open_checkpoint
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError, run_script
from prunekit.msswift.line import parse

if TYPE_CHECKING:
    from prunekit.training.memory import Estimate

FULL = ["--tuner_type", "full", "--freeze_vit", "false", "--freeze_aligner", "false"]
RLHF = ["--max_completion_length", "512"]
STAGES = {  # whose line, rows at once, rows a step, flags: as in the launchers
    "sft": ("sft", 4, 16, FULL),
    "lora": ("sft", 4, 16, ["--tuner_type", "lora", "--target_modules", "all-linear", "--freeze_vit", "false"]
             + ["--freeze_aligner", "false", "--lora_rank", "32", "--lora_dropout", "0.05"]),
    "gkd": ("rlhf", 4, 16, ["--rlhf_type", "gkd", "--lmbda", "1", *FULL, *RLHF]),
    "grpo": ("rlhf", 8, 32, ["--rlhf_type", "grpo", "--beta", "0", *FULL, *RLHF]),
}  # fmt: skip


def defaults(stage: str, gpus: int, flags: list[str]) -> list[str]:
    """The line of a launcher's own settings on so many GPUs (0: the CPU), where a user's flags don't say otherwise."""
    _, most, rows, line = STAGES[stage]
    processes = max(1, gpus)
    if not gpus and stage != "grpo":
        most = 1
    if stage == "grpo" and rows % processes:
        rows = 8 * processes
    batch = next(count for count in range(most, 0, -1) if count == 1 or rows % (count * processes) == 0)
    given = {flag.partition("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags if flag.startswith("--")}
    if "--teacher_model_server" in given and not any("://" in word for word in flags):
        line = [*line, "--lmbda", "0"]  # a cache
    zero = [] if not gpus or (stage == "lora" and gpus == 1) else ["--deepspeed", "zero2"]
    plain = "--deepspeed" in given and parse(STAGES[stage][0], flags).deepspeed in (None, "", "none")
    master = stage != "lora" and (plain or not zero)
    compute = "bfloat16" if gpus else "float32"
    line = [
        *line,
        *("--max_length", "4096", "--per_device_train_batch_size", str(batch)),
        *("--gradient_accumulation_steps", str(max(1, round(rows / (batch * processes))))),
        *("--torch_dtype", "float32" if master else compute, "--bf16", str(bool(gpus)).lower(), "--fp16", "false"),
        *zero,
    ]
    if not gpus:
        line += ["--gradient_checkpointing", "false"]
    elif stage == "grpo" or (stage == "gkd" and gpus == 1):
        line += ["--use_vllm", "true", "--vllm_mode", "colocate", "--sleep_level", "2"]
        line += ["--vllm_gpu_memory_utilization", "0.4" if stage == "grpo" else "0.3"]
    return line


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gpus", type=natural, default=1, help="that train, on all nodes; 0: the CPU")
    parser.add_argument("--gpu-memory", type=finite_float, default=0, help="GB of each; 0: not known")
    parser.add_argument("--tokens", type=positive_int, help="of the longest row, answer and all")
    parser.add_argument("--image-tokens", type=natural, help="of its images")
    parser.add_argument("--answer-tokens", type=positive_int, help="of its answer")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--line", action="store_true", help="flags are a launcher's whole line; print one line")
    args, flags = parser.parse_known_args()
    kind = STAGES[args.stage][0]
    line = [word for word in flags if word != "--"]
    if not args.line:
        line = [*defaults(args.stage, args.gpus, line), *line]
    swift = parse(kind, line)
    if swift.deepspeed and not args.gpus:
        raise PruneKitError(f"--deepspeed {swift.deepspeed}: it needs GPUs; give --gpus, or leave it out")
    checkpoint = open_checkpoint(args.model)
    check_no_remote_code(checkpoint.path)
    if not checkpoint.family.causal:
        raise PruneKitError(f"{args.model}: an encoder, which ms-swift doesn't train: choose a causal model")
    if args.stage == "gkd" and not swift.teacher_model_server:
        if not swift.teacher_model:
            raise PruneKitError("--stage gkd: give the --teacher_model, or a cache as --teacher_model_server")
        open_checkpoint(swift.teacher_model)
    report(args, swift, checkpoint)


def report(args: argparse.Namespace, swift: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Print one line for a launcher, else what each setting would save, too."""
    from prunekit.training.memory import Training, alternatives, estimate  # torch: seconds

    card = int(args.gpu_memory * 1e9)

    def training(values: argparse.Namespace) -> Training:
        return Training.of(values, checkpoint, args.gpus, card, args.tokens, args.image_tokens, args.answer_tokens)

    now = training(swift)
    found = estimate(now)
    sentence = one_line(found, now.step.rows.tokens, args.gpus, card)
    if args.line:
        print(sentence)
        return
    saved = {}
    for name, other in alternatives(swift, checkpoint.config, args.gpus).items():
        with contextlib.suppress(PruneKitError):  # shorter rows may have no room for --image-tokens
            saved[name] = estimate(training(argparse.Namespace(**vars(swift) | other)))
    if args.json:
        totals = {name: each.total for name, each in saved.items()}
        rows = dataclasses.asdict(now.step.rows)
        print(json.dumps({**dataclasses.asdict(found), "total": found.total, "rows": rows, "with": totals}))
        return
    print(sentence)
    for part, size in found.parts.items():
        print(f"  {part:32}{gigabytes(size):>10} GB")
    print(f"  {found.when:32}{gigabytes(found.total):>10} GB")
    for name, each in saved.items():
        change = (each.total - found.total) / 1e9
        print(f"  with {name:27}{gigabytes(each.total):>10} GB  {change:+.3f}")


def one_line(found: "Estimate", tokens: int, gpus: int, card: int) -> str:
    parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in found.parts.items())
    where = " a GPU" if gpus else ""
    text = f"memory: about {gigabytes(found.total)} GB{where} {found.when} ({parts}), rows of {tokens} tokens"
    if card and found.total > card:
        text += f": more than its {gigabytes(card)} GB; python -m prunekit.memory says what saves how much"
    return text


if __name__ == "__main__":
    run_script(main)
