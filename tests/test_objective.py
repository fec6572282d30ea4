"""IBBLoss against the slow reference of Algorithm 1 over whole epochs, its variants, its bookkeeping, and bad input."""
import copy
import io
import math
import pickle
import warnings

import distributed_worker
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibma.assignments import assignment_table, class_centroids, log_assignments, log_floored, one_hot_targets
from ibma.ibb import alignment, ibb, ibb_fused, label_alignment, tight_ibb, tight_ibb_fused
from ibma.objective import BOUNDS, IBBLoss

NAMES, C, D, N = ("audio", "image", "text"), 3, 4, 24


def features(seed, num_modalities=2, n=N, spread=1.0, dim=D):
    "Representations that know a little about the label i mod 3, new ones for every seed."
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(C, dim, generator=g)[torch.arange(n) % C]
    *z, fused = (means + 0.5 * torch.randn(n, dim, generator=g) for _ in range(num_modalities + 1))
    return dict(zip(NAMES, z, strict=False)), fused


def build(*args, **options):
    "A loss with the paper's temperature and lengths, whatever the defaults are."
    return IBBLoss(*args, **{"temperature": 1.0, "normalize": False} | options)


def class_labels(unlabelled=False, skewed=False):
    labels = torch.arange(N) % C
    if skewed:
        labels[(labels == 2) & (torch.arange(N) > 6)] = 0
    return torch.where(torch.arange(N) % 4 == 1, -1, labels) if unlabelled else labels


def multi_labels():
    g = torch.Generator().manual_seed(9)
    labels = (torch.rand(N, C, generator=g) < 0.4).float()
    labels[torch.rand(N, C, generator=g) < 0.2] = math.nan
    labels[5] = math.nan  # nothing known about this one
    return labels


def masks(num_modalities, seed=4):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(N, generator=g) < 0.6 for name in NAMES[:num_modalities]}


def lists(z, fused, mask=None):
    "The same for the reference."
    return [*(v.tolist() for v in z.values()), fused.tolist()], [mask[name].tolist() for name in z] if mask else None


def ready(labels=None, epochs=2, n=N, **options):
    "A loss whose statistics are those of two epochs with the same features, and these."
    z, fused = features(0, n=n)
    labels = torch.arange(n) % C if labels is None else labels
    loss = build(C, NAMES[:2], D, **options)
    for _ in range(epochs):
        loss.observe(z, fused, labels)
        loss.refresh()
    return loss, z, fused, labels


def leaves(z):
    return {name: v.clone().requires_grad_() for name, v in z.items()}


# --- Algorithm 1, over whole epochs with moving features

SCENARIOS = {
    "single label": {},
    "unlabelled and skewed": {"labels": class_labels(unlabelled=True, skewed=True)},
    "temperature": {"options": {"temperature": 3.0}},
    "unit length": {"options": {"normalize": True}},
    "three modalities": {"m": 3},
    "three modalities with masks": {"m": 3, "mask": masks(3), "labels": class_labels(unlabelled=True)},
    "two modalities with masks": {"mask": masks(2)},
    "multi-label": {"labels": multi_labels(), "options": {"multi_label": True}},
    "multi-label, three modalities with masks": {"labels": multi_labels(), "m": 3, "mask": masks(3), "options": {"multi_label": True}},
    "optimal table with masks": {"m": 3, "mask": masks(3), "labels": class_labels(unlabelled=True), "options": {"table": "optimal"}},
    "multi-label, optimal table": {"labels": multi_labels(), "options": {"multi_label": True, "table": "optimal"}},
}


@pytest.mark.parametrize("bound", ["paper", "tight"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_terms_and_statistics_are_those_of_algorithm_1(scenario, bound):
    case = {"m": 2, "mask": None, "labels": class_labels(), "options": {}} | SCENARIOS[scenario]
    m, mask, labels, options = case["m"], case["mask"], case["labels"], dict(case["options"])
    loss = build(C, NAMES[:m], D, bound=bound, **options)
    slow = reference.SlowLoss(m, C, D, options.pop("multi_label", False), bound, optimal=options.pop("table", "label") == "optimal", **options)
    for epoch in range(4):
        z, fused = features(epoch, m)
        slow_z, slow_mask = lists(z, fused, mask)
        value = loss(z, fused, labels, mask)
        expected = slow.terms(slow_z, labels.tolist(), slow_mask)
        assert list(loss.terms) == [*NAMES[:m], "fused"]
        assert [v.item() for v in loss.terms.values()] == pytest.approx(expected, abs=2e-5)
        assert value.item() == pytest.approx(sum(expected), abs=5e-5)
        for rows in torch.arange(N).split(7):
            loss.observe({k: v[rows] for k, v in z.items()}, fused[rows], labels[rows], {k: v[rows] for k, v in mask.items()} if mask else None)
        loss.refresh()
        slow.renew(slow_z, labels.tolist(), slow_mask)
        same_statistics(loss, slow, m)
    assert value.item() > 0.1 and abs(value.item() - (m + 1) * math.log(slow.k)) > 0.1  # not the trivial value


def same_statistics(loss, slow, m):
    stats = loss.statistics

    def close(got, expected):
        torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64).view(got.shape), atol=1e-5, rtol=0)

    close(stats.centroids, slow.centroids)
    close(stats.log_table.exp(), slow.q)
    close(stats.log_marginal.exp(), slow.r)
    close(stats.log_prior.exp(), slow.prior)
    assert stats.present.flatten().tolist() == torch.tensor(slow.present).flatten().tolist()
    if loss.table == "optimal":
        close(stats.log_pair_table.exp(), [[slow.pair_q[j, o] for o in range(m)] for j in range(m)])


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_value_is_the_mean_of_the_bound_functions_up_to_the_constant_u(bound):
    labels = class_labels(skewed=True)
    loss, z, fused, _ = ready(labels, bound=bound)
    weights, stats = one_hot_targets(labels, C), loss.statistics
    phi = [log_assignments(v, class_centroids(v, weights)) for v in (*z.values(), fused)]
    q = [log_floored(assignment_table(v.exp(), weights), -2) for v in phi]
    loss(z, fused, labels)
    if bound == "tight":
        expected = [tight_ibb(phi[0], phi[1], q[0]), tight_ibb(phi[1], phi[0], q[1]), tight_ibb_fused(phi[2], weights, q[2], log_floored(phi[2].exp().mean(0)), 2)]
    else:
        u = log_assignments(torch.randn(N, 5), torch.randn(C, 5))  # of any input
        constant = ibb(phi[0], u, phi[1], stats.log_prior, q[0]) + alignment(phi[0], phi[1], q[0])
        expected = [ibb(phi[0], u, phi[1], stats.log_prior, q[0]) - constant, ibb(phi[1], u, phi[0], stats.log_prior, q[1]) - constant,
                    ibb_fused(phi[2], [u, u], weights, stats.log_prior, q[2]) - 2 * constant]
        torch.testing.assert_close(expected[2], -label_alignment(phi[2], weights, q[2]))
    assert [v.item() for v in loss.terms.values()] == pytest.approx([v.mean().item() for v in expected], abs=1e-5)


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_one_label_is_the_task_of_two_classes_statistics_included(bound):
    labels = torch.arange(N) % 5 % 2
    labels[3] = -1
    as_label = torch.where(labels < 0, math.nan, labels.float())[:, None]
    single, multi = (build(2 - multi, NAMES[:2], D, bound=bound, multi_label=multi, table="optimal") for multi in (False, True))
    for epoch in range(3):
        z, fused = features(epoch)
        values = []
        for loss, targets in ((single, labels), (multi, as_label)):
            values.append(loss(z, fused, targets).item())
            loss.observe(z, fused, targets)
            loss.refresh()
        assert values[0] == pytest.approx(values[1], abs=1e-6)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(multi.state_dict()[name].flatten(), value.flatten(), atol=1e-6, rtol=0)


