"""ibma.assignments against loops of the paper's definitions: targets, centroids, assignments, tables."""
import math
import warnings

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibma.assignments import (
    assignment_table,
    class_centroids,
    class_prior,
    log_assignments,
    log_floored,
    one_hot_targets,
    warn_empty,
)

F64 = torch.float64


@pytest.fixture
def features():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=F64)


def classes(n, k, seed=1, skew=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial((skew * torch.arange(k).float()).neg().softmax(0), n, replacement=True, generator=g)


# --- targets


def test_class_indices_become_one_hot_rows_and_unlabelled_ones_zero_rows():
    weights = one_hot_targets(torch.tensor([2, -1, 0]), 4)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert one_hot_targets(torch.tensor([1], dtype=torch.int32), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_labels_become_groups_of_two_and_unknown_ones_zero_rows(dtype):
    targets = torch.tensor([[1, 0, math.nan], [math.nan, 1, 1]], dtype=dtype)
    expected = [[[0, 1], [1, 0], [0, 0]], [[0, 0], [0, 1], [0, 1]]]
    assert one_hot_targets(targets, 3, multi_label=True).tolist() == expected
    assert one_hot_targets(torch.tensor([[1, 0]]), 2, multi_label=True).tolist() == [[[0, 1], [1, 0]]]


@pytest.mark.parametrize(("targets", "multi_label", "error", "message"), [
    (torch.tensor([0, 3]), False, ValueError, r"row 1 is 3; allowed are 0\.\.2"),
    (torch.tensor([0, 1, -2]), False, ValueError, "row 2 is -2"),
    (torch.tensor([0.0, math.nan]), False, TypeError, "integers.*float32"),
    (torch.tensor([True, False]), False, TypeError, "integers.*bool"),
    (torch.tensor([[0, 1]]), False, ValueError, r"shape \(n,\), got \(1, 2\)"),
    (torch.tensor(1), False, ValueError, r"shape \(n,\), got \(\)"),
    (torch.tensor([0.0, 1.0]), True, ValueError, r"shape \(n, 3\), got \(2,\)"),
    (torch.zeros(2, 4), True, ValueError, r"shape \(n, 3\), got \(2, 4\)"),
    (torch.tensor([[0, 1, 0], [0, math.nan, 0.5]]), True, ValueError, "row 1 is.*0 or 1, or NaN"),
    (torch.tensor([[0, 1, 2]]), True, ValueError, "row 0"),
    (torch.tensor([[0, -1, 1.0]]), True, ValueError, "row 0"),
])
def test_bad_targets_are_refused_by_row_and_rule(targets, multi_label, error, message):
    with pytest.raises(error, match=message):
        one_hot_targets(targets, 3, multi_label)


def test_unsigned_class_indices_are_indices():
    assert one_hot_targets(torch.tensor([1, 0], dtype=torch.uint8), 2).tolist() == [[0, 1], [1, 0]]


def test_prior_is_the_share_among_the_known():
    targets = torch.tensor([0, 0, 2, -1, 0])
    assert class_prior(one_hot_targets(targets, 3)).tolist() == pytest.approx([0.75, 0, 0.25])
    labels = torch.tensor([[1, math.nan], [0, math.nan], [1, math.nan], [math.nan, math.nan]])
    assert class_prior(one_hot_targets(labels, 2, True)).tolist() == [pytest.approx([1 / 3, 2 / 3]), [0.5, 0.5]]


# --- centroids


def test_centroids_are_class_means(features):
    labels = classes(40, 5)
    expected = reference.class_means(features.tolist(), labels.tolist(), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no class is empty
        got = class_centroids(features, one_hot_targets(labels, 5))
    assert got.dtype == F64
    assert got.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


def test_unlabelled_samples_do_not_move_centroids(features):
    labels = torch.arange(40) % 3
    hidden = torch.where(torch.arange(40) < 20, labels, -1)
    torch.testing.assert_close(class_centroids(features, one_hot_targets(hidden, 3)), class_centroids(features[:20], one_hot_targets(labels[:20], 3)))


def test_soft_targets_give_weighted_means(features):
    weights = torch.rand(40, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    expected = [[sum(weights[i, a] * features[i, d] for i in range(40)) / sum(weights[:, a]) for d in range(6)] for a in range(3)]
    torch.testing.assert_close(class_centroids(features, weights), torch.tensor(expected))


def test_centroids_of_labels_are_those_of_each_label_alone(features):
    labels = (torch.rand(40, 3, generator=torch.Generator().manual_seed(3)) < 0.4).float()
    labels[:15, 1] = math.nan
    centroids = class_centroids(features, one_hot_targets(labels, 3, True))
    assert centroids.shape == (3, 2, 6)
    for g in range(3):
        for value in (0, 1):
            torch.testing.assert_close(centroids[g, value], features[labels[:, g] == value].mean(0))


def test_an_empty_class_has_zeros_and_one_warning_that_names_it(features):
    with pytest.warns(UserWarning, match=r"no sample of class \[1, 3\]") as caught:
        centroids = class_centroids(features, one_hot_targets(torch.arange(40) % 2 * 2, 4))
    assert len(caught) == 1
    assert not centroids[[1, 3]].any() and centroids[[0, 2]].all()
    with pytest.warns(UserWarning, match=r"class \[\[1, 0\]\]") as caught:
        warn_empty(torch.tensor([[3.0, 4.0], [0.0, 7.0]]))
    assert len(caught) == 1


def test_centroids_refuse_unequal_numbers_of_samples(features):
    with pytest.raises(ValueError, match="features have 40 rows and targets 39"):
        class_centroids(features, one_hot_targets(classes(39, 3), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_averaged_in_single(features, dtype):
    half, weights = features.to(dtype), one_hot_targets(classes(40, 3), 3)
    got = class_centroids(half, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, class_centroids(half.double(), weights).float(), atol=1e-6, rtol=0)


# --- assignments


def literal(z, centroids, temperature=1.0):
    "The definition, as printed, in double precision."
    weights = torch.exp(-(z.double()[:, None] - centroids.double()).square().sum(-1) / temperature)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_assignments_are_the_literal_softmax_of_distances(features, temperature):
    centroids = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
    got = log_assignments(features, centroids, temperature=temperature)
    assert got.dtype == F64
    torch.testing.assert_close(got.exp(), literal(features, centroids, temperature), atol=1e-12, rtol=0)
    for i in (0, 7):
        assert got[i].tolist() == pytest.approx(reference.log_phi(features[i].tolist(), centroids.tolist(), temperature), abs=1e-9)


def test_every_group_is_assigned_by_itself(features):
    centroids = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
    got = log_assignments(features, centroids)
    assert got.shape == (40, 3, 2)
    for g in range(3):
        torch.testing.assert_close(got[:, g].exp(), literal(features, centroids[g]), atol=1e-12, rtol=0)


def test_unit_length_ignores_scale_and_is_the_released_distance(features):
    centroids = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
    got = log_assignments(features, centroids, normalize=True)
    unit = features / features.norm(dim=1, keepdim=True), centroids / centroids.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got.exp(), literal(*unit), atol=1e-12, rtol=0)
    torch.testing.assert_close(log_assignments(100 * features, 0.01 * centroids, normalize=True), got)
    assert log_assignments(torch.zeros(2, 6), torch.zeros(3, 6), normalize=True).exp() == pytest.approx(1 / 3)  # nothing has no direction


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 0.05)])
def test_assignments_do_not_depend_on_where_the_origin_is(dtype, tolerance):
    # Stored in float32 at an offset of 1e4, features have a resolution of 1e-3; the computation may add no more than that
    z = (torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 1e4).to(dtype)
    centroids = (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) + 1e4).to(dtype)
    torch.testing.assert_close(log_assignments(z, centroids).double(), literal(z, centroids).log(), atol=tolerance, rtol=0)


def test_assignments_at_squared_distances_of_1e5_in_single_precision():
    z, centroids = 14 * torch.randn(20, 512, generator=torch.Generator().manual_seed(0)), torch.randn(7, 512)
    exact = -(z.double()[:, None] - centroids.double()).square().sum(-1)
    assert exact.min() < -9e4
    x = z.clone().requires_grad_()
    got = log_assignments(x, centroids)
    torch.testing.assert_close(got.double(), exact.log_softmax(-1), atol=5e-3, rtol=0)
    got.exp()[:, 0].sum().backward()
    assert x.grad.isfinite().all()


def test_an_absent_class_never_wins_and_takes_nothing_from_the_others(features):
    centroids = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
    centroids[2] = 0  # an empty class's centroid is in the middle of everything
    x = features.clone().requires_grad_()
    got = log_assignments(x, centroids, present=torch.tensor([True, True, False, True]))
    assert (got[:, 2] == -math.inf).all()
    torch.testing.assert_close(got[:, [0, 1, 3]], log_assignments(features, centroids[[0, 1, 3]]))
    got[:, 0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_single_precision_assignments(features, dtype):
    z, centroids = features.to(dtype), features[:3].to(dtype)
    got = log_assignments(z, centroids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, log_assignments(z.float(), centroids.float()), atol=1e-6, rtol=0)


def test_autocast_changes_nothing():
    g = torch.Generator().manual_seed(0)
    z, centroids, weights = torch.randn(30, 64, generator=g), torch.randn(5, 64, generator=g), one_hot_targets(classes(30, 5, skew=0), 5)

    def everything():
        x = z.clone().requires_grad_()
        log_phi = log_assignments(x, centroids)
        return x, [log_phi, class_centroids(x, weights), assignment_table(log_phi.exp(), weights)]

    def with_gradient(x, values):
        return [*values, *torch.autograd.grad(values[0].exp().square().sum() + values[2].square().sum(), x)]

    expected = with_gradient(*everything())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for a, b in zip(with_gradient(*got), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("z", "options", "message"), [
    (torch.zeros(2, 5), {}, r"\(2, 5\).*\(3, 6\)"),
    (torch.zeros(6), {}, r"\(6,\) must be \(n, D\)"),
    (torch.zeros(2, 2, 6), {}, r"\(2, 2, 6\) must be \(n, D\)"),
    (torch.zeros(2, 6), {"temperature": 0.0}, "temperature must be positive, got 0"),
    (torch.zeros(2, 6), {"temperature": math.nan}, "temperature must be positive, got nan"),
])
def test_assignments_refuse_other_widths_and_temperatures(z, options, message):
    with pytest.raises(ValueError, match=message):
        log_assignments(z, torch.zeros(3, 6), **options)


def test_a_batch_of_one_is_a_row_of_a_larger_one(features):
    centroids = features[:4]
    torch.testing.assert_close(log_assignments(features[5:6], centroids), log_assignments(features, centroids)[5:6])


# --- tables


@pytest.mark.parametrize("k", [2, 7, 101])
def test_table_is_algorithm_3_line_by_line(k):
    phi = torch.randn(60, k, generator=torch.Generator().manual_seed(k), dtype=F64).mul(3).softmax(-1)
    labels = classes(60, k, skew=4 / k)
    labels[::7] = -1
    slow = reference.algorithm_3(phi.tolist(), [None if y < 0 else y for y in labels.tolist()], k)
    table = assignment_table(phi, one_hot_targets(labels, k))
    torch.testing.assert_close(table, torch.tensor(slow, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(table.sum(0), torch.ones(k, dtype=F64))
    single = assignment_table(phi.float(), one_hot_targets(labels, k))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), table, atol=1e-6, rtol=0)


def test_tables_of_labels_are_those_of_each_label_alone():
    g = torch.Generator().manual_seed(0)
    phi = torch.randn(40, 3, 2, generator=g, dtype=F64).softmax(-1)
    labels = (torch.rand(40, 3, generator=g) < 0.3).float()
    labels[torch.rand(40, 3, generator=g) < 0.2] = math.nan
    table = assignment_table(phi, one_hot_targets(labels, 3, True))
    for i in range(3):
        column = [None if math.isnan(v) else int(v) for v in labels[:, i].tolist()]
        torch.testing.assert_close(table[i], torch.tensor(reference.algorithm_3(phi[:, i].tolist(), column, 2), dtype=F64))


def test_the_column_of_an_empty_class_is_uniform():
    table = assignment_table(torch.tensor([[0.7, 0.2, 0.1]]), one_hot_targets(torch.tensor([1]), 3))
    torch.testing.assert_close(table, torch.tensor([[1 / 3, 0.7, 1 / 3], [1 / 3, 0.2, 1 / 3], [1 / 3, 0.1, 1 / 3]]))


def test_table_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"assignments \(3, 2\) and targets \(4, 2\)"):
        assignment_table(torch.full((3, 2), 0.5), torch.eye(2)[[0, 1, 0, 1]])


@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([0.0, 1.0, 30.0, 1000.0]), st.sampled_from([0, 1]))
def test_floored_logs_are_those_of_a_distribution_above_the_floor(seed, k, sharpness, dim):
    p = (sharpness * torch.randn(4, k, generator=torch.Generator().manual_seed(seed), dtype=F64)).softmax(1)
    p = p if dim else p.T
    got = log_floored(p, dim)
    torch.testing.assert_close(got.exp().sum(dim), torch.ones(4, dtype=F64), atol=1e-12, rtol=0)
    assert got.exp().min() >= 1e-6 / (1 + k * 1e-6) * (1 - 1e-12)
    assert (got.exp() - p).abs().max() <= k * 1e-6
    rows = (p if dim else p.T).tolist()
    assert (got if dim else got.T)[0].exp().tolist() == pytest.approx(reference.floored(rows[0]), abs=1e-13)


def test_the_floor_is_a_parameter():
    assert log_floored(torch.tensor([0.0, 1.0]), floor=0.5).exp().tolist() == pytest.approx([1 / 3, 2 / 3])
