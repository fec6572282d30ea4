"""ibma.information: closed forms, scipy, and a loop."""
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ibma.information import entropy, kl_divergence, mutual_information

F64 = torch.float64


def distributions(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).mul(4).softmax(-1)


@pytest.mark.parametrize(("p", "value"), [([1, 0, 0], 0), ([0.5, 0.5, 0], math.log(2)), ([0.25] * 4, math.log(4)), ([1], 0)])
def test_entropy_closed_forms_in_nats(p, value):
    assert entropy(torch.tensor(p, dtype=F64)).item() == pytest.approx(value, abs=1e-15)


def test_entropy_and_divergence_are_those_of_scipy_along_any_axis():
    p, q = distributions(4, 6), distributions(4, 6, seed=1)
    assert entropy(p).numpy() == pytest.approx(stats.entropy(p, axis=-1), abs=1e-12)
    assert entropy(p.T, dim=0).numpy() == pytest.approx(stats.entropy(p, axis=-1), abs=1e-12)
    assert kl_divergence(p, q).numpy() == pytest.approx(stats.entropy(p, q, axis=-1), abs=1e-12)
    assert kl_divergence(p.T, q.T, dim=0).numpy() == pytest.approx(stats.entropy(p, q, axis=-1), abs=1e-12)
    assert kl_divergence(p, q[0]).numpy() == pytest.approx(stats.entropy(p, q[:1].expand(4, 6), axis=-1), abs=1e-12)


def test_divergence_at_the_border():
    half, certain = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    assert kl_divergence(certain, half).item() == pytest.approx(math.log(2))
    assert kl_divergence(half, certain) == math.inf
    assert kl_divergence(certain, certain) == 0


def test_mutual_information_of_known_tables():
    k = 5
    tables = torch.stack([torch.eye(k, dtype=F64) / k, torch.full((k, k), 1 / k**2, dtype=F64)])
    assert mutual_information(tables).tolist() == pytest.approx([math.log(k), 0], abs=1e-12)
    e = 0.1  # binary symmetric channel
    channel = torch.tensor([[1 - e, e], [e, 1 - e]], dtype=F64) / 2
    assert mutual_information(channel).item() == pytest.approx(math.log(2) + e * math.log(e) + (1 - e) * math.log(1 - e))


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_mutual_information_is_the_loop_symmetric_and_between_0_and_the_entropies(seed, a, b, sparse):
    g = torch.Generator().manual_seed(seed)
    joint = torch.rand(a, b, generator=g, dtype=F64)
    if sparse:
        joint = joint * (torch.rand(a, b, generator=g) < 0.5)
        joint[0, 0] += 0.1
    joint = joint / joint.sum()
    value = mutual_information(joint).item()
    assert value == pytest.approx(reference.mutual_information(joint.tolist()), abs=1e-12)
    assert value == pytest.approx(mutual_information(joint.T).item(), abs=1e-12)
    assert -1e-12 <= value <= min(entropy(joint.sum(0)), entropy(joint.sum(1))) + 1e-12


@pytest.mark.parametrize("joint", [torch.ones(3, 3), torch.full((2, 2), 0.2), torch.full((2, 2), torch.nan)])
def test_a_table_that_is_no_distribution_is_refused_with_the_remedy(joint):
    with pytest.raises(ValueError, match="joint must sum to 1.*divide counts by their total"):
        mutual_information(torch.stack([torch.full_like(joint, 1 / joint.numel()), joint]))
