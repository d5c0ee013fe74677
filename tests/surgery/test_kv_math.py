"""The closed forms: keys and values that heads share, how far RoPE turns, groups."""

import pytest
import torch

from prunekit.surgery.kv_math import as_pairs, choose_groups, partitions, shared_basis, shared_keys, turned


def test_keys_that_are_one_but_for_complex_factors_are_shared_exactly():
    generator = torch.Generator().manual_seed(0)
    one = as_pairs(torch.randn(200, 1, 8, generator=generator).double())
    factors = as_pairs(torch.randn(3, 8, generator=generator).double())
    keys = one * factors
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 200
    a, b, lost = shared_keys(moments, torch.rand(3, 4, generator=generator).double() + 0.1)
    shared = (keys * a).sum(1, keepdim=True)
    torch.testing.assert_close(shared * b, keys)
    assert lost.abs().max() < 1e-12


def test_the_shared_key_is_as_large_as_the_heads_are():
    generator = torch.Generator().manual_seed(0)
    keys = as_pairs(torch.randn(500, 3, 8, generator=generator).double())
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 500
    a, _, _ = shared_keys(moments, torch.ones(3, 4).double())
    size = (keys * a).sum(1).abs().square().mean(0)
    torch.testing.assert_close(size, keys.abs().square().mean((0, 1)))


def test_what_is_lost_of_keys_is_the_energy_of_what_is_missing_and_the_least_there_can_be():
    generator = torch.Generator().manual_seed(0)
    keys = as_pairs(torch.randn(400, 3, 8, generator=generator).double())
    keys = keys + 1.5 * keys[:, :1]  # the heads have something in common
    energy = torch.rand(3, 4, generator=generator).double() + 0.1
    moments = torch.einsum("tnf,tmf->fnm", keys, keys.conj()) / 400

    def missing(a, b):
        shared = (keys * a).sum(1, keepdim=True)
        return ((keys - shared * b).abs().square().mean(0) * energy).sum(0)

    a, b, lost = shared_keys(moments, energy)
    torch.testing.assert_close(missing(a, b), lost)
    for _ in range(20):
        near = [z + 0.05 * torch.randn(3, 4, generator=generator, dtype=torch.cdouble) for z in (a, b)]
        assert (missing(*near) > lost).all()
    mean = b.sum(0)
    assert (mean.imag.abs() < 1e-9 * mean.abs()).all() and (mean.real > 0).all(), "the heads' mean phase"


def test_what_is_lost_of_values_is_what_readers_miss_and_the_shared_one_is_as_large_as_they_are():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 6, generator=generator).double() @ torch.randn(6, 12, generator=generator).double()
    roots = 3 * torch.randn(3, 5, 4, generator=generator).double()
    covariance = values.T @ values / 500
    p, r, lost = shared_basis(covariance, roots.mT @ roots)
    shared = values @ p.T
    missing = [(values[:, 4 * h : 4 * h + 4] - shared @ r[h].T) @ roots[h].T for h in range(3)]
    assert float(lost) == pytest.approx(sum(float(m.square().sum(1).mean()) for m in missing), rel=1e-3)
    assert float(shared.square().sum(1).mean()) == pytest.approx(float(covariance.diagonal().sum()) / 3)


def test_values_in_one_subspace_are_shared_exactly():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(100, 4, generator=generator).double()
    values = one @ torch.randn(4, 12, generator=generator).double()
    roots = torch.randn(3, 4, 4, generator=generator).double()
    p, r, lost = shared_basis(values.T @ values / 100, roots.mT @ roots)
    back = torch.cat([values @ p.T @ r[head].T for head in range(3)], 1)
    torch.testing.assert_close(back, values)
    assert abs(lost) < 1e-9


def test_values_that_nobody_reads_are_not_kept():
    covariance = torch.eye(4).double()
    readers = torch.stack([torch.zeros(2, 2), torch.eye(2)]).double()
    _, r, lost = shared_basis(covariance, readers)
    assert r[1].det().abs() > 0.1 and lost < 1e-5


@pytest.mark.parametrize("positions", [range(100), [0] * 20 + list(range(80)), [*range(30), *[30] * 9, *range(35, 96)]])
def test_how_far_rope_turns_is_read_from_what_attention_gets(positions):
    rates = 0.9 ** torch.arange(0, 80, 4).float()
    angles = torch.tensor(list(positions))[None, :, None] * rates.repeat(2)
    slow = rates * max(positions) < 3
    found = turned(angles.cos(), angles.sin())
    assert found[~slow].min() > 3
    torch.testing.assert_close(found[slow], (rates * max(positions))[slow].double(), rtol=1e-3, atol=1e-3)


def test_turns_beyond_half_a_circle_are_counted_in_full():
    rates = 0.8 ** torch.arange(12).double()
    for positions in ([*range(100)], [*range(70), *range(50, 60)], [5] * 4 + [*range(60)]):
        angles = torch.tensor(positions)[None, :, None] * rates.repeat(2)
        steps = torch.tensor(positions).diff().abs().max() * rates < 3  # of what turns more in a step nobody knows
        expected = (max(positions) - min(positions)) * rates
        torch.testing.assert_close(turned(angles.cos(), angles.sin())[steps], expected[steps], rtol=1e-6, atol=1e-6)
        assert steps.any()


def test_all_partitions_are_listed_once():
    found = [frozenset(p) for p in partitions(range(6), 2)]
    assert len(found) == len(set(found)) == 15


@pytest.mark.parametrize("count", [8, 32])
def test_the_best_groups_are_found(count):
    planted = torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(-1, 2).tolist()
    cost = torch.rand(count, count, generator=torch.Generator().manual_seed(1)) + 1
    cost = (cost + cost.T) / 2
    for i, j in planted:
        cost[i, j] = cost[j, i] = 0.1
    assert {frozenset(group) for group in choose_groups(cost, count // 2)} == {frozenset(p) for p in planted}
