"""ibma.representations against definitions by loops, closed forms, and the loss's own tables while it trains."""
import copy

import matplotlib
import numpy as np
import pytest
import torch
from cases import toy_data
from sklearn.decomposition import PCA

from ibma.assignments import log_assignments
from ibma.methods import create
from ibma.objective import IBBLoss
from ibma.probing import representations
from ibma.representations import (
    Follow,
    agreement,
    assign,
    assignment_heatmap,
    linear_cka,
    own_mass,
    pca_panels,
    relations,
    separation,
    table_heatmap,
    through_training,
)
from ibma.training import TrainingConfig, fit

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


def drawn(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("seed", range(5))
def test_separation_is_its_definition(seed):
    [z] = drawn(seed, (40, 5))
    y = torch.arange(40) % 4 - 1  # a quarter is unlabelled
    x, labels = z[y >= 0].numpy().astype(float), y[y >= 0].numpy()
    between = sum(((x[labels == k].mean(0) - x.mean(0)) ** 2).sum() for k in labels)
    within = sum(((x[i] - x[labels == labels[i]].mean(0)) ** 2).sum() for i in range(len(x)))
    assert separation(z, y) == pytest.approx(between / within)
    turn = torch.linalg.qr(drawn(seed + 50, (5, 5))[0])[0]
    assert separation(0.3 * z @ turn - 7, y) == pytest.approx(separation(z, y), rel=1e-4)
    names = torch.tensor([7, 0, 3, -1])[y]  # classes renamed, one number left out
    assert separation(z, names) == pytest.approx(separation(z, y))


def test_separation_at_chance_and_at_its_ends():
    values = [separation(*drawn(seed, (60, 8)), torch.arange(60) % 3) for seed in range(200)]
    assert np.mean(values) == pytest.approx(2 / 57, rel=0.05)
    points = torch.eye(3).repeat(4, 1)
    assert separation(points, torch.arange(12) % 3) == float("inf")
    assert separation(points, torch.arange(12) // 6) == pytest.approx(0, abs=1e-12)  # equal means
    with pytest.raises(ValueError, match="fewer than two"):
        separation(points, torch.tensor([1] * 6 + [-1] * 6))
    with pytest.raises(ValueError, match="pass classes"):
        separation(points, torch.zeros(12, 2))


@pytest.mark.parametrize("seed", range(5))
def test_cka_closed_forms(seed):
    x, y, r = drawn(seed, (30, 6), (30, 4), (6, 6))
    turn = torch.linalg.qr(r)[0]
    assert linear_cka(x, x) == pytest.approx(1) == linear_cka(x, -4 * x @ turn + 9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, 2 * x @ turn), rel=1e-5)
    assert 0 <= linear_cka(x, y) < 1
    assert linear_cka(x[:, :1], y[:, :1]) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2, rel=1e-4)
    # by the kernels: HSIC of the centred Gram matrices
    h = np.eye(30) - 1 / 30
    k, m = (h @ (v @ v.T).numpy().astype(float) @ h for v in (x, y))
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rel=1e-5)
    whitened = torch.linalg.qr(x - x.mean(0))[0]  # orthonormal centred columns of one space: CKA is the dimension shared
    assert linear_cka(whitened[:, :3], whitened[:, 1:4]) == pytest.approx(2 / 3, rel=1e-4)
    assert linear_cka(whitened[:, :3], whitened[:, 3:]) == pytest.approx(0, abs=1e-8)


def test_cka_refuses_and_is_undefined_for_constants():
    x, y = drawn(0, (5, 2), (6, 2))
    with pytest.raises(ValueError, match="5 and 6 samples"):
        linear_cka(x, y)
    assert np.isnan(linear_cka(x, torch.ones(5, 2)))


def test_agreement_and_relations_count_samples_that_have_both():
    a, b = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.9, 0.1], [0.1, 0.9]]).log()
    assert agreement(a, b) == 0.5
    groups = torch.stack([a, b], 1), torch.stack([a, a], 1)  # (n, 2 labels, 2)
    assert agreement(*groups) == 0.75
    x, y, w = drawn(1, (40, 3), (40, 3), (40, 3))
    y = x @ torch.linalg.qr(w[:3])[0]
    mask = {"x": torch.arange(40) < 30, "y": torch.arange(40) >= 10, "w": torch.ones(40, dtype=torch.bool)}
    y[~mask["y"]] = 100.0  # an absent row must not count
    table = relations({"x": x, "y": y, "w": w}, mask).set_index("pair")
    assert table["samples"].tolist() == [20, 30, 30] and list(table.index) == ["x, y", "x, w", "y, w"]
    assert table.loc["x, y", "CKA"] == pytest.approx(1, rel=1e-5) and table.loc["x, y", "CKA, shuffled"] < 0.4
    assert table.loc["x, w", "CKA"] == pytest.approx(linear_cka(x[:30], w[:30]))


