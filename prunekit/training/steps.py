"""One training step of each kind, as ms-swift 4.6 takes it, gone through on fake tensors: what it needs at its peak."""

import contextlib
import functools
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunekit.errors import PruneKitError

from .distillation_loss import distillation_loss, top_k
from .ledger import Ledger


@dataclass(frozen=True)
class Rows:
    """What is on a GPU at once: `batch` rows of `tokens`, of which `image` are of an image and `answer` are learnt."""

    batch: int
    tokens: int
    image: int = 0
    answer: int = 0


@dataclass(frozen=True)
class Step:
    """What decides how much memory a step takes, beside the model.

    `weights` and `compute` are torch's names of types: where they differ, and with a LoRA, ms-swift trains under
    autocast. `gradients`: kept (they are there when the step begins: accumulation), made, or sent (to their owner, as
    ZeRO 2 and 3 do, as soon as they are there).
    """

    kind: str  # sft, gkd, grpo
    rows: Rows
    weights: str
    compute: str
    autocast: bool
    gradients: str = "made"
    checkpointing: bool = True
    reentrant: bool = True
    frozen: tuple[str, ...] = ()  # regexes of parameters' names
    lora: tuple[tuple[str, Any], ...] | None = None  # peft's settings
    attention: str = "sdpa"
    fused_loss: bool = False  # Liger's
    top_k: int | None = None
    teacher: Path | None = None  # None in a distillation: a cache on the disk
    teacher_visits: bool = False  # it is on the GPU while it answers, and else on the host


@dataclass(frozen=True)
class Account:
    """Bytes: of the weights as they are held, their numbers, and what a step needs beside them at its peak."""

    weights: int
    parameters: int
    trained: int
    trained_bytes: int
    teacher: int
    peak: Counter[str]


def _model(config: Any, dtype: str, attention: str) -> nn.Module:
    """The class that a config names, on the meta device: peft changes it there, which it can't do to fake tensors."""
    cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    make = getattr(cls, "_from_config", None) or cls.from_config
    with torch.device("meta"):
        return make(config, dtype=getattr(torch, dtype), attn_implementation=attention)


def _student(config: Any, step: Step) -> nn.Module:
    """The model that is trained, with its adapter if it has one, and what isn't trained frozen."""
    model = _model(config, step.weights, step.attention).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(step.lora is None and not any(re.search(each, name) for each in step.frozen))
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": step.reentrant})
        # As ms-swift does, so that both learn
        for part in (model, getattr(getattr(model, "model", None), "visual", None)):
            if part is not None:
                part.enable_input_require_grads()
    if step.lora is None:
        return model
    import peft

    lora = dict(step.lora)
    if lora["target_modules"] == "all-linear":  # as ms-swift reads it: peft takes the experts of a mixture, too
        head = model.get_output_embeddings()
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
        lora["target_modules"] = linear
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(**lora)).train()
    except ValueError as error:
        raise PruneKitError(f"peft refuses this LoRA of a {config.model_type}: {error}") from None
    # DeepSpeed turns all of it into the type to compute in; else adapters are float32
    return adapted if step.autocast else adapted.to(getattr(torch, step.weights))


def _materialise(model: nn.Module) -> nn.Module:
    """Put tensors of the mode that is entered, fake ones, in the place of those on the meta device."""
    made: dict[int, Tensor] = {}
    kept = []  # ids are another's when a tensor is gone
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
                    kept.append(tensor)
                tensors[name] = made[id(tensor)]
    return model


def size_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def inputs_for(config: Any, rows: Rows, fake: FakeTensorMode) -> dict[str, Tensor]:
    """A batch as a processor makes it, whose rows are all as long as the longest."""
    ids = torch.full((rows.batch, rows.tokens), 1)
    labels = torch.full_like(ids, -100)
    if rows.answer:
        labels[:, -rows.answer :] = 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    vision = getattr(config, "vision_config", None)
    if vision is None or not rows.image:
        return inputs
    merge = vision.spatial_merge_size
    ids[:, 0] = config.vision_start_token_id
    ids[:, 1 : 1 + rows.image] = config.image_token_id
    width = vision.temporal_patch_size * getattr(vision, "in_channels", 3) * vision.patch_size**2
    with fake:
        pixels = torch.empty(rows.batch * rows.image * merge**2, width)
    return inputs | {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, merge, merge * rows.image]] * rows.batch),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


