"""The distillation loss: what it is, what it sees of the tail, and that its gradient is that of the loss."""

import math

import pytest
import torch
from helpers.distillation import ROWS, bucketed, pair, reference

from prunekit.training import distillation_loss as module
from prunekit.training.distillation_loss import TopK, distillation_loss, top_k

BETAS = (0.0, 0.3, 0.5, 1.0)


def renormalised(student: torch.Tensor, teacher: torch.Tensor, k: int, beta: float) -> torch.Tensor:
    """ms-swift 4.6's loss with --gkd_logits_topk."""
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    known = TeacherOutput(full_logits=teacher[None]).to_topk(k)
    return gkd_loss(student[None], known, torch.zeros(1, len(student), dtype=torch.long), beta, 1.0)[0]


@pytest.mark.parametrize("beta", BETAS)
def test_full_vocabulary_is_ms_swifts_loss(beta):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    student, teacher = pair()
    labels = torch.zeros(1, len(student), dtype=torch.long)
    theirs, _ = gkd_loss(student[None], TeacherOutput(full_logits=teacher[None]), labels, beta, 0.9)
    assert distillation_loss(student, ROWS, teacher, beta=beta, temperature=0.9).item() == pytest.approx(
        theirs.item(), rel=1e-5
    )


@pytest.mark.parametrize("beta", BETAS)
def test_k_of_the_vocabulary_is_the_full_loss(beta):
    student, teacher = pair()
    full = distillation_loss(student, ROWS, teacher, beta=beta, temperature=1.3)
    known = top_k(teacher, ROWS, teacher.shape[-1], temperature=1.3)
    assert distillation_loss(student, ROWS, known, beta=beta, temperature=1.3).item() == pytest.approx(
        full.item(), rel=1e-5
    )


