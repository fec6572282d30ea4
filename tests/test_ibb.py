"""The paper's bound against the literal Eqs. (3), (4), (5), (8), (10), (11), (12), and as a theorem on random cases."""
import math

import pytest
import reference
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from ibma.assignments import assignment_table, class_centroids, class_prior, log_assignments, log_floored, one_hot_targets
from ibma.ibb import (
    alignment,
    compression,
    ib_loss,
    ib_loss_fused,
    ibb,
    ibb_fused,
    label_alignment,
    log_joint_assignments,
    plug_in_information,
    tight_ibb,
    tight_ibb_fused,
)

F64 = torch.float64
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SPREAD = {"flat": 0.05, "soft": 0.4, "sharp": 3.0}  # distance between class means: assignments from uniform to one-hot


class Problem:
    "Features of M modalities and their inputs with skewed classes, and all statistics computed by loops."

    def __init__(self, num_classes, sharpness, num_modalities=2, dim=4):
        g = torch.Generator().manual_seed(num_classes)
        self.k, spread, n = num_classes, SPREAD[sharpness], 2 * num_classes + 3
        skew = torch.linspace(3, 0, num_classes).softmax(0)
        labels = torch.cat([torch.arange(num_classes), torch.multinomial(skew, num_classes + 3, replacement=True, generator=g)])
        labels = labels[torch.randperm(n, generator=g)]
        means = torch.randn(num_modalities + 1, 2, num_classes, dim, generator=g, dtype=F64)

        def draw(s, side):
            return spread * (means[s, side][labels] + 0.5 * torch.randn(n, dim, generator=g, dtype=F64))

        self.labels, self.targets = labels.tolist(), one_hot_targets(labels, num_classes)
        self.z = [draw(s, 0) for s in range(num_modalities + 1)]  # the fused one last
        self.x = [draw(s, 1) for s in range(num_modalities)]
        self.f, self.c = ([reference.class_means(v.tolist(), self.labels, num_classes) for v in part] for part in (self.z, self.x))
        self.prior = reference.class_frequencies(self.labels, num_classes)
        self.phi = [[[math.exp(v) for v in reference.log_phi(row, f)] for row in z.tolist()] for z, f in zip(self.z, self.f, strict=True)]
        self.q = [reference.floored_table(reference.algorithm_3(phi, self.labels, num_classes)) for phi in self.phi]

    def logs(self, dtype):
        "What the package makes of the same features, from the centroids on."
        def assign(v):
            v = v.to(dtype)
            return log_assignments(v, class_centroids(v, self.targets))
        return [assign(v) for v in self.z], [assign(v) for v in self.x]

    def log_q(self, phi):
        return log_floored(assignment_table(phi.exp(), self.targets), -2)