# --- the first epochs


@pytest.mark.parametrize("bound", BOUNDS)
def test_before_anything_is_observed_every_term_is_log_c_and_nothing_moves(bound):
    z, fused = features(0)
    loss, z = build(C, NAMES[:2], D, bound=bound), leaves(z)
    fused.requires_grad_()
    loss(z, fused, class_labels()).backward()
    expected = {"paper": [math.log(C)] * 3, "tight": [0.0] * 3, "released": [math.log(2)] * 2}[bound]
    assert [v.item() for v in loss.terms.values()] == pytest.approx(expected, abs=1e-6)
    assert all(v.grad is None or v.grad.abs().max() < 1e-7 for v in (*z.values(), fused))


def test_with_centroids_and_the_uniform_table_the_paper_s_form_has_no_gradient_and_the_tight_one_softens():
    for bound in ("paper", "tight"):
        loss, z, fused, labels = ready(epochs=1, bound=bound)
        torch.testing.assert_close(loss.statistics.log_table.exp(), torch.full((3, C, C), 1 / C))
        assert loss.statistics.centroids.abs().max() > 0.1
        z = leaves(z)
        loss(z, fused, labels).backward()
        entropy = {name: torch.special.entr(log_assignments(v, loss.statistics.centroids[j]).exp()).sum(1).mean() for j, (name, v) in enumerate(z.items())}
        if bound == "paper":
            assert [v.item() for v in loss.terms.values()] == pytest.approx([math.log(C)] * 3, abs=1e-5)
            assert all(v.grad.abs().max() < 1e-6 for v in z.values())
        else:
            for name, v in z.items():
                assert loss.terms[name].item() == pytest.approx(math.log(C) - entropy[name].item(), abs=1e-5)
                torch.testing.assert_close(v.grad, torch.autograd.grad(-entropy[name], v)[0], atol=1e-6, rtol=0)
                assert v.grad.abs().max() > 1e-3


# --- the released variant


def released(num_modalities=2):
    labels = class_labels(skewed=True)
    z, fused = features(0, num_modalities)
    loss = build(C, NAMES[:num_modalities], D, bound="released")
    loss.observe(z, fused, labels)
    loss.refresh()
    return loss, z, fused, labels


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_released_form_and_its_gradient_are_those_of_the_slow_reference(num_modalities):
    loss, z, fused, labels = released(num_modalities)
    leaf, slow = leaves(z), [v.double().requires_grad_() for v in z.values()]
    value = loss(leaf, fused, labels)
    value.backward()
    terms = reference.released_terms(slow, labels.tolist(), C)
    assert list(loss.terms) == list(NAMES[:num_modalities])  # no fused term
    assert [v.item() for v in loss.terms.values()] == pytest.approx([t.item() for t in terms], abs=1e-5)
    gradients = torch.autograd.grad(sum(terms), slow)
    for got, expected in zip(leaf.values(), gradients, strict=True):
        torch.testing.assert_close(got.grad.double(), expected, atol=1e-6, rtol=0)
    # Q is the minimiser of -V over tables whose columns sum to 1: the gradient that flows through it is there, and adds up to exactly nothing
    detached = torch.autograd.grad(sum(reference.released_terms(slow, labels.tolist(), C, detach_table=True)), slow)
    for a, b in zip(gradients, detached, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_released_table_is_in_the_graph():
    """The second derivative tells it from a constant, which the first cannot (see above)."""
    loss, z, fused, labels = released()
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(1))

    def curvature(value, leaf, along):
        gradient, = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad((gradient * along).sum(), leaf)[0].double()

    leaf, slow = leaves(z), [v.double().requires_grad_() for v in z.values()]
    got = curvature(loss(leaf, fused, labels), leaf["audio"], direction)
    expected, detached = (curvature(sum(reference.released_terms(slow, labels.tolist(), C, detach_table=d)), slow[0], direction.double()) for d in (False, True))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert (expected - detached).abs().max() > 1e-4


