"""Made-up logits, and the distillation loss the plain way."""

import torch

ROWS = torch.arange(24)


def pair(vocabulary: int = 400, sure: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher) logits of 24 positions: a Zipf-like teacher, and a student off by noise, and less `sure`."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in ROWS])
    teacher = 6 - 1.3 * (ranks + 1.0).log()
    return sure * teacher + 0.7 * torch.randn(teacher.shape, generator=generator), teacher


def reference(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum of the divergences of log-probabilities, as they are written in the GKD paper."""

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one.exp() * (one - other)).sum()

    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixed = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def bucketed(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens at `indices` and of all others together, in fp64, the plain way."""
    probabilities = logits.double().softmax(-1)
    top = probabilities.gather(-1, indices)
    inside = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, indices, True)
    return torch.cat([top, (probabilities * ~inside).sum(-1, keepdim=True)], -1).log()
