"""How much memory of a GPU a training by ms-swift takes at its peak, part by part, before it is run.

The step itself is gone through on fake tensors (steps.py): activations, logits and gradients are counted. What stays
between steps is arithmetic. Without DeepSpeed: weights and both moments of AdamW in the weights' type, and with several
processes DDP's buckets, as large as the gradients. With DeepSpeed: 16-bit weights, float32 masters and two moments, of
which ZeRO 1 shares out masters and moments, ZeRO 2 gradients, too, and ZeRO 3 weights, too; its flat copies of a
process' share of the gradients at the optimizer's turn (16 and 32 bits), when activations are gone; buckets and
gathered weights as ms-swift configures them.
"""

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError
from prunekit.families import positions
from prunekit.msswift.settings import zero_optimization

from .lengths import PROMPT
from .steps import Account, Rows, Step, frozen_by, go_through

IMAGE_TOKENS = 16384  # of one image at most, where MAX_PIXELS and IMAGE_MAX_TOKEN_NUM are not set (qwen-vl-utils)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "reference", "rollout engine")


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says: the stage (0: none), what is on the host, buckets and gathered weights."""

    stage: int = 0
    host_optimizer: bool = False
    host_weights: bool = False
    bucket: int = 0  # elements
    gathered: int = 0  # elements at most

    @classmethod
    def of(cls, deepspeed: str | None, hidden: int) -> "Zero":
        """`hidden` (size) is what "auto" stands for, squared. Raises as `zero_optimization`."""
        if not deepspeed:
            return cls()
        zero = zero_optimization(deepspeed)

        def on_host(key: str) -> bool:
            return (zero.get(key) or {}).get("device", "none") not in ("none", "auto")  # accelerate: auto is none

        def number(key: str, default: float) -> int:
            value = zero.get(key, default)
            return hidden**2 if value == "auto" else int(value)

        return cls(
            zero["stage"],
            on_host("offload_optimizer"),
            on_host("offload_param"),
            number("reduce_bucket_size", 5e8),
            number("stage3_max_live_parameters", 1e9),
        )


@dataclass(frozen=True)
class Training:
    """A training by a line of ms-swift's: its step, on so many GPUs (0: the CPU), and what is there beside it."""

    folder: Path
    step: Step
    gpus: int
    zero: Zero
    moments: int  # numbers that the optimizer keeps of each parameter
    teacher_shared: bool = False  # out among the GPUs, by ZeRO-3
    reference: bool = False
    engine: int = 0  # bytes of a vLLM that shares the GPU
    engine_sleeps: bool = True  # while the model is trained

    @classmethod
    def of(
        cls,
        swift: argparse.Namespace,
        checkpoint: Checkpoint,
        gpus: int = 1,
        gpu_memory: int = 0,
        tokens: int | None = None,
        image: int | None = None,
        answer: int | None = None,
    ) -> "Training":
        """The training that ms-swift makes of a parsed line.

        `gpu_memory`: bytes, of which vLLM takes its share. `tokens`, `image`, `answer`: of the longest row, where they
        aren't what the line allows.
        """
        get = vars(swift).get
        kind = get("rlhf_type") or "sft"
        config = checkpoint.config
        text = config.get("text_config") or config
        zero = Zero.of(swift.deepspeed, text[checkpoint.family.hidden])
        compute = "bfloat16" if swift.bf16 else "float16" if swift.fp16 else "float32"
        weights = compute if zero.stage else swift.torch_dtype or compute
        teacher = None if get("teacher_model_server") else get("teacher_model")
        share_zero3 = Zero.of(get("teacher_deepspeed"), 0).stage == 3 or zero.stage == 3
        generates = kind == "grpo" or (kind == "gkd" and swift.lmbda > 0)
        colocated = generates and bool(get("use_vllm")) and get("vllm_mode") == "colocate"
        accumulated = (swift.gradient_accumulation_steps or 1) > 1
        step = Step(
            kind=kind,
            rows=rows_of(swift, config, generates, tokens, image, answer),
            weights=weights,
            compute=compute,
            autocast=not zero.stage and compute != "float32",
            gradients="sent" if zero.stage > 1 else "kept" if accumulated else "made",
            checkpointing=swift.gradient_checkpointing,
            reentrant=gpus < 2 or bool(zero.stage),
            frozen=frozen_by(checkpoint.family.vision_prefix, swift.freeze_llm, swift.freeze_vit, swift.freeze_aligner),
            lora=_lora(swift, checkpoint) if swift.tuner_type == "lora" else None,
            attention="eager" if swift.attn_impl == "eager" else "sdpa",
            fused_loss=bool(swift.use_liger_kernel) and kind == "sft",
            top_k=get("gkd_logits_topk"),
            teacher=Path(teacher) if teacher else None,
            teacher_visits=bool(get("offload_teacher_model")),
        )
        return cls(
            folder=checkpoint.path,
            step=step,
            gpus=gpus,
            zero=zero,
            moments=0 if swift.optim == "sgd" else 2,
            teacher_shared=share_zero3,
            reference=kind == "grpo" and get("beta") != 0 and step.lora is None,
            engine=int(gpu_memory * swift.vllm_gpu_memory_utilization) if colocated else 0,
            engine_sleeps=bool(get("sleep_level")),
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes a GPU, by part, at the moment that needs the most: `when` says which that is."""

    parts: dict[str, int]
    when: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def rows_of(
    swift: argparse.Namespace,
    config: dict[str, Any],
    generates: bool,
    tokens: int | None,
    image: int | None,
    answer: int | None,
) -> Rows:
    """The largest batch that a line allows: each row as long as may be, images half of a prompt, all else learnt."""
    prompt = longest_prompt(swift, config)
    completion = 0
    if generates:
        get = vars(swift).get
        completion = answer or get("response_length") or get("max_new_tokens") or get("max_completion_length") or 512
    tokens = tokens or prompt + completion
    vision = config.get("vision_config")
    if image is None:
        image = min(largest_image(vision), max(0, tokens - completion) // 2) if isinstance(vision, dict) else 0
    elif image and image + 2 > tokens:
        raise PruneKitError(f"--image-tokens {image}: no room for an answer in rows of {tokens} tokens")
    learnt = completion or answer or tokens - image - 1
    return Rows(swift.per_device_train_batch_size, tokens, image, min(learnt, tokens - image - 1))


def longest_prompt(swift: argparse.Namespace, config: dict[str, Any]) -> int:
    """Tokens that a line and the model's positions leave a prompt, or a row where nothing is generated."""
    return min(swift.max_length or PROMPT, positions(config, PROMPT))


def largest_image(vision: dict[str, Any]) -> int:
    """Tokens of the largest image that ms-swift's environment allows."""
    if count := os.environ.get("IMAGE_MAX_TOKEN_NUM"):
        return int(count)
    side = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    pixels = os.environ.get("MAX_PIXELS")
    return max(1, int(pixels) // side**2) if pixels else IMAGE_TOKENS


def _lora(swift: argparse.Namespace, checkpoint: Checkpoint) -> tuple[tuple[str, Any], ...]:
    """peft's settings of a line, in a form that can be a key."""
    targets = checkpoint.family.lora_targets if swift.target_modules == ["all-linear"] else swift.target_modules
    target = "all-linear" if targets == ["all-linear"] else tuple(targets)
    return ("r", swift.lora_rank), ("lora_dropout", swift.lora_dropout), ("target_modules", target)


def estimate(training: Training) -> Estimate:
    """Go through a step and add what stays between steps. Takes seconds."""
    return add_up(training, go_through(training.folder, training.step))


def add_up(training: Training, step: Account) -> Estimate:
    """The parts at the hungriest moment of a training: in a step, at the optimizer's turn, or while it generates."""
    zero, processes = training.zero, max(1, training.gpus)
    size = 4 if training.step.compute == "float32" else 2
    share = -(-step.trained // processes)
    held: Counter[str] = Counter(weights=step.weights)
    buffers: Counter[str] = Counter()
    moments = training.moments
    if zero.stage == 0:
        held["optimizer"] = moments * step.trained_bytes
        held["gradients"] = step.trained_bytes if processes > 1 else 0  # DDP's buckets
        turn = Counter(gradients=step.trained_bytes)
    else:
        held["optimizer"] = 0 if zero.host_optimizer else 4 * (1 + moments) * share
        if zero.stage == 3:
            held["weights"] = 0 if zero.host_weights else -(-step.weights // processes)
            buffers["weights"] = size * min(step.parameters, zero.gathered)
        kept = 0 if zero.host_optimizer else size * share
        buffers["gradients"] = (kept if zero.stage > 1 else 0) + size * zero.bucket
        at_once = min(share, zero.gathered) if zero.stage == 3 else share
        flat = 0 if zero.host_optimizer else (4 + size) * at_once
        turn = Counter(gradients=(size * step.trained if zero.stage == 1 else kept) + flat)
    if training.step.teacher and not training.step.teacher_visits:
        held["teacher"] = -(-step.teacher // (processes if training.teacher_shared else 1))
    if training.reference:
        held["reference"] = -(-step.weights // (processes if zero.stage == 3 else 1))
    if training.engine and not training.engine_sleeps:
        held["rollout engine"] = training.engine
    moments_of = {"in a step": held + buffers + step.peak, "at the optimizer's turn": held + turn}
    if training.engine and training.engine_sleeps:
        moments_of["while it generates"] = held + Counter({"rollout engine": training.engine})
    when = max(moments_of, key=lambda name: moments_of[name].total())
    return Estimate({part: moments_of[when][part] for part in PARTS if moments_of[when][part]}, when)


def alternatives(swift: argparse.Namespace, config: dict[str, Any], gpus: int) -> dict[str, dict[str, Any]]:
    """What could be lowered, in the order of docs/training.md: settings as one types them, and what they change."""
    get = vars(swift).get
    kind, zero = get("rlhf_type") or "sft", swift.deepspeed or ""
    found: dict[str, dict[str, Any]] = {}
    if not swift.gradient_checkpointing:
        found["--gradient_checkpointing true"] = {"gradient_checkpointing": True}
    if swift.per_device_train_batch_size > 1:
        found["--per_device_train_batch_size 1"] = {"per_device_train_batch_size": 1}
    if (length := longest_prompt(swift, config)) >= 256:
        found[f"--max_length {length // 2}"] = {"max_length": length // 2}
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        if gpus and name > zero and swift.torch_dtype != "float32":
            found[f"DEEPSPEED={name}"] = {"deepspeed": name}
    if kind == "gkd" and get("teacher_model"):
        found["CACHE=runs/cache"] = {"teacher_model_server": "cache", "gkd_logits_topk": 8, "lmbda": 0.0}
        if not get("gkd_logits_topk"):
            found["--gkd_logits_topk 32"] = {"gkd_logits_topk": 32}
        if not get("offload_teacher_model"):
            found["--offload_teacher_model true"] = {"offload_teacher_model": True}
    if get("use_vllm") and get("vllm_mode") == "colocate" and swift.vllm_gpu_memory_utilization > 0.2:
        found["--vllm_gpu_memory_utilization 0.2"] = {"vllm_gpu_memory_utilization": 0.2}
    if kind != "sft" and (answer := get("max_completion_length") or 0) >= 256:
        found[f"--max_completion_length {answer // 2}"] = {"max_completion_length": answer // 2}
    if swift.tuner_type == "full":
        if not swift.freeze_vit and isinstance(config.get("vision_config"), dict):
            found["--freeze_vit true"] = {"freeze_vit": True}
        found["a LoRA (lora.sh)"] = {"tuner_type": "lora", "target_modules": ["all-linear"], "lora_rank": 32}
    return found