def test_released_form_needs_no_further_option():
    assert IBBLoss(C, bound="released").temperature == 1.0


def test_released_form_does_not_see_scale_nor_the_fused_representation():
    loss, z, fused, labels = released()
    scaled = loss({k: 7 * v for k, v in z.items()}, fused + 1, labels)
    assert scaled.item() == pytest.approx(loss(z, fused, labels).item(), abs=1e-6)
    assert loss.normalize


def test_released_statistics_are_centroid_and_anti_centroid_of_the_labelled():
    labels = class_labels(unlabelled=True, skewed=True)
    z, fused = features(0)
    loss = build(C, NAMES[:2], D, bound="released")
    loss.observe(z, fused, labels)
    loss.refresh()
    for c in range(C):
        members, others = z["image"][labels == c], z["image"][(labels != c) & (labels >= 0)]
        torch.testing.assert_close(loss.statistics.centroids[1, c, 1], members.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(loss.statistics.centroids[1, c, 0], others.mean(0), atol=1e-6, rtol=0)


def test_released_form_with_absent_modalities_is_that_of_the_samples_that_have_both():
    loss, z, fused, labels = released()
    mask = masks(2)
    both = mask["audio"] & mask["image"]
    expected = loss({k: v[both] for k, v in z.items()}, fused[both], labels[both]).item()
    assert loss(z, fused, labels, mask).item() == pytest.approx(expected, abs=1e-6)
    assert abs(loss(z, fused, labels).item() - expected) > 1e-4


def test_released_form_of_labels_is_the_same_as_of_classes_against_the_rest():
    loss, z, fused, labels = released()
    multi = build(C, NAMES[:2], D, bound="released", multi_label=True)
    targets = torch.nn.functional.one_hot(labels, C).float()
    multi.observe(z, fused, targets)
    multi.refresh()
    assert multi(z, fused, targets).item() == pytest.approx(loss(z, fused, labels).item(), abs=1e-6)


# --- gathering statistics


def test_streaming_is_the_pass_of_its_own_when_features_are_frozen():
    _, z, fused, labels = ready(epochs=0)
    whole, streaming = (build(C, NAMES[:2], D, refresh=refresh) for refresh in ("epoch", "streaming"))
    for epoch in range(3):
        whole.observe(z, fused, labels)
        whole.refresh()
        for rows in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(5):
            streaming(leaves({k: v[rows] for k, v in z.items()}), fused[rows], labels[rows])
        streaming.refresh()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(streaming.state_dict()[name], value, atol=1e-5, rtol=0)


def test_only_training_steps_are_streamed():
    loss, z, fused, labels = ready(epochs=0, refresh="streaming")
    with torch.no_grad():
        loss(z, fused, labels)
    loss.eval()
    loss(z, fused, labels)
    with pytest.raises(RuntimeError, match="observe"):
        loss.refresh()
    loss.train()
    loss(z, fused, labels)
    loss.refresh()
    other = build(C, NAMES[:2], D)
    other(z, fused, labels)  # refresh="epoch": steps are not observed
    with pytest.raises(RuntimeError, match="observe"):
        other.refresh()


@settings(max_examples=25)
@given(st.permutations(range(N)), st.lists(st.integers(1, N), max_size=5), st.sampled_from(["label", "optimal"]))
def test_neither_order_nor_pieces_of_the_epoch_matter(order, cuts, table):
    whole, z, fused, labels = ready(class_labels(unlabelled=True), epochs=1, table=table)
    mask, parts = masks(2), copy.deepcopy(whole)
    whole.observe(z, fused, labels, mask)
    bounds = [0, *sorted(set(cuts)), N]
    for rows in (torch.tensor(order[a:b], dtype=torch.long) for a, b in zip(bounds, bounds[1:], strict=False)):
        parts.observe({k: v[rows] for k, v in z.items()}, fused[rows], labels[rows], {k: v[rows] for k, v in mask.items()})
    whole.refresh()
    parts.refresh()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-5, rtol=0)


def test_sums_do_not_depend_on_the_size_of_the_batches():
    n = 4096
    g = torch.Generator().manual_seed(0)
    z, fused, labels = {k: torch.randn(n, D, generator=g) + 1000 for k in NAMES[:2]}, torch.randn(n, D, generator=g), torch.arange(n) % C
    whole, parts = build(C, NAMES[:2], D), build(C, NAMES[:2], D)
    whole.observe(z, fused, labels)
    for rows in torch.randperm(n, generator=g).split(64):
        parts.observe({k: v[rows] for k, v in z.items()}, fused[rows], labels[rows])
    torch.testing.assert_close(parts.statistics.feature_sums, whole.statistics.feature_sums, atol=0, rtol=1e-13)


def test_sums_of_single_samples_are_exact_to_double_precision():
    n = 200
    z, fused = {k: torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1000 for k in NAMES[:2]}, torch.zeros(n, D)
    loss, labels = build(C, NAMES[:2], D), torch.arange(n) % C
    for i in range(n):
        loss.observe({k: v[i:i + 1] for k, v in z.items()}, fused[i:i + 1], labels[i:i + 1])
    expected = torch.stack([z["audio"][labels == c].double().sum(0) for c in range(C)])
    torch.testing.assert_close(loss.statistics.feature_sums[0], expected, atol=0, rtol=1e-14)


