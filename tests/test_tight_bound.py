"""The tighter bound: its closed form, its place between IB and IBB, the exact gap, and its live compression half."""
import math

import pytest
import reference
import torch
from cases import cases
from hypothesis import given
from test_ibb import SPREAD, TOLERANCE, Problem, close

from ibma.assignments import assignment_table, class_prior, log_floored, one_hot_targets
from ibma.ibb import compression, ib_loss, ib_loss_fused, ibb, ibb_fused, tight_ibb, tight_ibb_fused

F64 = torch.float64


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sharpness", SPREAD)
@pytest.mark.parametrize("k", [2, 7, 101])
def test_tight_bound_is_the_mean_of_divergences(k, sharpness, dtype):
    p, n = Problem(k, sharpness), 5 if k > 50 else 2 * k + 3
    (z, other, fused), _ = p.logs(dtype)
    close(tight_ibb(z, other, p.log_q(z))[:n], reference.tight_terms(p.phi[0][:n], p.phi[1][:n], p.q[0]), dtype)
    r = [sum(row[a] for row in p.phi[-1]) / len(p.labels) for a in range(k)]
    for m in (1, 2, 3, 4):
        slow = reference.tight_fused_terms(p.phi[-1][:n], p.labels[:n], p.q[-1], r, m)
        close(tight_ibb_fused(fused, p.targets, p.log_q(fused), fused.exp().mean(0).log(), m)[:n], slow, dtype)


@given(cases())
def test_it_lies_between_the_ib_loss_and_ibb_for_any_table(case):
    z, other, x = case.log_z, case.log_other, case.log_x[0]
    tight = tight_ibb(z, other, case.log_q)
    assert (tight >= -1e-12).all()
    assert ib_loss(z.exp(), x.exp(), other.exp()) <= tight.mean() + 1e-9
    gap = ibb(z, x, other, case.log_prior, case.log_q) - tight
    entropy = torch.special.entr(z.exp()).sum(-1)
    torch.testing.assert_close(gap, compression(x, case.log_prior) + entropy, atol=1e-9, rtol=0)
    assert (gap >= -1e-9).all()


@given(cases())
def test_the_fused_one_bounds_the_fused_loss_for_any_table_and_marginal(case):
    known, m = case.known, len(case.log_x)
    terms = tight_ibb_fused(case.log_fused, case.targets, case.log_q_fused, case.log_r, m)
    assert terms.isfinite().all() and not terms[~known].any() and (terms >= -1e-12).all()
    if known.any():
        fused, x = case.log_fused[known], [v[known] for v in case.log_x]
        assert ib_loss_fused(fused.exp(), [v.exp() for v in x], case.targets[known]) <= terms[known].mean() + 1e-9


@given(cases())
def test_the_fused_ones_differ_by_the_stated_amount_and_the_marginal_is_the_best_r(case):
    """With r = P_Z, tight minus Eq. (11) is (M-1) H(Z) - M mean H(φ) - Σ_j mean U_j: either may be the lower one."""
    known, m = case.known, len(case.log_x)
    if not known.any():
        return
    fused, x, targets = case.log_fused[known], [v[known] for v in case.log_x], case.targets[known]
    marginal = fused.exp().mean(0)
    # a class that nobody is assigned to has φ = r = 0; any positive stand-in for r there leaves 0 log 0
    log_r = marginal.log().clamp(min=-1e3)
    tight = tight_ibb_fused(fused, targets, case.log_q_fused, log_r, m).mean()
    paper = ibb_fused(fused, x, targets, case.log_prior, case.log_q_fused).mean()
    h_z, h_phi = torch.special.entr(marginal).sum(), torch.special.entr(fused.exp()).sum(-1).mean()
    u = sum(compression(v, case.log_prior).mean() for v in x)
    assert (tight - paper).item() == pytest.approx(((m - 1) * h_z - m * h_phi - u).item(), abs=1e-9)
    assert tight <= tight_ibb_fused(fused, targets, case.log_q_fused, case.log_r, m).mean() + 1e-9


def test_it_is_zero_at_agreement_and_at_collapse_and_the_paper_s_form_is_not():
    targets = torch.eye(4, dtype=F64).repeat(3, 1)
    agree, collapsed = targets.log(), torch.full((12, 4), 0.25, dtype=F64).log()
    identity, same = log_floored(torch.eye(4, dtype=F64), -2), torch.full((4, 4), 0.25, dtype=F64).log()
    log_prior = class_prior(targets).log()
    assert tight_ibb(agree, agree, identity).mean().item() == pytest.approx(0, abs=1e-5)
    assert tight_ibb(collapsed, collapsed, same).mean().item() == pytest.approx(0, abs=1e-12)
    assert ibb(collapsed, collapsed, collapsed, log_prior, same).mean().item() == pytest.approx(math.log(4))
    assert ibb(agree, agree, agree, log_prior, identity).mean().item() == pytest.approx(math.log(4), abs=1e-5)


def test_its_compression_half_has_a_gradient_that_softens():
    """With a uniform table the bound is log C - H(φ): descending it raises the entropy."""
    score = torch.randn(10, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uniform = torch.full((5, 5), 0.2, dtype=F64).log()
    log_phi = score.log_softmax(-1)
    value = tight_ibb(log_phi, log_phi.detach(), uniform)
    entropy = torch.special.entr(log_phi.exp()).sum(-1)
    torch.testing.assert_close(value, math.log(5) - entropy)
    gradient, = torch.autograd.grad(value.sum(), score, retain_graph=True)
    expected, = torch.autograd.grad(-entropy.sum(), score)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("seed", range(20))
def test_the_fused_plug_in_value_counts_the_labelled_samples_only(seed):
    g = torch.Generator().manual_seed(seed)
    targets = one_hot_targets(torch.where(torch.arange(20) < 3, 0, -1), 3).double()
    fused = (5 * torch.randn(20, 3, generator=g, dtype=torch.float64)).log_softmax(-1)
    log_q = log_floored(assignment_table(fused.exp(), targets), dim=-2)
    value = ib_loss_fused(fused.exp(), [fused.exp()], targets)
    torch.testing.assert_close(value, ib_loss_fused(fused[:3].exp(), [fused[:3].exp()], targets[:3]))
    assert value <= tight_ibb_fused(fused, targets, log_q, log_floored(fused.exp().mean(0)), 1)[:3].mean() + 1e-9