def test_assign_uses_the_centroids_of_training():
    train, z = drawn(2, (30, 4), (10, 4))
    y = torch.arange(30) % 3
    found = assign({"m": z}, {"m": train}, y, 3, temperature=0.7, normalize=False)["m"]
    means = torch.stack([train[y == k].mean(0) for k in range(3)])
    torch.testing.assert_close(found, (-torch.cdist(z, means).square() / 0.7).log_softmax(-1), rtol=1e-4, atol=1e-4)
    labels = torch.stack([y == 0, y == 1], 1).float()
    assert assign({"m": z}, {"m": train}, labels, 2)["m"].shape == (10, 2, 2)


class Peeking:
    "Keeps the loss's own tables after each epoch, seen from the diagnostics that `fit` asks for then."

    def __init__(self, method):
        self.seen, ask = [], method.diagnostics

        def diagnostics():
            stats = method.ibb.statistics
            self.seen.append((stats.log_table.clone(), stats.centroids.clone(), stats.log_marginal.clone(), dict(method.ibb.information)))
            return ask()

        method.diagnostics = diagnostics


@pytest.mark.parametrize("options", [{}, {"loss": {"refresh": "streaming"}}, {"loss": {"prototypes": "learnable", "bound": "tight"}}, {"multi_label": True}])
def test_the_recorder_keeps_what_the_loss_had(options):
    multi_label = options.pop("multi_label", False) if "multi_label" in options else False
    data = toy_data(60, multi_label=multi_label)
    method = create("ibma", data, seed=0, dim=8, **options)
    twin = copy.deepcopy(method)
    peek = Peeking(method)
    with Follow(method) as seen:
        fit(method, data, None, TrainingConfig(epochs=4, batch_size=20, lr=1e-2, device="cpu"))
    assert [s.epoch for s in seen.snapshots] == [0, 1, 2, 3, 4]
    k = 2 if multi_label else 3
    for value in seen.snapshots[0].q.values():  # Algorithm 1 begins with uniform tables
        torch.testing.assert_close(value, torch.full_like(value, 1 / k))
    sources = ("m0", "m1", "fused")
    for snapshot, (table, centroids, marginal, information) in zip(seen.snapshots[1:], peek.seen, strict=True):
        for s, name in enumerate(sources):
            assert torch.equal(snapshot.q[name], table[s].exp()) and torch.equal(snapshot.marginal[name], marginal[s].exp())
            assert torch.equal(snapshot.centroids[name], centroids[s])
        assert snapshot.information == information
    assert not torch.equal(seen.snapshots[1].q["fused"], seen.snapshots[4].q["fused"])
    fit(twin, data, None, TrainingConfig(epochs=4, batch_size=20, lr=1e-2, device="cpu"))  # and it changed nothing
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not {"on_fit_start", "on_epoch_end"} & set(vars(method))


def test_the_recorder_begins_anew_with_another_fit():
    data = toy_data(30)
    method = create("ibma", data, seed=0, dim=8)
    with Follow(method) as seen:
        for epochs in (3, 2):
            fit(method, data, None, TrainingConfig(epochs=epochs, batch_size=15, device="cpu"))
    assert [s.epoch for s in seen.snapshots] == [0, 1, 2]


def test_the_recorder_lets_go_also_after_an_error_and_refuses_others():
    data = toy_data(30)
    method = create("ibma", data, seed=0, dim=8)
    with pytest.raises(RuntimeError, match="stop"), Follow(method):
        raise RuntimeError("stop")
    assert not {"on_fit_start", "on_epoch_end"} & set(vars(method))
    for other in (create("ce", data, dim=8), create("ibma", data, dim=8, loss={"bound": "vib"})):
        with pytest.raises(TypeError, match="keeps no centroids and tables"):
            Follow(other)


def test_own_mass_is_the_mean_diagonal_of_assignments_by_hand():
    data = toy_data(60)
    method = create("ibma", data, seed=0, dim=8, loss={"temperature": 0.5})
    with Follow(method) as seen:
        fit(method, data, None, TrainingConfig(epochs=3, batch_size=20, lr=1e-2, device="cpu"))
    z, _ = representations(method, data)
    phi = log_assignments(z["m1"], seen.snapshots[-2].centroids["m1"], temperature=0.5, normalize=True).exp()  # Q is taken under the old centroids
    mass = own_mass(seen.snapshots)
    assert mass.index.tolist() == [0, 1, 2, 3] and list(mass) == ["m0", "m1", "fused"]
    assert mass.loc[3, "m1"] == pytest.approx(phi[torch.arange(60), data.target].mean().item(), abs=1e-4)
    fig = through_training(seen.snapshots, "m1", epochs=(0, 2, 99, 3, -1))
    drawn = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in drawn] == ["m1, epoch 0", "m1, epoch 2", "m1, epoch 3"]
    for ax, epoch in zip(drawn, (0, 2, 3), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), seen.snapshots[epoch].q["m1"])
        assert ax.images[0].get_clim() == drawn[0].images[0].get_clim()  # one scale for all
    np.testing.assert_allclose(fig.axes[-1].lines[1].get_ydata(), mass["m1"])