def test_a_refresh_forgets_the_epoch_before():
    loss, _, _, labels = ready()
    z, fused = features(7)
    loss.observe(z, fused, labels)
    loss.refresh()
    torch.testing.assert_close(loss.statistics.centroids[0], class_means(z["audio"], labels), atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match="observe"):
        loss.refresh()


def class_means(v, labels):
    return torch.tensor(reference.class_means(v.tolist(), labels.tolist(), C))


def test_observing_leaves_no_trace_in_the_graph_or_in_the_value():
    loss, z, fused, labels = ready()
    before = loss(z, fused, labels).item()
    loss.observe(leaves(z), fused, labels)
    assert loss(z, fused, labels).item() == before
    assert not any(value.requires_grad for value in loss.state_dict(keep_vars=True).values())


def test_two_processes_make_the_statistics_of_one(tmp_path):
    torch.multiprocessing.spawn(distributed_worker.work, (2, str(tmp_path)), nprocs=2)
    for prototypes in ("mean", "ema"):
        expected = distributed_worker.statistics(prototypes=prototypes)
        for rank in (0, 1):
            got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[prototypes]
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0)


# --- kinds of prototypes and tables


def test_ema_centroids_follow_the_classes_of_each_training_batch():
    loss, z, fused, labels = ready(epochs=1, prototypes="ema", momentum=0.8)
    before = loss.statistics.centroids.clone()
    rows = torch.tensor([0, 3, 6, 1, 4])  # classes 0 and 1
    new, mask = features(5)[0], {"audio": torch.tensor([True, True, False, True, False])}
    batch = leaves({k: v[rows] for k, v in new.items()}), fused[rows], labels[rows], mask
    loss(*batch).backward()
    expected = before.clone()
    for s, (v, members) in enumerate([(new["audio"], [[0, 3], [1]]), (new["image"], [[0, 3, 6], [1, 4]]), (fused, [[0, 3, 6], [1, 4]])]):
        for a, inside in enumerate(members):
            expected[s, a] = 0.8 * before[s, a] + 0.2 * v[inside].mean(0)
    torch.testing.assert_close(loss.statistics.centroids, expected, atol=1e-6, rtol=0)
    loss.eval()
    loss(*batch)
    with torch.no_grad():
        loss.train()(*batch)
    torch.testing.assert_close(loss.statistics.centroids, expected, atol=1e-6, rtol=0)  # only training steps move them
    loss.observe(z, fused, labels)
    loss.refresh()
    torch.testing.assert_close(loss.statistics.centroids, expected, atol=1e-6, rtol=0)  # and refreshes do not


def test_ema_centroids_start_with_the_class_means_of_the_first_refresh():
    loss, z, fused, labels = ready(epochs=0, prototypes="ema")
    loss(leaves(z), fused, labels)
    assert not loss.statistics.centroids.any()
    loss.observe(z, fused, labels)
    loss.refresh()
    torch.testing.assert_close(loss.statistics.centroids[1], class_means(z["image"], labels), atol=1e-6, rtol=0)


