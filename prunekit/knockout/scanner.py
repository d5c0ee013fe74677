"""Score removals in memory: what does the model lose without this layer? Nothing is trained, nothing is written.

Each batch is run once as it is, and the states between its layers are kept; a removal is then scored by running only
the layers behind it. Scanning all N layers of a stack costs about N/2 forward passes.
"""

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import Checkpoint, finite, layer_numbers, open_checkpoint
from prunekit.data.batches import draw_rows, into_batches, read_calibration
from prunekit.data.encode import Encoder, encoder_of
from prunekit.data.groups import FEW, group_of
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError
from prunekit.families import configs
from prunekit.model.load import check_causal, load_model
from prunekit.model.replay import Replay, find_stack, given
from prunekit.model.scores import counted_states, final_states, logits_in_parts
from prunekit.surgery.in_memory import removed, without_experts
from prunekit.surgery.layers import LayersPlan

from .removal import BASELINE, Candidate, FewerExperts, Removal, plan_without

LIKELIEST = 64  # tokens of the unpruned output whose probabilities the KL compares one by one
STATE_BYTES = 128 << 20  # for kept states, or a tenth of the weights if that is more
FAIR_BATCHES = 32
GROUP = "prunekit_group"  # of a row, beside what the model gets of it


@dataclass(frozen=True)
class Job:
    """What a scan runs on; plain data, so that any process anywhere can do a part of it."""

    model: str
    dataset: str  # JSONL of messages or {"text": ...}
    max_tokens: int | None = 65_536  # of the data set, drawn in a seeded random order; None: all
    max_length: int = 4096  # of a row
    batch_tokens: int = 4096
    fair_batches: bool = False  # many batches of rows of any length, so that the first few are a fair sample
    counts_suffix: bool = True  # what always ends an answer (<|im_end|>) counts in token_acc and loss
    device: str | None = None
    dtype: str | None = None
    model_type: str | None = None
    template: str | None = None
    by: str | None = None  # a column of the rows: scores by groups of them, too


@dataclass
class Trace:
    """One pass over one batch: what a removal's own pass can start from."""

    calls: dict[str, list[tuple[tuple, dict]]]  # by stack: how its owner was called
    states: dict[str, dict[int, torch.Tensor]]  # by stack: raw outputs of some of its layers
    influence: dict[str, tuple[float, int]]  # by layer: sum of 1 - cosine, tokens
    seconds: dict[str, float]  # by layer, and "all"
    walked: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)  # by stack: one more, the newest
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # what enters the output head


def rounded(value: float) -> float | None:
    """Six digits of a number; None for what JSON can't hold."""
    return finite(float(f"{value:.6g}"))


def _strip_suffix(labels: list[int], suffix: list[int]) -> list[int]:
    """Labels with -100 in place of the template's suffix wherever a run of labels ends in it."""
    labels, end = list(labels), len(labels)
    while end:
        if labels[end - 1] == -100:
            end -= 1
            continue
        start = end
        while start and labels[start - 1] != -100:
            start -= 1
        if suffix and labels[max(start, end - len(suffix)) : end] == suffix:
            labels[end - len(suffix) : end] = [-100] * len(suffix)
        end = start
    return labels