def close(got, expected, dtype):
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx(expected, abs=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sharpness", SPREAD)
@pytest.mark.parametrize("k", [2, 7, 101])
def test_ibb_of_a_modality_is_the_literal_formula(k, sharpness, dtype):
    p, n = Problem(k, sharpness), 3 if k > 50 else 2 * k + 3
    (z, other, _), (x, _) = p.logs(dtype)
    log_q, log_prior = p.log_q(z), class_prior(p.targets.to(dtype)).log()
    args = [v[:n].tolist() for v in (p.z[0], p.x[0], p.z[1])]
    u = [reference.u_term(args[0][i], p.f[0], args[1][i], p.c[0], p.prior) for i in range(n)]
    v = [reference.v_term(args[0][i], p.f[0], args[2][i], p.f[1], p.q[0]) for i in range(n)]
    close(compression(x, log_prior)[:n], u, dtype)
    close(alignment(z, other, log_q)[:n], v, dtype)
    close(ibb(z, x, other, log_prior, log_q)[:n], [a - b for a, b in zip(u, v, strict=True)], dtype)
    if k < 50:
        assert [a - b for a, b in zip(u, v, strict=True)] == reference.ibb_terms(args[0], p.f[0], args[1], p.c[0], args[2], p.f[1], p.prior, p.q[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "num_modalities"), [(2, 1), (2, 4), (7, 1), (7, 2), (7, 3), (7, 4), (101, 3)])
def test_fused_ibb_is_the_literal_formula_for_any_number_of_modalities(k, num_modalities, dtype):
    p, n = Problem(k, "soft", num_modalities), 2 if k > 50 else 8
    z, x = p.logs(dtype)
    got = ibb_fused(z[-1], x, p.targets, class_prior(p.targets.to(dtype)).log(), p.log_q(z[-1]))
    slow = reference.ibb_fused_terms(p.z[-1][:n].tolist(), p.f[-1], [v[:n].tolist() for v in p.x], p.c, p.labels[:n], p.prior, p.q[-1])
    close(got[:n], slow, dtype)


@pytest.mark.parametrize("sharpness", SPREAD)
def test_pairs_are_those_of_eq_3(sharpness):
    p = Problem(7, sharpness)
    (z, _, _), (x, _) = p.logs(F64)
    got = log_joint_assignments(z, x)
    for i in range(3):
        expected = reference.log_pair(p.z[0][i].tolist(), p.f[0], p.x[0][i].tolist(), p.c[0])
        assert got[i].tolist() == [pytest.approx(row, abs=1e-9) for row in expected]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sharpness", SPREAD)
def test_plug_in_values_are_the_sums_of_section_3_1(sharpness, dtype):
    p = Problem(5, sharpness)
    z, x = (([v.exp() for v in part]) for part in p.logs(dtype))
    inputs = [[[math.exp(v) for v in reference.log_phi(row, c)] for row in x.tolist()] for x, c in zip(p.x, p.c, strict=True)]
    labels = [[float(y == a) for a in range(5)] for y in p.labels]
    about_x, about_other = reference.information(p.phi[0], inputs[0]), reference.information(p.phi[0], p.phi[1])
    assert plug_in_information(z[0], x[0]).item() == pytest.approx(about_x, abs=TOLERANCE[dtype])
    assert ib_loss(z[0], x[0], z[1]).item() == pytest.approx(about_x - about_other, abs=TOLERANCE[dtype])
    fused = sum(reference.information(p.phi[-1], v) for v in inputs) - reference.information(p.phi[-1], labels)
    assert ib_loss_fused(z[-1], x, p.targets).item() == pytest.approx(fused, abs=TOLERANCE[dtype])


def test_plug_in_values_are_summed_in_double_precision():
    phi, other = (torch.randn(300, 7, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in (0, 1))
    value = plug_in_information(phi, other)
    assert value.dtype == ib_loss_fused(phi, [other], one_hot_targets(torch.arange(300) % 7, 7)).dtype == F64
    assert value.item() == pytest.approx(plug_in_information(phi.double(), other.double()).item(), abs=1e-15)


# --- the theorem


@given(cases())
def test_theorem_3_1_for_any_table_and_frequencies(case):
    value = ib_loss(case.log_z.exp(), case.log_x[0].exp(), case.log_other.exp())
    assert value <= ibb(case.log_z, case.log_x[0], case.log_other, case.log_prior, case.log_q).mean() + 1e-9
    assert plug_in_information(case.log_z.exp(), case.log_x[0].exp()) <= compression(case.log_x[0], case.log_prior).mean() + 1e-9  # Lemma A.1
    assert plug_in_information(case.log_z.exp(), case.log_other.exp()) >= alignment(case.log_z, case.log_other, case.log_q).mean() - 1e-9
    assert (alignment(case.log_z, case.log_other, case.log_q) <= 0).all()


@given(cases())
def test_eq_11_bounds_the_fused_loss_on_the_labelled_samples(case):
    known = case.known
    terms = ibb_fused(case.log_fused, case.log_x, case.targets, case.log_prior, case.log_q_fused)
    assert terms.isfinite().all() and not terms[~known].any()
    if known.any():
        value = ib_loss_fused(case.log_fused[known].exp(), [x[known].exp() for x in case.log_x], case.targets[known])
        assert value <= terms[known].mean() + 1e-9


def every_value(case):
    "All per-sample terms, and the plug-in values."
    z, x, other, fused, targets = case.log_z, case.log_x, case.log_other, case.log_fused, case.targets
    terms = [
        ibb(z, x[0], other, case.log_prior, case.log_q),
        ibb_fused(fused, x, targets, case.log_prior, case.log_q_fused),
        tight_ibb(z, other, case.log_q),
        tight_ibb_fused(fused, targets, case.log_q_fused, case.log_r, len(x)),
    ]
    values = ib_loss(z.exp(), x[0].exp(), other.exp()), ib_loss_fused(fused.exp(), [v.exp() for v in x], targets)
    return torch.stack(terms), torch.stack(values)


def rearranged(case, rows=slice(None), names=slice(None)):
    def table(q):
        return q[names][:, names]
    changed = {name: getattr(case, name)[rows][:, names] for name in ("targets", "log_z", "log_other", "log_fused")}
    changed |= {"log_x": [x[rows][:, names] for x in case.log_x], "log_prior": case.log_prior[names], "log_r": case.log_r[names]}
    return type(case)(**changed, log_q=table(case.log_q), log_q_fused=table(case.log_q_fused))


@settings(max_examples=60)
@given(cases(), st.integers(0, 1000))
def test_neither_the_order_of_samples_nor_the_names_of_classes_matter(case, seed):
    g = torch.Generator().manual_seed(seed)
    rows, names = torch.randperm(len(case.targets), generator=g), torch.randperm(case.targets.shape[1], generator=g)
    terms, values = every_value(case)
    other_terms, other_values = every_value(rearranged(case, rows))
    torch.testing.assert_close(other_terms, terms[:, rows], atol=1e-10, rtol=0)
    torch.testing.assert_close(other_values, values, atol=1e-10, rtol=0)
    other_terms, other_values = every_value(rearranged(case, names=names))
    torch.testing.assert_close(other_terms, terms, atol=1e-10, rtol=0)
    torch.testing.assert_close(other_values, values, atol=1e-10, rtol=0)


@settings(max_examples=60)
@given(cases(max_classes=2))
def test_one_label_is_the_task_of_two_classes(case):
    def grouped(v):
        return v.unsqueeze(-2)
    one = type(case)(**{name: [grouped(x) for x in value] if name == "log_x" else value[None] if name.startswith(("log_p", "log_q", "log_r")) else grouped(value)
                        for name, value in vars(case).items()})
    for got, expected in zip(every_value(one), every_value(case), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@settings(max_examples=60)
@given(st.lists(cases(max_classes=2), min_size=2, max_size=2))
def test_groups_are_averaged_over_the_known_ones(pair):
    n, m = min(len(c.targets) for c in pair), min(len(c.log_x) for c in pair)
    rows = {name: torch.stack([getattr(c, name)[:n] for c in pair], 1) for name in ("targets", "log_z", "log_other", "log_fused")}
    tables = {name: torch.stack([getattr(c, name) for c in pair]) for name in ("log_prior", "log_q", "log_q_fused", "log_r")}
    stacked = type(pair[0])(**rows, **tables, log_x=[torch.stack([c.log_x[j][:n] for c in pair], 1) for j in range(m)])
    for c in pair:
        c.log_x = c.log_x[:m]
    terms, alone = every_value(stacked)[0], [every_value(c)[0][:, :n] for c in pair]
    known = rows["targets"].sum(-1) > 0  # (n, 2)
    torch.testing.assert_close(terms[[0, 2]], (alone[0] + alone[1])[[0, 2]] / 2, atol=1e-10, rtol=0)
    expected = (alone[0] * known[:, 0] + alone[1] * known[:, 1]) / known.sum(1).clamp(min=1)
    torch.testing.assert_close(terms[[1, 3]], expected[[1, 3]], atol=1e-10, rtol=0)


def test_the_compression_term_does_not_depend_on_the_representation():
    p = Problem(7, "soft")
    z, x = p.logs(F64)
    z = z[0].clone().requires_grad_()
    value = ibb(z, x[0], x[1], class_prior(p.targets).double().log(), p.log_q(z.detach())).sum()
    whole, = torch.autograd.grad(value, z)
    half, = torch.autograd.grad(-alignment(z, x[1], p.log_q(z.detach())).sum(), z)
    torch.testing.assert_close(whole, half)


# --- numbers


@pytest.mark.parametrize("name", ["alignment", "ibb", "label_alignment", "ibb_fused", "tight_ibb", "tight_ibb_fused"])
def test_gradients_are_finite_and_autocast_changes_nothing_at_squared_distances_of_1e5(name):
    g = torch.Generator().manual_seed(0)
    features, targets = 14 * torch.randn(4, 24, 512, generator=g), one_hot_targets(torch.arange(24) % 6, 7)
    present = targets.any(0)
    with pytest.warns(UserWarning, match="class"):
        centroids = [class_centroids(v, targets) for v in features[:3]] + [torch.randn(7, 512, generator=g)]
    assert torch.cdist(features[0], centroids[0]).square().max() > 9e4
    log_prior = log_floored(class_prior(targets))

    def value():
        x = features.clone().requires_grad_()
        z, other, source, fused = (log_assignments(v, c, present=present) for v, c in zip(x, centroids, strict=True))
        log_q = log_floored(assignment_table(z.exp(), targets), -2)
        result = {
            "alignment": lambda: alignment(z, other, log_q), "ibb": lambda: ibb(z, source, other, log_prior, log_q),
            "label_alignment": lambda: label_alignment(fused, targets, log_q), "ibb_fused": lambda: ibb_fused(fused, [source, z], targets, log_prior, log_q),
            "tight_ibb": lambda: tight_ibb(z, other, log_q), "tight_ibb_fused": lambda: tight_ibb_fused(fused, targets, log_q, log_prior, 3),
        }[name]()
        return x, result

    x, result = value()
    gradient, = torch.autograd.grad(result.mean(), x)
    assert result.isfinite().all() and gradient.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, other_result = value()
    other_gradient, = torch.autograd.grad(other_result.mean(), x)
    assert other_result.dtype == other_gradient.dtype == torch.float32
    torch.testing.assert_close(other_result, result, atol=1e-6, rtol=0)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=0)


def test_plug_in_values_are_the_same_under_autocast():
    p = Problem(7, "soft")
    z, x = (([v.exp() for v in part]) for part in p.logs(torch.float32))

    def both():
        return torch.stack([ib_loss(z[0], x[0], z[1]), ib_loss_fused(z[-1], x, p.targets)])

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(both(), expected, atol=1e-12, rtol=0)


def test_an_unknown_label_of_every_sample_leaves_no_information_about_it():
    phi = torch.rand(5, 3, dtype=F64).softmax(-1)
    nobody = torch.zeros(5, 3)
    assert ib_loss_fused(phi, [phi], nobody) == 0
    assert not label_alignment(phi.log(), nobody, torch.zeros(3, 3, dtype=F64)).any()


def test_an_empty_class_with_its_zero_assignment_costs_nothing():
    certain = torch.tensor([[0.5, 0.5, 0.0]], dtype=F64).log()
    log_q = log_floored(torch.tensor([[0.5, 0.5, 1 / 3], [0.5, 0.5, 1 / 3], [0, 0, 1 / 3]], dtype=F64), -2)
    prior = torch.tensor([0.5, 0.5, 0.0], dtype=F64)
    assert compression(certain, log_floored(prior)).item() == pytest.approx(0, abs=1e-5)
    assert ibb(certain, certain, certain, log_floored(prior), log_q).item() == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("value", [
    lambda certain, p, q: compression(certain, p),
    lambda certain, p, q: tight_ibb_fused(certain, torch.tensor([[1.0, 0, 0]]), q, p, 2),
    lambda certain, p, q: alignment(certain, certain, torch.stack([p, p, p], 1)),
])
def test_an_empty_class_costs_nothing_without_a_floor_too(value):
    certain, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.full((3, 3), 1 / 3).log()
    assert value(certain, torch.tensor([0.5, 0.5, 0.0]).log(), q).isfinite().all()


@pytest.mark.parametrize("call", [
    lambda a, b, q: alignment(a, b, q),
    lambda a, b, q: ibb(a, b, a, q[0], q),
    lambda a, b, q: ibb(a, a, b, q[0], q),
    lambda a, b, q: label_alignment(a, b, q),
    lambda a, b, q: tight_ibb(a, b, q),
    lambda a, b, q: tight_ibb_fused(a, b, q, q[0], 2),
    lambda a, b, q: plug_in_information(a.exp(), b.exp()),
    lambda a, b, q: ib_loss(a.exp(), a.exp(), b.exp()),
    lambda a, b, q: ib_loss(a.exp(), b.exp(), a.exp()),
    lambda a, b, q: ib_loss_fused(a.exp(), [b.exp()], torch.eye(3)[[0, 1, 2, 0]]),
])
@pytest.mark.parametrize("other", [(5, 3), (4, 2)])
def test_unequal_shapes_are_refused_with_both_shapes(call, other):
    a, b, q = torch.zeros(4, 3).log_softmax(-1), torch.zeros(other).log_softmax(-1), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"same shape, got \(4, 3\) and \({other[0]}, {other[1]}\)"):
        call(a, b, q)


@pytest.mark.parametrize("call", [
    lambda a, b, q: ibb_fused(a, [a], b, q[0], q),
    lambda a, b, q: ibb_fused(a, [b], torch.eye(3)[[0, 1, 2, 0]], q[0], q),
    lambda a, b, q: ib_loss_fused(a.exp(), [a.exp()], b.exp()),
])
def test_unequal_numbers_of_samples_are_refused_by_the_fused_functions(call):
    a, b, q = torch.zeros(4, 3).log_softmax(-1), torch.zeros(5, 3).log_softmax(-1), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        call(a, b, q)


def test_a_batch_of_one():
    p = Problem(3, "soft")
    z, x = p.logs(F64)
    prior, log_q = class_prior(p.targets).double().log(), p.log_q(z[0])
    torch.testing.assert_close(ibb(z[0][4:5], x[0][4:5], z[1][4:5], prior, log_q), ibb(z[0], x[0], z[1], prior, log_q)[4:5])
    torch.testing.assert_close(ibb_fused(z[2][4:5], [x[0][4:5]], p.targets[4:5], prior, log_q), ibb_fused(z[2], x[:1], p.targets, prior, log_q)[4:5])
    assert ib_loss(z[0][:1].exp(), x[0][:1].exp(), z[1][:1].exp()).item() == pytest.approx(0, abs=1e-12)