def test_learnable_prototypes_start_as_class_means_and_learn():
    loss, z, fused, labels = ready(prototypes="learnable")
    assert [name for name, _ in loss.named_parameters()] == ["statistics.centroids"]
    start = loss.statistics.centroids.detach().clone()
    torch.testing.assert_close(start[0], class_means(z["audio"], labels), atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = loss(z, fused, labels)
    before.backward()
    assert (loss.statistics.centroids.grad.abs().amax((1, 2)) > 1e-4).all()
    optimizer.step()
    assert loss(z, fused, labels) < before
    moved = loss.statistics.centroids.detach().clone()
    loss.observe(z, fused, labels)
    loss.refresh()
    assert torch.equal(loss.statistics.centroids, moved) and not torch.equal(moved, start)
    assert not list(build(C, NAMES[:2], D).parameters())


@pytest.mark.parametrize("prototypes", ["learnable", "ema"])
def test_a_class_that_turns_up_later_starts_with_its_mean(prototypes):
    loss, z, fused, labels = ready(epochs=0, prototypes=prototypes)
    with pytest.warns(UserWarning, match="class"):
        loss.observe(z, fused, torch.where(labels == 2, -1, labels))
        loss.refresh()
    loss.observe(z, fused, labels)
    loss.refresh()
    torch.testing.assert_close(loss.statistics.centroids[0].detach(), class_means(z["audio"], labels), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_optimal_table_is_the_conditional_of_the_assignments_and_never_worse_on_the_observed_set(bound):
    label, z, fused, labels = ready(bound=bound)
    optimal = ready(bound=bound, table="optimal")[0]
    phi = [log_assignments(v, class_centroids(v, one_hot_targets(labels, C))).exp() for v in z.values()]
    for j, o in ((0, 1), (1, 0)):
        joint = [[sum((phi[j][i, a] * phi[o][i, y]).item() for i in range(N)) for y in range(C)] for a in range(C)]
        expected = [[joint[a][y] / sum(row[y] for row in joint) for y in range(C)] for a in range(C)]
        torch.testing.assert_close(optimal.statistics.log_pair_table[j, o].exp(), torch.tensor(expected), atol=1e-5, rtol=0)
    optimal(z, fused, labels)
    label(z, fused, labels)
    for name in z:
        assert optimal.terms[name] < label.terms[name] - 1e-4
    assert optimal.terms["fused"].item() == pytest.approx(label.terms["fused"].item(), abs=1e-6)


# --- masks, unlabelled samples, labels that nobody has


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_what_stands_in_an_absent_row_has_no_influence(bound):
    mask, labels = masks(3), class_labels()
    z, fused = features(0, 3)
    values = []
    for filler in (0.0, 50.0):
        loss = build(C, NAMES, D, bound=bound, table="optimal")
        filled = leaves({k: torch.where(mask[k][:, None], v, filler) for k, v in z.items()})
        for _ in range(2):
            loss.observe(filled, fused, labels, mask)
            loss.refresh()
        value = loss(filled, fused, labels, mask)
        value.backward()
        assert not any(v.grad[~mask[k]].any() for k, v in filled.items())
        values.append(torch.stack([value.detach(), *loss.terms.values(), *(v.grad.sum() for v in filled.values())]))
    torch.testing.assert_close(*values, atol=1e-6, rtol=0)


def test_what_stands_in_an_absent_row_has_no_influence_on_the_released_form():
    loss, z, fused, labels = released()
    mask = masks(2)
    values = [loss({k: torch.where(mask[k][:, None], v, filler) for k, v in z.items()}, fused, labels, mask).item() for filler in (1.0, -50.0)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("what", ["value", "statistics"])
def test_nan_in_an_absent_row_has_no_influence(what):
    loss, z, fused, labels = ready()
    mask = masks(2)
    z = {k: torch.where(mask[k][:, None], v, math.nan) for k, v in z.items()}
    if what == "statistics":
        loss.observe(z, fused, labels, mask)
        loss.refresh()
        assert all(v.isfinite().all() for v in loss.state_dict().values())
    else:
        assert loss(z, fused, labels, mask).isfinite()


def test_a_mask_of_everybody_is_no_mask_and_a_missing_one_means_present():
    loss, z, fused, labels = ready()
    everybody = {k: torch.ones(N, dtype=torch.bool) for k in z}
    value = loss(z, fused, labels)
    assert loss(z, fused, labels, everybody) == value == loss(z, fused, labels, {})
    some = masks(2)
    assert loss(z, fused, labels, {"image": some["image"]}) == loss(z, fused, labels, everybody | {"image": some["image"]}) != value


def test_a_sample_without_a_partner_counts_for_nothing_and_no_pair_at_all_is_zero():
    loss, z, fused, labels = ready()
    first = {k: torch.arange(N) < 10 for k in z}
    loss(z, fused, labels, first)
    terms = loss.terms
    loss({k: v[:10] for k, v in z.items()}, fused[:10], labels[:10])
    assert [terms[k].item() for k in z] == pytest.approx([loss.terms[k].item() for k in z], abs=1e-6)
    z = leaves(z)
    loss(z, fused, labels, {"audio": torch.arange(N) < 10, "image": torch.arange(N) >= 10}).backward()
    assert [loss.terms[k].item() for k in z] == [0, 0]
    assert all(not v.grad.any() for v in z.values())


@pytest.mark.parametrize("bound", BOUNDS)
def test_alignment_needs_no_label_and_a_batch_without_labels_no_fused_term(bound):
    loss, z, fused, labels = ready(bound=bound)
    loss(z, fused, labels)
    labelled = loss.terms
    z, fused = leaves(z), fused.clone().requires_grad_()
    loss(z, fused, torch.full((N,), -1)).backward()
    for name in z:
        assert loss.terms[name].item() == pytest.approx(labelled[name].item(), abs=1e-6)
        assert z[name].grad.isfinite().all() and z[name].grad.any()
    assert loss.terms.get("fused", torch.tensor(0.0)).item() == 0
    assert fused.grad is None or not fused.grad.any()


def test_a_batch_without_labels_is_refused_as_an_epoch():
    loss, z, fused, _ = ready(epochs=0)
    loss.observe(z, fused, torch.full((N,), -1))
    with pytest.raises(RuntimeError, match="no labelled sample"):
        loss.refresh()


def test_unknown_labels_of_a_batch():
    labels = multi_labels()
    loss = build(C, NAMES[:2], D, multi_label=True)
    z, fused = features(0)
    for _ in range(2):
        loss.observe(z, fused, labels)
        loss.refresh()
    z, fused = leaves(z), fused.requires_grad_()
    loss(z, fused, torch.full_like(labels, math.nan)).backward()
    assert loss.terms["fused"] == 0 and not fused.grad.any()
    assert loss.terms["audio"] > 0 and z["audio"].grad.isfinite().all()
    fused.grad = None
    loss(z, fused, labels).backward()
    assert not fused.grad[5].any() and fused.grad[:5].any()  # sample 5 has no known label


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_label_that_nobody_knows_does_not_break_the_others(bound):
    labels = multi_labels()
    labels[:, 1] = math.nan
    loss = build(C, NAMES[:2], D, bound=bound, multi_label=True)
    z, fused = features(0)
    loss.observe(z, fused, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss.refresh()
    assert loss(z, fused, labels).isfinite()


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_modality_absent_from_a_whole_epoch_does_not_break_the_others(bound):
    loss = build(C, NAMES, D, bound=bound)
    z, fused = features(0, 3)
    mask = {"text": torch.zeros(N, dtype=torch.bool)}
    loss.observe(z, fused, class_labels(), mask)
    loss.refresh()
    assert loss(z, fused, class_labels(), mask).isfinite()


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_empty_class_is_defined_and_said_once(bound):
    labels = torch.arange(N) % 2 * 2  # nobody in class 1
    loss = build(C, NAMES[:2], D, bound=bound)
    z, fused = features(0)
    with pytest.warns(UserWarning, match=r"no sample of class \[\[?1") as caught:
        for _ in range(3):
            loss.observe(z, fused, labels)
            loss.refresh()
    assert len(caught) == 1
    stats, z = loss.statistics, leaves(z)
    loss(z, fused, labels).backward()
    assert all(v.isfinite() for v in loss.terms.values())
    assert all(v.grad.isfinite().all() for v in z.values())
    if bound != "released":
        assert stats.present.tolist() == [[True, False, True]] * 3
        torch.testing.assert_close(stats.log_table.exp()[:, :, 1], torch.full((3, C), 1 / C))
        assert stats.log_prior.exp()[1].item() == pytest.approx(1e-6, rel=1e-3)
        assert (log_assignments(fused, stats.centroids[2], present=stats.present[2])[:, 1] == -math.inf).all()
        loss.observe(z, fused, torch.arange(N) % 3)  # it turns up: from here on it takes part
        loss.refresh()
        assert stats.present.all()
        loss.observe(*features(0), labels)  # and is gone again: no mean, no centroid
        loss.refresh()
        assert not stats.present[:, 1].any() and not stats.centroids[:, 1].any()


# --- numbers


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_finite_at_squared_distances_of_1e5_and_autocast_changes_nothing(bound, dtype):
    g = torch.Generator().manual_seed(0)
    v = (14 * torch.randn(3, 30, 512, generator=g)).to(dtype)
    z, fused, labels = dict(zip(NAMES, v[:2], strict=False)), v[2], torch.arange(30) % 5
    values = []
    for autocast in (False, True):
        loss = build(5, NAMES[:2], 512, bound=bound, refresh="streaming")
        for _ in range(3):
            leaf, leaf_fused = leaves(z), fused.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = loss(leaf, leaf_fused, labels)
            value.backward()
            assert value.dtype == torch.float32 and value.isfinite()
            assert all(x.grad.isfinite().all() for x in (*leaf.values(), *([leaf_fused] if bound != "released" else [])))
            loss.refresh()
        assert all(s.isfinite().all() for s in loss.state_dict().values())
        assert (torch.cdist(v[0].float(), loss.statistics.centroids[0].float().view(-1, 512)) ** 2).max() > 9e4
        values.append([value.detach(), *loss.state_dict().values()])
    for a, b in zip(*values, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bound", BOUNDS)
def test_double_precision_representations_work(bound):
    loss, z, fused, labels = ready(bound=bound)
    expected = loss(z, fused, labels).item()
    double = {k: v.double() for k, v in z.items()}
    assert loss(double, fused.double(), labels).item() == pytest.approx(expected, abs=1e-5)
    shifted = {k: v + 1e6 for k, v in double.items()}
    loss.observe(shifted, fused.double(), labels)
    sums = loss.statistics.feature_sums[0].sum(-2 if bound == "released" else 0)
    torch.testing.assert_close(sums, shifted["audio"].sum(0).expand_as(sums), atol=0, rtol=1e-14)  # summed as given
    loss.refresh()


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_batch_of_one_and_of_none(bound):
    loss, z, fused, labels = ready(bound=bound, refresh="streaming")
    for n in (1, 0):
        leaf = leaves({k: v[:n] for k, v in z.items()})
        value = loss(leaf, fused[:n], labels[:n])
        value.backward()
        assert value.isfinite() and all(v.grad.isfinite().all() for v in leaf.values())
    if bound != "released":
        singles = []
        for i in range(N):
            loss({k: v[i:i + 1] for k, v in z.items()}, fused[i:i + 1], labels[i:i + 1])
            singles.append(torch.stack(list(loss.terms.values())))
        loss(z, fused, labels)
        torch.testing.assert_close(torch.stack(singles).mean(0), torch.stack(list(loss.terms.values())), atol=1e-5, rtol=0)  # separable


# --- as a module


@pytest.mark.parametrize("options", [{}, {"table": "optimal", "prototypes": "ema"}, {"prototypes": "learnable", "bound": "tight"}, {"bound": "released"}])
def test_state_dict_deep_copy_and_pickle_keep_everything(options):
    loss, z, fused, labels = ready(**options)
    loss(leaves(z), fused, labels).backward()
    loss.observe(z, fused, labels)  # in the middle of an epoch
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    loaded = build(C, NAMES[:2], D, **options)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    z2, fused2 = features(3)
    results = []
    for one in (loss, loaded, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with torch.no_grad():
            value = one(z, fused, labels)
        one.observe(z2, fused2, labels)
        one.refresh()
        with torch.no_grad():
            results.append([value, one(z2, fused2, labels), *(v.detach().clone() for v in one.state_dict().values())])
        for a, b in zip(results[-1], results[0], strict=True):
            assert torch.equal(a, b)


def test_a_copy_does_not_share_its_statistics():
    loss, z, fused, labels = ready()
    other, before = copy.deepcopy(loss), loss.statistics.centroids.clone()
    other.observe({k: v + 1 for k, v in z.items()}, fused, labels)
    other.refresh()
    assert torch.equal(loss.statistics.centroids, before) and not torch.equal(other.statistics.centroids, before)


def test_terms_are_detached_and_sum_to_the_value():
    loss, z, fused, labels = ready()
    value = loss(leaves(z), fused, labels)
    assert value.ndim == 0 and value.requires_grad
    assert not any(v.requires_grad for v in loss.terms.values())
    assert value.item() == pytest.approx(sum(v.item() for v in loss.terms.values()))


def test_the_paper_s_settings():
    loss = IBBLoss.as_in_paper(5, NAMES, 16, multi_label=True)
    assert (loss.num_classes, loss.modalities, loss.dim, loss.multi_label) == (5, NAMES, 16, True)
    assert (loss.bound, loss.temperature, loss.normalize, loss.table, loss.refresh_mode) == ("paper", 1.0, False, "label", "epoch")
    assert loss.statistics.prototypes == "mean"
    assert IBBLoss.as_in_paper(3).dim == 512
    for word in ("5 labels", "dim=16", "bound='paper'", "prototypes='mean'", "table='label'", "refresh='epoch'", "temperature=1.0"):
        assert word in repr(loss)


# --- bad input


@pytest.mark.parametrize(("options", "message"), [
    ({"bound": "loose"}, "bound='loose'.*paper.*tight.*released"),
    ({"prototypes": "median"}, "prototypes='median'.*mean.*learnable.*ema"),
    ({"table": "best"}, "table='best'.*label.*optimal"),
    ({"refresh": "never"}, "refresh='never'.*epoch.*streaming"),
    ({"temperature": 0}, "temperature must be positive, got 0"),
    ({"temperature": -1.0}, "temperature must be positive, got -1"),
    ({"modalities": ("audio",)}, r"\('audio',\).*two or more different"),
    ({"modalities": ("audio", "audio")}, "two or more different"),
    ({"modalities": ("audio", "fused")}, "'fused'"),
    ({"num_classes": 1}, "num_classes=1.*two classes"),
    ({"num_classes": 0, "multi_label": True}, "num_classes=0"),
])
def test_bad_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        IBBLoss(**{"num_classes": C, "modalities": NAMES[:2], "dim": D} | options)
    with pytest.raises(TypeError, match="bond"):
        IBBLoss(C, bond="paper")


def bad(z=None, fused=None, targets=None, mask=None):
    good = features(0)
    return {"z": z or good[0], "fused": good[1] if fused is None else fused, "targets": class_labels() if targets is None else targets, "mask": mask}


@pytest.mark.parametrize("method", ["forward", "observe"])
@pytest.mark.parametrize(("arguments", "error", "message"), [
    (bad(z={"audio": torch.zeros(N, D)}), KeyError, r"\['audio'\].*built for \['audio', 'image'\]"),
    (bad(z={"audio": torch.zeros(N, D), "video": torch.zeros(N, D)}), KeyError, "video"),
    (bad(z={"audio": torch.zeros(N, D), "image": torch.zeros(N, D + 1)}), ValueError, r"'image' has shape \(24, 5\).*dim=4"),
    (bad(z={"audio": torch.zeros(N - 1, D), "image": torch.zeros(N, D)}), ValueError, r"'audio' has shape \(23, 4\).*24 targets"),
    (bad(fused=torch.zeros(N, D, 1)), ValueError, r"'fused' has shape \(24, 4, 1\)"),
    (bad(targets=class_labels()[:5]), ValueError, "'audio' has shape.*5 targets"),
    (bad(targets=class_labels() + 1), ValueError, r"row 2 is 3; allowed are 0\.\.2"),
    (bad(targets=torch.full((N,), math.nan)), TypeError, "integers"),
    (bad(targets=multi_labels()), TypeError, "integers.*multi_label=True"),
    (bad(targets=torch.zeros(N, C, dtype=torch.long)), ValueError, "multi_label=True"),
    (bad(mask={"video": torch.ones(N, dtype=torch.bool)}), KeyError, r"unknown modalities \['video'\]"),
])
def test_bad_batches_are_refused_by_name(method, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(build(C, NAMES[:2], D), method)(**arguments)


@pytest.mark.parametrize("mask", [torch.ones(1, dtype=torch.bool), torch.ones(N, 1, dtype=torch.bool), torch.ones(N - 1, dtype=torch.bool), torch.ones(N)])
def test_masks_of_another_shape_or_type_are_refused_by_name(mask):
    with pytest.raises((ValueError, TypeError), match="audio"):
        ready()[0](*features(0), class_labels(), {"audio": mask})


@pytest.mark.parametrize(("targets", "message"), [(class_labels(), r"shape \(n, 3\)"), (torch.full((N, C), 0.5), "row 0"), (torch.zeros(N, 2), r"\(24, 2\)")])
def test_bad_labels_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        build(C, NAMES[:2], D, multi_label=True)(*features(0), targets)


# --- the fast path is the definition


def way(loss, name, z, fused, labels, mask):
    batch = loss._prepare(z, fused, labels, mask)
    return getattr(loss, name)(batch, False)


@pytest.mark.parametrize("piece_size", [2**24, 3 * 4 * 8], ids=["whole", "in pieces"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_fast_terms_and_gradients_are_those_of_the_definition(scenario, bound, piece_size):
    case = {"m": 2, "mask": None, "labels": class_labels(), "options": {}} | SCENARIOS[scenario]
    m, mask, labels = case["m"], case["mask"], case["labels"]
    loss = build(C, NAMES[:m], D, bound=bound, **case["options"])
    for epoch in range(2):
        z, fused = features(epoch, m)
        loss.observe(z, fused, labels, mask)
        loss.refresh()
    loss._piece_size = piece_size
    assert (len(loss._rows(N)) > 1) == (piece_size < 2**24)
    weight = torch.arange(1, m + 2, dtype=torch.float64)
    found = []
    for name in ("_plain", "_terms_of"):
        leaf, leaf_fused = {k: v.double().requires_grad_() for k, v in z.items()}, fused.double().requires_grad_()
        terms = way(loss, name, leaf, leaf_fused, labels, mask)
        gradient = torch.autograd.grad(terms @ weight, [*leaf.values(), leaf_fused], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in gradient), [*leaf.values(), leaf_fused], retain_graph=True)
        found.append([terms.detach(), *torch.autograd.grad(terms @ weight, [*leaf.values(), leaf_fused]), *second])
    assert found[0][1].abs().max() > 1e-3
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-7)


def test_closed_form_gradient_against_finite_differences():
    for bound, normalize in (("paper", True), ("tight", True), ("tight", False)):
        loss, z, fused, labels = ready(class_labels(unlabelled=True), bound=bound, normalize=normalize)
        rows, mask = slice(0, 7), {"audio": torch.arange(7) % 3 > 0}
        leaf = [v[rows].double().requires_grad_() for v in (*z.values(), fused)]

        def terms(a, b, c, loss=loss, mask=mask, labels=labels):
            return way(loss, "_terms_of", {"audio": a, "image": b}, c, labels[:7], mask)

        assert torch.autograd.gradcheck(terms, leaf) and torch.autograd.gradgradcheck(terms, leaf)


def test_a_representation_of_length_zero_has_the_gradient_of_the_definition():
    loss, z, fused, labels = ready(normalize=True)
    z["audio"][2] = 0
    found = []
    for name in ("_plain", "_terms_of"):
        leaf = leaves(z)
        way(loss, name, leaf, fused, labels, None).sum().backward()
        found.append(leaf["audio"].grad)
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def changes(loss):
    "Ways in which the centroids may change."
    other, z, fused, labels = ready(class_labels(skewed=True))
    z2, fused2 = features(11)
    yield "refresh", lambda: (loss.observe(z2, fused2, labels), loss.refresh())
    yield "state dict", lambda: loss.load_state_dict(other.state_dict())
    yield "in place", lambda: loss.statistics.centroids.mul_(0.5)
    yield "double", lambda: loss.double()
    yield "another tensor", lambda: setattr(loss.statistics, "centroids", loss.statistics.centroids + 1)
    yield "the tables only", lambda: loss.statistics.log_table.copy_(loss.statistics.log_table.flip(0))
    with torch.inference_mode():
        yield "in inference mode", lambda: loss.statistics.centroids.mul_(2)


def test_what_is_kept_between_steps_follows_the_centroids():
    loss, z, fused, labels = ready()
    for name, change in changes(loss):
        change()
        with torch.no_grad():
            slow, fast = (way(loss, which, z, fused, labels, None) for which in ("_plain", "_terms_of"))
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"after {name}: {m}")


def test_a_refresh_between_forward_and_backward_is_noticed():
    loss, z, fused, labels = ready()
    value = loss(leaves(z), fused, labels)
    loss.observe(z, fused, labels)
    loss.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("options", [{}, {"bound": "tight"}, {"table": "optimal"}], ids=str)
def test_streaming_in_pieces_observes_everybody_once(options):
    whole, pieces = (build(C, NAMES[:2], D, refresh="streaming", **options) for _ in range(2))
    pieces._piece_size = 3 * 4 * 5
    labels, mask = class_labels(unlabelled=True), masks(2)
    for epoch in range(3):
        z, fused = features(epoch)
        a, b = (loss(leaves(z), fused, labels, mask) for loss in (whole, pieces))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        whole.refresh()
        pieces.refresh()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], value, atol=1e-6, rtol=0)


def test_streaming_assigns_once(monkeypatch):
    from ibma import objective
    loss, z, fused, labels = ready(refresh="streaming")
    calls = []
    scored = objective._scored
    monkeypatch.setattr(objective, "_scored", lambda *a: calls.append(1) or scored(*a))
    loss(leaves(z), fused, labels).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_nothing_larger_than_the_representations_is_kept_for_the_backward_pass(bound):
    n, k, dim = 50, 40, 8
    g = torch.Generator().manual_seed(0)
    z, fused, labels = {name: torch.randn(n, dim, generator=g, requires_grad=True) for name in NAMES[:2]}, torch.randn(n, dim, generator=g), torch.arange(n) % k
    loss = build(k, NAMES[:2], dim, bound=bound)
    for _ in range(2):
        loss.observe(z, fused, labels)
        loss.refresh()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss(z, fused, labels).backward()
    assert max(sizes) == 3 * n * k and sum(sizes) <= 5 * 3 * n * k + 3 * n * dim + 4 * k * k


def test_many_classes_keep_sums_in_single_precision():
    assert build(2049, NAMES[:2], 1).statistics.table_sums.dtype == torch.float32
    assert build(C, NAMES[:2], 1).statistics.table_sums.dtype == torch.float64


def test_under_torch_func_the_definition_is_used():
    loss, z, fused, labels = ready()
    expected = torch.autograd.grad(loss((leaf := leaves(z)), fused, labels), leaf["audio"])[0]
    found = torch.func.grad(lambda a: loss({**z, "audio": a}, fused, labels))(z["audio"])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"bound": "tight"}, {"bound": "tight", "refresh": "streaming", "prototypes": "ema"}, {"bound": "released"}, {"prototypes": "learnable"}], ids=str)
def test_within_a_compiled_step_every_refresh_takes_effect(options):
    # traced, the centroids' version was a constant, and the directions of an earlier epoch were used again
    losses, labels, found = [build(C, NAMES[:2], D, **options) for _ in range(2)], class_labels(), []
    for loss, compiled in zip(losses, (False, True), strict=True):
        torch._dynamo.reset()

        def step(z, fused, loss=loss):
            return 2 * loss({name: v.tanh() for name, v in z.items()}, fused, labels)

        call, values = torch.compile(step, backend="aot_eager") if compiled else step, []
        for epoch in range(4):
            z, fused = features(epoch)
            value = call(z := leaves(z), fused)
            values.append((value.detach(), *torch.autograd.grad(value, z.values())))
            loss.observe(z, fused, labels)
            loss.refresh()
        found.append(values)
    assert len({round(float(value), 6) for value, *_ in found[0]}) >= 3
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-5)


def test_a_changed_setting_takes_effect_at_once():
    torch.manual_seed(0)
    loss, fresh = (IBBLoss(3, ("a", "b"), dim=4, temperature=t) for t in (2.0, 0.5))
    z, fused, y = {name: torch.randn(12, 4) for name in ("a", "b")}, torch.randn(12, 4), torch.arange(12) % 3
    for _ in range(2):  # the first refresh only finds centroids
        loss.observe(z, fused, y)
        loss.refresh()
    before = loss(z, fused, y)
    fresh.load_state_dict(loss.state_dict())
    loss.temperature = 0.5
    assert torch.equal(loss(z, fused, y), fresh(z, fused, y)) and not torch.isclose(before, loss(z, fused, y))