def _kept(inputs: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """As ms-swift's prepare_logits_to_keep: logits from the first token that is learnt on, of one row of those only."""
    labels = inputs["labels"]
    learnt = labels != -100
    if len(labels) == 1:
        kept = nn.functional.pad(learnt[0][1:], (0, 1), value=True)
        return inputs | {"labels": nn.functional.pad(labels[:, learnt[0]], (1, 0), value=-100), "logits_to_keep": kept}
    count = labels.shape[1] - int(learnt.int().argmax(-1).min()) + 1
    return inputs | {"labels": labels[:, -count:], "logits_to_keep": count}


class _FusedLoss(torch.autograd.Function):
    """What Liger's fused projection and loss holds: gradients of both, and a piece of logits at a time."""

    @staticmethod
    def forward(ctx, hidden, weight):
        slope = torch.zeros_like(hidden), torch.zeros_like(weight)
        pieces = -(-weight.shape[0] // weight.shape[1])  # so that a piece is as large as the hidden states
        piece = hidden[: -(-len(hidden) // pieces)]
        logits = piece @ weight.T
        slope[1].add_(logits.float().to(weight.dtype).T @ piece)
        ctx.save_for_backward(*slope)
        return logits.float().sum()

    @staticmethod
    def backward(ctx, scale):
        hidden, weight = ctx.saved_tensors
        return hidden * scale, weight * scale


def _sft_loss(model: nn.Module, step: Step, inputs: dict[str, Any], *_: Any) -> Tensor:
    if step.fused_loss:
        labels = inputs.pop("labels")
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = whole.model(**inputs, use_cache=False).last_hidden_state
        return _FusedLoss.apply(hidden[labels != -100], whole.get_output_embeddings().weight)
    outputs = _forward(model, step, _kept(inputs))
    outputs.logits.argmax(-1)  # for token_acc
    return outputs.loss


def _gkd_loss(model, step: Step, inputs: dict[str, Any], teacher: nn.Module | None, ledger: Ledger) -> Tensor:
    inputs = _kept(inputs)
    labels = inputs.pop("labels")
    rows = (labels.roll(-1, dims=1) != -100).flatten().nonzero()[:, 0]
    student = _forward(model, step, inputs).logits
    if teacher is None:  # a cache
        k = step.top_k or 8
        wanted = top_k(student.detach()[:1, :1].flatten(0, 1).expand(len(rows), -1), torch.arange(len(rows)), k)
    else:
        visit = size_of(teacher) if step.teacher_visits else 0
        ledger.add("teacher", visit)
        with torch.no_grad():
            logits = _forward(teacher, step, inputs).logits.flatten(0, 1)
        ledger.add("teacher", -visit)
        logits = logits[:, : student.shape[-1]]
        wanted = logits if step.top_k is None else top_k(logits, rows, step.top_k)
    return distillation_loss(student.flatten(0, 1), rows, wanted, rows, 1.0, 0.9) / len(rows)


def _grpo_loss(model: nn.Module, step: Step, inputs: dict[str, Any], *_: Any) -> Tensor:
    inputs.pop("labels")
    logits = _forward(model, step, inputs | {"logits_to_keep": step.rows.answer + 1}).logits[:, :-1]
    logits.div_(1.0)  # the temperature
    wanted = inputs["input_ids"][:, -step.rows.answer :, None]
    if logits.dtype == torch.float32:  # as trl's selective_log_softmax
        each = torch.stack([row.logsumexp(-1) for row in logits])
        return (logits.gather(-1, wanted)[..., 0] - each).mean()
    return torch.stack([row.log_softmax(-1).gather(-1, one) for row, one in zip(logits, wanted)]).mean()


LOSSES = {"sft": _sft_loss, "gkd": _gkd_loss, "grpo": _grpo_loss}


def _forward(model: nn.Module, step: Step, inputs: dict[str, Any]) -> Any:
    with torch.autocast("cpu", getattr(torch, step.compute), enabled=step.autocast):
        outputs = model(**inputs, use_cache=False)
    if step.autocast:  # accelerate's convert_outputs_to_fp32
        outputs.logits = outputs.logits.float()
    return outputs


@functools.cache
def go_through(folder: Path, step: Step) -> Account:
    """Build the model of a checkpoint folder on fake tensors and take a step.

    The loss is ms-swift's, or ours in a distillation. The optimizer is left out: it makes nothing new in a step that
    isn't the first.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = inputs_for(config, step.rows, fake)
    model = _student(config, step)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of a vision tower that isn't trained, whose inputs need no gradient
        stack.enter_context(fake)
        _materialise(model)
        teacher = None
        if step.teacher:
            teacher_config = transformers.AutoConfig.from_pretrained(step.teacher)
            teacher = _materialise(_model(teacher_config, step.weights, step.attention)).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ledger = stack.enter_context(Ledger(fake, config.get_text_config().vocab_size))
        for part in filter(None, (model, teacher)):
            ledger.leave_out((*part.parameters(), *part.buffers()))

        def made(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None  # that is when torch calls this
            if step.gradients == "sent":
                parameter.grad = None
            else:
                ledger.move(parameter.grad, "gradients")

        for parameter in trained:
            if step.gradients == "kept":
                parameter.grad = torch.empty_like(parameter)
                ledger.move(parameter.grad, "gradients")
            parameter.register_post_accumulate_grad_hook(made)
        LOSSES[step.kind](model, step, inputs, teacher, ledger).backward()
    return Account(
        weights=size_of(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        teacher=size_of(teacher) if teacher else 0,
        peak=ledger.peak,
    )


def frozen_by(vision_prefix: str | None, llm: bool, vit: bool, aligner: bool) -> tuple[str, ...]:
    """Regexes of what ms-swift's three flags freeze: the text, the vision tower, and the mergers between."""
    if vision_prefix is None:
        return ()
    tower = rf"^{vision_prefix}"
    parts = {rf"^(?!{vision_prefix})": llm, rf"{tower}(?!.*merger)": vit, rf"{tower}.*merger": aligner}
    return tuple(pattern for pattern, frozen in parts.items() if frozen)