def test_heatmaps_show_the_numbers():
    log_phi, y = drawn(3, (6, 3))[0].log_softmax(-1), torch.tensor([2, 0, -1, 1, 0, 2])
    ax = assignment_heatmap(log_phi, y)
    np.testing.assert_allclose(ax.images[0].get_array(), log_phi.exp()[[1, 4, 3, 0, 5]])
    assert [line.get_ydata()[0] for line in ax.lines] == [1.5, 2.5]
    with pytest.raises(ValueError, match="one label's assignments"):
        assignment_heatmap(log_phi[:, None], y)
    with pytest.raises(ValueError, match="one label's table"):
        table_heatmap(torch.ones(2, 3, 3))


def test_projections_are_principal_components():
    z, w, c = drawn(4, (50, 5), (50, 5), (3, 5))
    z = z * torch.tensor([5.0, 3, 1, 1, 0.1])
    y, mask = torch.arange(50) % 3, {"a": torch.arange(50) < 40, "b": torch.ones(50, dtype=torch.bool)}
    fig = pca_panels({"a": z, "b": w}, y, {"a": c, "b": c}, mask)
    pca = PCA(2, svd_solver="full").fit(z[:40].double())
    first = fig.axes[0]
    assert first.get_title() == f"a: {pca.explained_variance_ratio_.sum():.0%} of variance"
    for k, points in enumerate(first.collections):
        np.testing.assert_allclose(points.get_offsets(), pca.transform(z[:40][y[:40] == k].double()))
    np.testing.assert_allclose([line.get_xydata()[0] for line in first.lines], pca.transform(c.double()))
    shared = pca_panels({"a": z, "b": w}, y, mask=mask, shared=True)
    common = PCA(2, svd_solver="full").fit(torch.cat([z[:40], w]).double())
    np.testing.assert_allclose(shared.axes[1].collections[2].get_offsets(), common.transform(w[y == 2].double()))
    seen = common.transform(w.double()).var(0).sum() / w.double().var(0, correction=0).sum().item()
    assert shared.axes[1].get_title() == f"b: {seen:.0%} of variance"
    unit = pca_panels({"a": z}, y, {"a": c}, normalize=True)
    lengths = PCA(2, svd_solver="full").fit(torch.nn.functional.normalize(z, dim=1).double())
    np.testing.assert_allclose(unit.axes[0].lines[1].get_xydata()[0], lengths.transform(torch.nn.functional.normalize(c, dim=1).double())[1], rtol=1e-5)


def test_projections_refuse():
    with pytest.raises(ValueError, match="no two principal components"):
        pca_panels({"a": torch.randn(9, 1)}, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="pass classes"):
        pca_panels({"a": torch.randn(9, 3)}, torch.zeros(9))


def test_two_poles_are_cheaper_than_ten_places_at_the_default_temperature():
    "The page's closed form, by the loss itself: fused term with every sample on its centroid."
    def term(points, temperature):
        loss = IBBLoss(10, ("a", "b"), 10, temperature=temperature)
        y = torch.arange(10).repeat(3)
        for _ in range(2):
            loss.observe({"a": points[y], "b": points[y]}, points[y], y)
            loss.refresh()
        loss.observe({"a": points[y], "b": points[y]}, points[y], y)
        loss.refresh()
        return loss.separate({"a": points[y], "b": points[y]}, points[y], y)["fused"].item()

    apart = torch.nn.functional.normalize(torch.eye(10) - 0.1, dim=1)
    poles = torch.zeros(10, 10)
    poles[:5, 0], poles[5:, 0] = 1, -1
    for temperature, k, points in ((2.0, 2, poles), (2.0, 10, apart), (0.5, 2, poles), (0.5, 10, apart)):
        phi = (-2 * k / (k - 1) / temperature * (torch.arange(10) // (10 // k) > 0)).double().softmax(0)
        assert term(points, temperature) == pytest.approx(torch.special.entr(phi).sum().item(), abs=1e-4)
    assert term(poles, 2.0) < term(apart, 2.0) and term(poles, 0.5) > term(apart, 0.5)