@pytest.mark.parametrize("beta", BETAS)
def test_k_of_the_vocabulary_has_the_full_gradient(beta):
    student, teacher = (logits.requires_grad_() for logits in pair())
    (full,) = torch.autograd.grad(distillation_loss(student, ROWS, teacher, beta=beta), student)
    (all_known,) = torch.autograd.grad(
        distillation_loss(student, ROWS, top_k(teacher, ROWS, 10**6), beta=beta), student
    )
    torch.testing.assert_close(all_known, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", (0.9, 2.0))
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_that_of_the_exact_bucketed_loss(beta, temperature):
    student, teacher = pair()
    known = top_k(teacher, ROWS, 8, temperature)
    exact, ours = student.double().requires_grad_(), student.requires_grad_()
    wanted = reference(
        bucketed(exact / temperature, known.indices), bucketed(teacher / temperature, known.indices), beta
    )
    loss = distillation_loss(ours, ROWS, known, beta=beta, temperature=temperature)
    wanted.backward()
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_the_full_loss_is_autograds(beta):
    student, teacher = pair()
    exact, ours = student.double().requires_grad_(), student.requires_grad_()
    reference(exact.log_softmax(-1), teacher.double().log_softmax(-1), beta).backward()
    distillation_loss(ours, ROWS, teacher, beta=beta).backward()
    torch.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_a_blind_student_gets_a_loss_and_a_gradient(beta):
    _, teacher = pair(vocabulary=1000)
    outside = teacher.argsort(-1)[:, :5]  # of the student's mass, 97% are on these; else it is the teacher
    high = (teacher.logsumexp(-1, keepdim=True) + math.log(0.97 / 0.03 / 5)).expand(-1, 5)
    student = teacher.scatter(-1, outside, high).requires_grad_()
    assert renormalised(student, teacher, 64, beta).item() / len(ROWS) == pytest.approx(0, abs=1e-5)
    loss = distillation_loss(student, ROWS, top_k(teacher, ROWS, 64), beta=beta)
    loss.backward()
    assert loss.item() / len(ROWS) > 0.15
    assert (student.grad.gather(-1, outside) > 0.001).all()


def test_tail_masses_near_0_and_1_give_finite_losses_and_gradients():
    sharp = torch.full((4, 300), -30.0)
    sharp[:, :3] = 30.0  # by 60 nats: a tail of e-26, which 1 - sum in fp32 calls 0
    flat = torch.zeros(4, 300)
    flat[:, :3] = -60.0
    rows = torch.arange(4)
    for teacher, student in ((sharp, flat), (sharp, sharp.clone()), (sharp, flat - sharp)):
        for beta in BETAS:
            student = student.detach().requires_grad_()
            loss = distillation_loss(student, rows, top_k(teacher, rows, 3), beta=beta)
            loss.backward()
            wanted = reference(
                bucketed(student, teacher.topk(3).indices), bucketed(teacher, teacher.topk(3).indices), beta
            )
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
            assert student.grad.isfinite().all()


def test_16_bit_logits_are_worked_on_in_fp32():
    student, teacher = (logits.bfloat16() for logits in pair())
    exact = distillation_loss(student.float(), ROWS, top_k(teacher.float(), ROWS, 8), beta=1.0)
    assert distillation_loss(student, ROWS, top_k(teacher, ROWS, 8), beta=1.0).item() == pytest.approx(
        exact.item(), rel=1e-6
    )


def test_only_the_rows_asked_for_count():
    student, teacher = (logits.requires_grad_() for logits in pair())
    rows, teacher_rows = torch.tensor([3, 5, 11]), torch.tensor([4, 6, 12])
    loss = distillation_loss(student, rows, teacher, teacher_rows, beta=0.5)
    alone = distillation_loss(student[rows], torch.arange(3), teacher[teacher_rows], beta=0.5)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    loss.backward()
    assert student.grad.abs().sum(-1).nonzero()[:, 0].tolist() == rows.tolist()


def test_no_rows_give_0_that_is_still_connected():
    student, teacher = pair()
    student.requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    loss = distillation_loss(student, none, top_k(teacher, none, 8))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


@pytest.mark.parametrize("k", (None, 8))
def test_working_in_pieces_changes_nothing(monkeypatch, k):
    def gradient() -> tuple[torch.Tensor, float]:
        student, teacher = pair()
        student.requires_grad_()
        known = top_k(teacher, ROWS, k) if k else teacher
        loss = distillation_loss(student, ROWS, known, beta=0.5)
        loss.backward()
        return student.grad, loss.item()

    whole, loss = gradient()
    monkeypatch.setattr(module, "ELEMENTS", 5 * 400)
    pieces, sum_of_pieces = gradient()
    torch.testing.assert_close(pieces, whole)
    assert sum_of_pieces == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("k", (None, 8))
def test_autograd_keeps_no_more_than_the_gradient_in_the_students_dtype(k):
    student, teacher = (logits.bfloat16() for logits in pair())
    student.requires_grad_()
    known, kept = top_k(teacher, ROWS, k) if k else teacher, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distillation_loss(student, ROWS, known)
    assert sum(tensor.nbytes for tensor in kept) <= student.nbytes


def test_entries_that_are_no_token_belong_to_the_tail():
    student, teacher = (logits.requires_grad_() for logits in pair())
    known = top_k(teacher, ROWS, 8)
    tail = torch.logaddexp(known.log_tail, known.log_probs[:, 6:].logsumexp(-1))
    empty = torch.full((len(ROWS), 2), -torch.inf)
    padded = TopK(
        torch.cat([known.indices[:, :6], known.indices[:, :1].expand(-1, 2)], -1),  # ids of others, as 0 would be
        torch.cat([known.log_probs[:, :6], empty], -1),
        tail,
    )
    six = TopK(known.indices[:, :6], known.log_probs[:, :6], tail)
    for beta in BETAS:
        (ours,) = torch.autograd.grad(distillation_loss(student, ROWS, padded, beta=beta), student)
        (wanted,) = torch.autograd.grad(distillation_loss(student, ROWS, six, beta=beta), student)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_a_student_puts_on_ids_that_the_teacher_has_not_is_unlearned(beta, k):
    student, teacher = pair()
    longer = torch.cat([student, student.logsumexp(-1, keepdim=True).expand(-1, 2)], -1)  # two thirds of its mass
    gone = torch.cat([student, torch.full((len(ROWS), 2), -1e4)], -1)
    known = top_k(teacher, ROWS, k) if k else teacher
    losses = [distillation_loss(each, ROWS, known, beta=beta).item() for each in (longer, student, gone)]
    assert losses[0] > losses[1] + 0.05 * len(ROWS) and losses[2] == pytest.approx(losses[1], rel=1e-4)
    longer.requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(longer, ROWS, known, beta=beta), longer)
    assert (gradient[:, -2:] > 0.01).all() and gradient.sum(-1).abs().max() < 1e-5
    if beta == 0 and k is None:  # the divergence over all ids, of which the teacher says the last with probability 0
        wanted = (teacher.softmax(-1) * (teacher.log_softmax(-1) - longer.log_softmax(-1)[:, :-2])).sum()
        assert losses[0] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_nan_is_not_hidden():
    student, teacher = pair()
    student[3, 7] = math.nan
    for known in (teacher, top_k(teacher, ROWS, 8)):
        for beta in BETAS:
            assert distillation_loss(student, ROWS, known, beta=beta).isnan()


def test_the_tail_of_k_log_probabilities_alone_is_what_they_leave():
    _, teacher = pair()
    known = top_k(teacher, ROWS, 8)
    found = TopK.without_tail(known.indices, known.log_probs)
    torch.testing.assert_close(found.log_tail, known.log_tail, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", (0.0, 1.0))
def test_gradient_of_the_head_is_nearer_the_full_one_than_a_renormalised_losss(beta):
    # As layers removed from a language model leave it: outside the teacher's first 16 it has twice the teacher's mass.
    student, teacher = pair(vocabulary=2000, sure=0.8)
    hidden = torch.randn(len(ROWS), 32, generator=torch.Generator().manual_seed(1))

    def of_head(loss) -> torch.Tensor:
        logits = student.clone().requires_grad_()
        loss(logits).backward()
        return (logits.grad.T @ hidden).flatten()  # the gradient of W in logits = hidden @ W.T

    full = of_head(lambda logits: distillation_loss(logits, ROWS, teacher, beta=beta))
    ours = of_head(lambda logits: distillation_loss(logits, ROWS, top_k(teacher, ROWS, 16), beta=beta))
    theirs = of_head(lambda logits: renormalised(logits, teacher, 16, beta))
    near, far = (torch.cosine_similarity(full, each, 0) for each in (ours, theirs))
    assert near > 0.95 and near > far + 0.1
