"""How far a student's next-token distribution is from its teacher's, in fp32, with its gradient.

Over the whole vocabulary, or over the teacher's k likeliest tokens and a bucket for all the others: the tail. A loss
that renormalises both inside those k tokens, as is common, is blind to what a student puts elsewhere; one more number a
position mends that. The divergence is GKD's (arXiv:2306.13649, as ms-swift has it), with beta 0 KL(teacher || student),
with beta 1 KL(student || teacher), between them beta KL(teacher || m) + (1 - beta) KL(student || m), where
m = beta teacher + (1 - beta) student.

Positions are worked on some at a time, and the gradient is made beside the loss: what autograd keeps is that gradient,
in the dtype of the student's logits, and no softmax.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 2**22  # of each fp32 (positions, vocabulary) that is worked on at a time: 16 MB
SMALLEST_TAIL = 2.0**-20  # what k fp32 logarithms can tell of the mass beside them


class TopK(NamedTuple):
    """What a teacher finds likeliest at N positions: natural logarithms of probabilities over its whole vocabulary.

    At the temperature that the loss is to be taken at.
    """

    indices: Tensor  # (N, k), token ids, int64
    log_probs: Tensor  # (N, k), fp32; -inf: no token here
    log_tail: Tensor  # (N,), fp32: all other tokens together

    @classmethod
    def without_tail(cls, indices: Tensor, log_probs: Tensor) -> "TopK":
        """From k tokens alone, as a server sends them: the tail is what they leave of 1."""
        tail = -log_probs.float().logsumexp(-1).expm1()
        return cls(indices, log_probs.float(), tail.clamp(min=SMALLEST_TAIL).log())

    def within(self, vocabulary: int) -> "TopK":
        """As if there were no ids from `vocabulary` on, which a student with a shorter, less padded head hasn't."""
        known = self.indices < vocabulary
        both = torch.cat([self.log_probs.masked_fill(~known, -torch.inf), self.log_tail[:, None]], -1)
        both = both - both.logsumexp(-1, keepdim=True)
        return TopK(self.indices.where(known, 0), both[:, :-1], both[:, -1])


def _pieces(rows: Tensor, vocabulary: int) -> list[Tensor]:
    return list(rows.split(max(1, ELEMENTS // vocabulary))) if len(rows) else []


def _tempered(logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
    return logits[rows].float() / temperature


@torch.no_grad()
def top_k(logits: Tensor, rows: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens of some `rows` (N,) of a teacher's logits (positions, vocabulary); all, if k is larger."""
    vocabulary = logits.shape[-1]
    found = []
    for piece in _pieces(rows, vocabulary):
        values = _tempered(logits, piece, temperature)
        top, indices = values.topk(min(k, vocabulary))
        rest = values.scatter_(-1, indices, -torch.inf).logsumexp(-1)  # exact, where 1 - sum would be noise
        every = top.logsumexp(-1).logaddexp(rest)
        found.append(TopK(indices, top - every[:, None], rest - every))
    if not found:
        empty = logits.new_zeros((0, min(k, vocabulary)), dtype=torch.float32)
        return TopK(empty.long(), empty, empty.sum(-1))
    return TopK(*map(torch.cat, zip(*found)))


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, and 0 where nothing is weighed, even an infinity."""
    return torch.where(weight == 0, 0.0, weight * value)


def _widened(log_probs: Tensor, vocabulary: int, beta: float) -> Tensor:
    """A teacher's log-probabilities, with those of further ids, which only the student's head has: it says them never.

    Left out, they'd keep what the student puts on them, for no loss tells of it. Reverse KL, which would be infinite,
    gets SMALLEST_TAIL for all of them together.
    """
    more = vocabulary - log_probs.shape[-1]
    if more == 0:
        return log_probs
    never = math.log(SMALLEST_TAIL / more) if beta == 1 else -math.inf
    return torch.nn.functional.pad(log_probs, (0, more), value=never)


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(loss (N,), its slope by the student's logits (N, J)), of log-probabilities (N, J) that both sum to 1."""
    p, q = teacher.exp(), student.exp()
    if beta == 0:
        return _times(p, teacher - student).sum(-1), q - p
    if beta == 1:
        slope = _times(q, student - teacher)
        loss = slope.sum(-1)
    else:
        mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
        slope = (1 - beta) * _times(q, student - mixed)
        loss = beta * _times(p, teacher - mixed).sum(-1) + slope.sum(-1)
    return loss, slope - q * slope.sum(-1, keepdim=True)


def _over_buckets(logits: Tensor, teacher: TopK, beta: float) -> tuple[Tensor, Tensor]:
    """As `_divergence`, over the teacher's k tokens and the tail; the slope is (N, vocabulary)."""
    known = teacher.log_probs != -torch.inf
    top = logits.gather(-1, teacher.indices).masked_fill(~known, -torch.inf)
    # Ids that stand for no token may be those of others: the minimum keeps what is known.
    out = torch.where(known, -torch.inf, torch.inf)
    others = logits.scatter_reduce(-1, teacher.indices, out, "amin")
    rest = others.logsumexp(-1, keepdim=True)
    every = top.logsumexp(-1, keepdim=True).logaddexp(rest)
    student = torch.cat([top, rest], -1) - every
    loss, slope = _divergence(student, torch.cat([teacher.log_probs, teacher.log_tail[:, None]], -1), beta)
    # The tail's slope is shared out by what each token has of it.
    shares = (others - rest.clamp(min=torch.finfo(rest.dtype).min)).exp_()
    return loss, shares.mul_(slope[:, -1:]).scatter_add_(-1, teacher.indices, slope[:, :-1])


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, rows, teacher, teacher_rows, beta, temperature):
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student.device)
        done = 0
        for piece in _pieces(rows, student.shape[-1]):
            logits = _tempered(student, piece, temperature)
            here = slice(done, done + len(piece))
            if isinstance(teacher, TopK):
                loss, slope = _over_buckets(logits, TopK(*(part[here] for part in teacher)), beta)
            else:
                wanted = _tempered(teacher, teacher_rows[here], temperature).log_softmax(-1)
                loss, slope = _divergence(logits.log_softmax(-1), _widened(wanted, logits.shape[-1], beta), beta)
            total += loss.sum()
            if gradient is not None:
                gradient[piece] = slope.div_(temperature).to(gradient.dtype)
            done += len(piece)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None, None, None, None, None  # in place: it may be gigabytes


def distillation_loss(
    student: Tensor,
    rows: Tensor,
    teacher: Tensor | TopK,
    teacher_rows: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence in nats, summed over positions: fp32, a scalar. It can be differentiated once.

    `student`: logits (positions, vocabulary) in any floating dtype, of which the `rows` (N,) count. `teacher`: logits
    over the same vocabulary or the first of its ids, of which `teacher_rows` (N,) count (default: `rows`), or a TopK of
    N positions, for which ids that the teacher hasn't are in the tail.
    """
    teacher_rows = rows if teacher_rows is None else teacher_rows
    return _Loss.apply(student, rows, teacher, teacher_rows, beta, temperature)


def known_to(teacher, ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Token ids of any shape, with `padding` for those that a teacher's embedding has no row for.

    A student whose embedding is padded to more rows may answer with such a one.
    """
    return ids.where(ids < teacher.config.get_text_config().vocab_size, padding)