class Scanner:
    """A causal model and batches of its samples in memory, with labels (-100: not counted).

    `groups`: those of each batch's samples, by the job's column.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        batches: list[dict[str, Any]],
        groups: Sequence[list[str]] = (),
    ):
        self.checkpoint, self.model, self.batches, self.groups = checkpoint, model, batches, groups
        self.references: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.state_bytes = max(STATE_BYTES, weights // 10) // len(checkpoint.family.stacks)

    def plan(self, gone: Sequence[Removal]) -> LayersPlan:
        return plan_without(self.checkpoint, gone)

    def without(self, gone: Sequence[Removal]) -> contextlib.AbstractContextManager[None]:
        """Within the block the model lacks these layers."""
        return removed(self.model, self.plan(gone)) if gone else contextlib.nullcontext()

    def kept(self, stack: str, gone: Sequence[Removal]) -> list[int]:
        """Numbers of the layers that are left of a stack."""
        missing = {k.layer for k in gone if k.stack == stack}
        return [i for i in layer_numbers(self.checkpoint, stack) if i not in missing]

    @torch.inference_mode()
    def measure(
        self,
        gone: Sequence[Removal],
        candidates: Sequence[Candidate],
        index: int,
        scored: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Score the model without `gone`, and without each candidate too, on one batch.

        Returns `scores`: for "baseline" and each candidate's name, by sample: `right` and `tokens` (counts), `loss`
        and `kl` (sums, nats); `influence` (sum of 1 - cosine of a layer's input and output, and tokens) and `seconds`
        by layer. KL is that of the unpruned output to this one, over its likeliest tokens and one bucket of the rest:
        a lower bound. `scored` is called after each candidate. Fewer experts are those of the whole model: `gone` is
        empty then.
        """
        batch = self.batches[index]
        if gone:
            self.refer(index)
        with self.without(gone):
            trace = self.trace(batch, gone)
        if index not in self.references:
            self.references[index] = self._likeliest(trace.final, batch)
        scores = {BASELINE: self.score(trace.final, index)}
        trace.final = torch.empty(0)
        # Layer by layer, so that a state which isn't kept is computed from the one before
        layers = sorted(candidate for candidate in candidates if isinstance(candidate, Removal))
        for candidate in layers:
            final = self.final_without(candidate, gone, trace, batch)
            scores[str(candidate)] = scores[BASELINE] if final is None else self.score(final, index)
            scored()
        for fewer in (candidate for candidate in candidates if isinstance(candidate, FewerExperts)):
            scores[str(fewer)] = self.score(self.final_with(fewer, trace, batch), index)
            scored()
        return {"scores": scores, "influence": trace.influence, "seconds": trace.seconds}

    def refer(self, index: int) -> None:
        """Have the output that the KL on a batch compares with: the model's as it is now, unless there is one."""
        if index not in self.references:
            with torch.inference_mode():
                batch = self.batches[index]
                self.references[index] = self._likeliest(final_states(self.model, batch), batch)

    def trace(self, batch: dict[str, Any], gone: Sequence[Removal]) -> Trace:
        trace = Trace({}, {}, {}, {})
        family = self.checkpoint.family
        with contextlib.ExitStack() as hooks:
            for stack, row in family.stacks.items():
                owner, attribute = find_stack(self.model, row)
                layers = getattr(owner, attribute)
                calls = trace.calls[stack] = []
                states = trace.states[stack] = {}
                count = len(layers)

                def called(_, args, kwargs, calls=calls):
                    calls.append((args, kwargs))

                hooks.enter_context(owner.register_forward_pre_hook(called, with_kwargs=True))
                for position, (number, layer) in enumerate(zip(self.kept(stack, gone), layers)):
                    name = str(Removal(stack, number))

                    def enter(*_, name=name):
                        trace.seconds[name] = trace.seconds.get(name, 0.0) - self._now()

                    def leave(_, inputs, output, name=name, position=position, states=states, count=count):
                        trace.seconds[name] += self._now()
                        # All states while they fit, else every so many-th: from there it isn't far
                        if position % math.ceil(count * output.nbytes / self.state_bytes) == 0:
                            states[position] = output
                        total, tokens = trace.influence.get(name, (0.0, 0))
                        lost = 1 - nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
                        mask = batch.get("attention_mask")
                        if mask is not None and mask.shape == lost.shape:
                            lost = lost[mask.to(lost.device).bool()]
                        lost = lost[lost.isfinite()]
                        trace.influence[name] = (total + float(lost.sum()), tokens + lost.numel())

                    hooks.enter_context(layer.register_forward_pre_hook(enter))
                    hooks.enter_context(layer.register_forward_hook(leave))
            begun = self._now()
            trace.final = final_states(self.model, batch)
            trace.seconds["all"] = self._now() - begun
        return trace

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def final_without(
        self,
        candidate: Removal,
        gone: Sequence[Removal],
        trace: Trace,
        batch: dict[str, Any],
        start: int | None = None,
    ) -> torch.Tensor | None:
        """What enters the output head without a candidate; None where its stack isn't used (no image in the batch).

        `start`: the first position that isn't as it was in the trace (default: the candidate's own).
        """
        stack = candidate.stack
        calls = trace.calls[stack]
        if not calls:
            return None
        plan = self.plan([*gone, candidate])
        if start is None:
            start = self.kept(stack, gone).index(candidate.layer)
        if len(calls) > 1:
            start = 0
        states = self._states_before(start, stack, gone, trace)
        with removed(self.model, plan):
            if any(position < start and position not in states for position in self._tapped(plan, stack)):
                start = 0
            owner, attribute = find_stack(self.model, self.checkpoint.family.stacks[stack])
            with given(owner, attribute, states, start):
                if stack == "text" and len(calls) == 1:
                    args, kwargs = calls[0]
                    return owner(*args, **kwargs)[0]
                return final_states(self.model, batch)

    def final_with(self, fewer: FewerExperts, trace: Trace, batch: dict[str, Any]) -> torch.Tensor:
        """What enters the output head of the whole model with fewer experts."""
        row, calls = self.checkpoint.family.text, trace.calls["text"]
        owner, _ = find_stack(self.model, row)
        with without_experts(self.model, row, dict(fewer.gone)):
            if len(calls) > 1:
                return final_states(self.model, batch)
            args, kwargs = calls[0]
            return owner(*args, **kwargs)[0]

    def _states_before(self, start: int, stack: str, gone: Sequence[Removal], trace: Trace) -> dict[int, torch.Tensor]:
        """Raw outputs of layers by position, that of the one right before `start` among them."""
        states = trace.states[stack] | trace.walked.get(stack, {})
        if start and start - 1 not in states:
            with self.without(gone):
                replay = Replay(self.model, self.checkpoint.family.stacks[stack], trace.calls[stack])
                if known := [position for position in states if position < start - 1]:
                    replay.states, replay.done = [states[max(known)]], max(known) + 1
                replay.step(start)
            trace.walked[stack] = {start - 1: replay.states[0]}
            states |= trace.walked[stack]
        return states

    def _tapped(self, plan: LayersPlan, stack: str) -> list[int]:
        """Positions of layers whose output is read by more than the next layer (DeepStack's taps)."""
        family = self.checkpoint.family
        if stack != "vision" or not family.taps or not family.vision:
            return []
        return configs(plan.result.config, family.vision)[0].get(family.taps.key, list(family.taps.default))

    def _likeliest(self, final: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens at each counted position (n, LIKELIEST), and the log probabilities of these."""
        states, _, _ = counted_states(final, batch["labels"])
        tokens, values = [], []
        for _, logits in logits_in_parts(self.model, states):
            top = logits.topk(min(LIKELIEST, logits.shape[-1]))
            tokens.append(top.indices.int())
            values.append(top.values - logits.logsumexp(-1, keepdim=True))
        return torch.cat(tokens), torch.cat(values)

    def score(self, final: torch.Tensor, index: int) -> dict[str, list]:
        batch, (likeliest, reference) = self.batches[index], self.references[index]
        states, labels, samples = counted_states(final, batch["labels"])
        values = torch.empty(3, len(labels), device=states.device)  # right, loss, KL
        for part, logits in logits_in_parts(self.model, states):
            total = logits.logsumexp(-1)
            values[0, part] = (logits.argmax(-1) == labels[part]).float()
            values[1, part] = total - logits.gather(1, labels[part, None])[:, 0]
            there, here = reference[part], logits.gather(1, likeliest[part].long()) - total[:, None]
            rest = [(1 - x.exp().sum(-1)).clamp_min(1e-6) for x in (there, here)]
            values[2, part] = (there.exp() * (there - here)).sum(-1) + rest[0] * (rest[0] / rest[1]).log()
        sums = torch.zeros(3, len(batch["labels"]), device=states.device).index_add_(1, samples, values)
        tokens = torch.bincount(samples, minlength=len(batch["labels"]))
        right, loss, kl = sums.tolist()
        return {
            "right": [int(value) for value in right],
            "loss": [rounded(value) for value in loss],
            "kl": [rounded(value) for value in kl],
            "tokens": tokens.tolist(),
        }


@functools.lru_cache(maxsize=1)
def rows_of(job: Job) -> Rows:
    """A job's rows, read once."""
    return read_calibration(job.dataset)


@functools.lru_cache(maxsize=1)
def encoder_for(job: Job) -> Encoder:
    """A job's encoder. PruneKitError for a model that predicts no next token, bad rows, or a missing tokenizer."""
    checkpoint = open_checkpoint(job.model)
    check_causal(checkpoint)
    return encoder_of(checkpoint, rows_of(job), job.max_length, job.model_type, job.template)


@functools.lru_cache(maxsize=1)
def load_scanner(job: Job) -> Scanner:
    """A job's scanner, kept for the next call. Raises as `encoder_for`, and for rows without an answer."""
    checkpoint, encoder = open_checkpoint(job.model), encoder_for(job)
    model = load_model(checkpoint, job.device, job.dtype)
    encoder.see(model)

    def encode(row: dict[str, Any]) -> dict[str, Any] | None:
        item = encoder.encode(row)
        return item | {GROUP: group_of(row, job.by)} if item and job.by else item

    items = draw_rows(rows_of(job), encode, job.max_tokens)
    if not job.counts_suffix and encoder.template:
        suffix = encoder.template._encode_context_list(encoder.template.template_meta.suffix)[0]
        items = [item | {"labels": _strip_suffix(item["labels"], suffix)} for item in items]
    items = [item for item in items if any(label != -100 for label in item["labels"][1:])]
    if not items:
        raise PruneKitError(f"dataset {job.dataset}: no row of at most {job.max_length} tokens has an answer to score")
    if job.by:
        counts = Counter(item[GROUP] for item in items)
        for name in sorted({group_of(row, job.by) for row in rows_of(job)}):
            if counts[name] < FEW:
                raise PruneKitError(
                    f"dataset {job.dataset}: {job.by} {name!r} has {counts[name]} of the {len(items)} rows within "
                    f"--tokens {job.max_tokens or 0} and --max-length {job.max_length}, too few to score: raise them"
                )
    if job.fair_batches:
        size = -(-len(items) // FAIR_BATCHES)
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
    else:
        chunks = [items]
    groups = [group for chunk in chunks for group in into_batches(chunk, job.batch_tokens)]
    names = [[item.pop(GROUP, "") for item in group] for group in groups]
    return Scanner(checkpoint, model, [dict(encoder.collate(group)) for group in groups], names)
