"""ibma.mi_estimators: every estimator against its own population value, a slow independent computation, and its contract."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ibma.mi_estimators import (
    ESTIMATORS,
    HSIC,
    MINE,
    VCLUB,
    VIB,
    EstimatorIBLoss,
    GaussianBottleneck,
    GaussianConditional,
    InfoNCE,
    correlated_gaussians,
    frozen,
    gaussian_hsic,
    gaussian_kl,
    gaussian_mi,
    gaussian_nll,
    gaussian_vclub,
    hsic,
    label_gram,
    label_hsic,
    squared_distances,
)

F64 = torch.float64


def true_conditional(rho):
    return lambda x: (rho * x, torch.full_like(x, math.log(1 - rho**2)))


def log_ratio(rho):
    """log p(x, z) / p(x) p(z) of the correlated pairs, from scipy's densities' formula written out, for broadcastable x and z."""
    def ratio(x, z):
        quadratic = (rho**2 * (x**2 + z**2) - 2 * rho * x * z) / (2 * (1 - rho**2))
        return (-0.5 * math.log(1 - rho**2) - quadratic).sum(-1)
    return ratio


def pairwise(critic):
    return lambda x, z: critic(x[:, None], z[None])


# --- the ground truth itself


@pytest.mark.parametrize("rho", [-0.5, 0.3, 0.9])
def test_gaussian_mi_is_the_integral(rho):
    axis = np.linspace(-7, 7, 561)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    joint = stats.multivariate_normal(cov=[[1, rho], [rho, 1]]).logpdf(grid)
    value = (np.exp(joint) * (joint - stats.norm.logpdf(grid).sum(-1))).sum() * (axis[1] - axis[0]) ** 2
    assert gaussian_mi(rho) == pytest.approx(value, abs=1e-6)
    assert gaussian_mi(rho, 3) == pytest.approx(3 * gaussian_mi(rho))


def test_correlated_gaussians_have_the_stated_moments():
    x, z = correlated_gaussians(50_000, -0.6, dim=2, seed=5)
    corr = torch.corrcoef(torch.cat([x, z], 1).T)
    expected = torch.tensor([[1, 0, -0.6, 0], [0, 1, 0, -0.6], [-0.6, 0, 1, 0], [0, -0.6, 0, 1]], dtype=F64)
    assert (corr - expected).abs().max() < 4 / math.sqrt(50_000)
    assert (torch.cat([x, z], 1).std(0) - 1).abs().max() < 4 / math.sqrt(2 * 50_000)


# --- VIB


def test_gaussian_kl_and_nll_are_those_of_torch():
    torch.manual_seed(0)
    mean, logvar, z = torch.randn(3, 7, 4, dtype=F64)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(4, dtype=F64), 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, logvar), kl)
    torch.testing.assert_close(gaussian_nll(z, mean, logvar), -q.log_prob(z).sum(1))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_vib_is_the_information_where_codes_are_standard_normal(rho):
    x, z = correlated_gaussians(20_000, rho, 3)
    # KL_i = MI + rho² (x² - 1)/2 summed over three dimensions, of variance 3 rho^4 / 2
    tolerance = 4 * math.sqrt(1.5) * rho**2 / math.sqrt(20_000) + 1e-9
    assert float(VIB(conditional=true_conditional(rho))(x, z)) == pytest.approx(gaussian_mi(rho, 3), abs=tolerance)


def test_vib_exceeds_the_information_by_the_marginal_divergence():
    # z = 2x + 1 + noise of variance 0.25: q(z) = N(1, 4.25)
    x = correlated_gaussians(100_000, 0.0)[0]
    vib = VIB(conditional=lambda x: (2 * x + 1, torch.full_like(x, math.log(0.25))))
    information = 0.5 * math.log(4.25 / 0.25)
    marginal = 0.5 * (4.25 + 1 - 1 - math.log(4.25))
    # KL_i = (2x+1)²/2 + const: variance (4x² + 4x)²/4 part = Var(2x²+2x) = 8 + 4
    assert float(vib(x, x)) == pytest.approx(information + marginal, abs=4 * math.sqrt(12 / 100_000))


def test_bottleneck_of_a_linear_encoder_decomposes_exactly():
    torch.manual_seed(3)
    layer = GaussianBottleneck(5, 3).double()
    torch.nn.init.zeros_(layer.logvar.weight)
    x = torch.randn(100_000, 5, dtype=F64)
    with torch.no_grad():
        z, kl = layer(x)
        w, b, var = (t.detach() for t in (layer.mean.weight, layer.mean.bias, layer.logvar.bias.exp()))
    cov = (w @ w.T + var.diag()).numpy()
    information = 0.5 * (np.linalg.slogdet(cov)[1] - np.log(var.numpy()).sum())
    marginal = 0.5 * (np.trace(cov) + float(b @ b) - 3 - np.linalg.slogdet(cov)[1])
    assert float(kl.mean()) == pytest.approx(information + marginal, abs=4 * float(kl.std()) / math.sqrt(len(kl)))
    assert np.abs(np.cov(z.numpy().T) - cov).max() < 6 * cov.max() / math.sqrt(len(kl))
    assert kl.shape == (100_000,) and z.shape == (100_000, 3)


def test_bottleneck_samples_in_training_only_and_passes_gradients():
    torch.manual_seed(0)
    layer, h = GaussianBottleneck(4, 2), torch.randn(6, 4, requires_grad=True)
    assert not torch.equal(layer(h)[0], layer(h)[0])
    z, kl = layer(h)
    z.sum().backward(retain_graph=True)
    assert layer.logvar.weight.grad.abs().sum() > 0, "the sample carries a gradient to its variance"
    kl.sum().backward()
    assert h.grad.isfinite().all()
    layer.eval()
    torch.testing.assert_close(layer(h)[0], layer.mean(h))
    assert layer(h * 1e6)[1].isfinite().all()


# --- vCLUB


def vclub_by_loops(x, z, conditional):
    """Algorithm 2 of the paper as it stands: two loops, full Gaussian log densities from scipy."""
    mean, logvar = (t.detach().numpy() for t in conditional(x))
    z = z.numpy()
    total = 0.0
    for i in range(len(z)):
        q = [stats.norm(mean[i, d], math.exp(logvar[i, d] / 2)) for d in range(z.shape[1])]
        score = [sum(q[d].logpdf(z[j, d]) for d in range(z.shape[1])) for j in range(len(z))]
        total += score[i] - sum(score) / len(z)
    return total / len(z)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_vclub_equals_the_double_loop(offset):
    torch.manual_seed(1)
    x, z = correlated_gaussians(25, 0.7, 3)
    club = VCLUB(3, 3, hidden=16).double()
    assert club(x, z + offset).item() == pytest.approx(vclub_by_loops(x, z + offset, club.conditional), abs=1e-6)


def test_vclub_gradient_equals_that_of_the_naive_tensor():
    torch.manual_seed(1)
    x, z = (t.requires_grad_() for t in correlated_gaussians(12, 0.7, 2))
    club = VCLUB(2, 2).double()
    mean, logvar = club.conditional(x)
    squares = (z[None] - mean[:, None]).square() / logvar[:, None].exp()  # (i, j, d)
    naive = 0.5 * (squares.sum(-1).mean(1) - squares.sum(-1).diagonal()).mean()
    for ours, theirs in zip(torch.autograd.grad(club(x, z), (x, z)), torch.autograd.grad(naive, (x, z)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_vclub_keeps_its_digits_far_from_the_origin():
    x, z = correlated_gaussians(200, 0.8, 4)

    def shifted(x):
        return 0.8 * x + 4096, torch.full_like(x, math.log(0.36))  # 4096 is exact in float32, as are z's leading digits
    exact = VCLUB(conditional=shifted)(x, z.float().double() + 4096)
    assert float(VCLUB(conditional=shifted)(x.float(), (z + 4096).float())) == pytest.approx(float(exact), rel=5e-3)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("sampled", [False, True])
def test_vclub_with_the_true_conditional_is_not_the_information(rho, sampled):
    torch.manual_seed(0)
    x, z = correlated_gaussians(60_000, rho, 2, seed=7)
    club = VCLUB(conditional=true_conditional(rho), sampled=sampled)
    batches = torch.stack([club(a, b) for a, b in zip(x.split(100), z.split(100), strict=True)])
    error = 4 * float(batches.std()) / math.sqrt(len(batches))
    # j = i is one of the n partners (or is drawn with probability 1/n), which costs the factor 1 - 1/n
    assert float(batches.mean()) == pytest.approx(0.99 * 2 * rho**2 / (1 - rho**2), abs=error + 1e-9)
    assert gaussian_vclub(rho, 2) == pytest.approx(2 * rho**2 / (1 - rho**2))
    assert error < 0.1


def test_vclub_excess_is_the_reverse_divergence():
    normal = torch.distributions.MultivariateNormal
    joint = normal(torch.zeros(2, dtype=F64), torch.tensor([[1, 0.9], [0.9, 1]], dtype=F64))
    reverse = torch.distributions.kl_divergence(normal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)), joint)
    assert gaussian_vclub(0.9) - gaussian_mi(0.9) == pytest.approx(float(reverse))


@pytest.mark.parametrize(("rho", "bound", "variance"), [(0.6, 1.0, 0.64), (0.95, 1.0, math.exp(-1)), (0.95, 4.0, 1 - 0.95**2)])
def test_vclub_learns_its_conditional_up_to_the_floor_of_the_tanh(rho, bound, variance):
    torch.manual_seed(0)
    club = VCLUB(1, 1, hidden=64, max_logvar=bound).fit(*correlated_gaussians(4000, rho), steps=250, batch_size=256, lr=1e-2)
    x, z = correlated_gaussians(8000, rho, seed=1)
    mean, logvar = club.conditional(x.float())
    assert float(logvar.exp().mean().detach()) == pytest.approx(variance, rel=0.12)
    # cov(z, rho x) / variance
    assert float(club.estimate(x, z)) == pytest.approx(rho**2 / variance, rel=0.12)


def test_vclub_of_a_perfect_prediction_is_the_variance_over_the_floor():
    z = correlated_gaussians(500, 0, 3)[0] * torch.tensor([1.0, 2.0, 0.1])
    club = VCLUB(conditional=lambda x: (x, torch.full_like(x, -1.0)))
    assert float(club(z, z)) == pytest.approx(math.e * float(z.var(0, unbiased=False).sum()))


def test_negative_upper_estimate_warns():
    x, z = correlated_gaussians(500, 0.9)
    with pytest.warns(UserWarning, match="VCLUB is -.*q is poor"):
        VCLUB(conditional=lambda x: (-x, torch.zeros_like(x))).estimate(x, z)


def test_conditional_bounds_its_log_variance_and_needs_dimensions():
    torch.manual_seed(0)
    mean, logvar = GaussianConditional(2, 3, max_logvar=2.5)(torch.randn(10, 2) * 1e4)
    assert mean.shape == logvar.shape == (10, 3)
    assert 2.4 < logvar.abs().max() <= 2.5
    with pytest.raises(ValueError, match="VCLUB needs dim_x and dim_z"):
        VCLUB(3)


# --- HSIC


def naive_hsic(k, m):
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ m @ h) / (n - 1) ** 2


def naive_gram(x, kernel, bandwidth):
    n, d = x.shape
    dist = np.array([[math.dist(a, b) for b in x] for a in x])
    if kernel == "gaussian":
        dist = dist**2
    median = np.median(dist[~np.eye(n, dtype=bool)])
    factor = {"dim": 1 / d if kernel == "gaussian" else math.sqrt(0.5 / d), "median": 1 / median}.get(bandwidth, bandwidth)
    return np.exp(-factor * dist)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("bandwidth", ["dim", "median", 0.3])
def test_hsic_equals_the_trace_formula(kernel, bandwidth):
    # 15 rows have 210 off-diagonal distances, each twice: an even count whose two middle ones are equal, so all medians agree
    x, z = correlated_gaussians(15, 0.6, 3)
    expected = naive_hsic(naive_gram(x.numpy(), kernel, bandwidth), naive_gram(z.numpy(), kernel, bandwidth))
    criterion = HSIC(kernel=kernel, bandwidth=bandwidth)
    assert float(criterion(x, z)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(criterion.gram(x), naive_gram(x.numpy(), kernel, bandwidth), atol=2e-6)


@pytest.mark.parametrize(("rho", "a", "b"), [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.8, 0.3, 0.7), (-0.6, 0.5, 0.2)])
def test_closed_form_of_gaussian_hsic_against_quadrature(rho, a, b):
    # a Gauss-Hermite rule is a discrete distribution with the right moments; HSIC of that is a finite sum
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    u, v = (m.ravel() for m in np.meshgrid(nodes, nodes))
    w = np.outer(weights, weights).ravel() / (2 * math.pi)
    x, z = u, rho * u + math.sqrt(1 - rho**2) * v
    k, m = np.exp(-a * (x[:, None] - x) ** 2), np.exp(-b * (z[:, None] - z) ** 2)
    value = w @ (k * m) @ w + (w @ k @ w) * (w @ m @ w) - 2 * (w * (k @ w)) @ (m @ w)
    assert gaussian_hsic(rho, 1, a, b) == pytest.approx(value, abs=1e-5)


def test_closed_form_of_gaussian_hsic_in_more_dimensions():
    # kernels are products over independent dimensions: each of the three expectations is a power of the one-dimensional one
    rho, a = 0.7, 1 / 3
    joint = ((1 + 4 * a) ** 2 - 16 * a * a * rho**2) ** -0.5
    separate = 1 / (1 + 4 * a)
    cross = (gaussian_hsic(rho, 1, a, a) - joint - separate) / -2
    assert gaussian_hsic(rho, 3) == pytest.approx(joint**3 + separate**3 - 2 * cross**3)


@pytest.mark.parametrize(("rho", "dim"), [(0.5, 1), (0.8, 1), (0.8, 4)])
def test_hsic_estimates_its_population_value(rho, dim):
    x, z = correlated_gaussians(16_000, rho, dim)
    batches = torch.stack([HSIC()(a, b) for a, b in zip(x.split(1000), z.split(1000), strict=True)])
    # 4 standard errors, and the bias, which for independent variables is (1 - E k)(1 - E l)/(n - 1)
    tolerance = 4 * float(batches.std()) / 4 + 1 / 999
    assert float(batches.mean()) == pytest.approx(gaussian_hsic(rho, dim), abs=tolerance)
    assert tolerance < 0.25 * gaussian_hsic(rho, dim) + 1 / 999


def test_hsic_of_independent_pairs_has_exactly_the_stated_mean():
    x, z = correlated_gaussians(12_000, 0.0, 1)
    batches = torch.stack([HSIC()(a, b) for a, b in zip(x.split(6), z.split(6), strict=True)])
    expected = (1 - 5**-0.5) ** 2 / 5  # n = 6, E k = (1 + 4)^(-1/2)
    assert float(batches.mean()) == pytest.approx(expected, abs=4 * float(batches.std()) / math.sqrt(2000))


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_hsic_gradient_is_finite_and_right_with_repeated_rows(kernel):
    x, z = correlated_gaussians(8, 0.5, 2)
    x[1], z[1] = x[0], z[0]
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(HSIC(kernel=kernel)(x, z), z)
    assert gradient.isfinite().all()
    z2 = correlated_gaussians(8, 0.5, 2)[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: HSIC(kernel=kernel)(x, t), (z2,))


def test_distances_survive_a_common_offset_in_float32():
    x = correlated_gaussians(50, 0.0, 8)[0].float()
    torch.testing.assert_close(squared_distances(x + 1000), squared_distances(x), rtol=1e-2, atol=1e-2)
    assert squared_distances(x).diagonal().eq(0).all() and squared_distances(x).min() >= 0


def test_hsic_is_not_in_nats_and_says_so():
    x, z = correlated_gaussians(400, 0.8, 2)
    assert HSIC.unit == "not in nats"
    assert float(HSIC()(x, 10 * z)) < 0.2 * float(HSIC()(x, z)), "scaling changes it, unlike any information"
    assert float(HSIC(bandwidth="median")(x, 10 * z)) == pytest.approx(float(HSIC(bandwidth="median")(x, z)))


@pytest.mark.parametrize("options", [{"kernel": "linear"}, {"bandwidth": "mean"}])
def test_hsic_rejects_unknown_options(options):
    with pytest.raises(ValueError, match="kernel must be"):
        HSIC(**options)


# --- MINE


def test_mine_with_the_optimal_critic_is_the_information():
    x, z = correlated_gaussians(40_000, 0.6, 2)
    torch.manual_seed(0)
    # variance of the pairs' term: rho² a dimension; of the other's, by the delta method: E ratio² - 1 = (1 - rho²)^-dim - 1
    error = math.sqrt((2 * 0.36 + 0.64**-2 - 1) / 40_000)
    assert float(MINE(critic=log_ratio(0.6))(x, z)) == pytest.approx(gaussian_mi(0.6, 2), abs=4 * error)


def test_mine_value_is_donsker_varadhan_of_mismatched_pairs():
    x, z = correlated_gaussians(2, 0.5)  # two pairs: the only rotation is the swap
    t = log_ratio(0.9)
    expected = t(x, z).mean() - t(x, z.flip(0)).exp().mean().log()
    torch.testing.assert_close(MINE(critic=t)(x, z), expected)
    large = MINE(critic=lambda x, z: 1e4 + x.sum(1))(x, z)
    torch.testing.assert_close(large, x.mean() - x.exp().mean().log(), msg="exp must not overflow")


def test_mine_gradient_divides_by_the_moving_average():
    torch.manual_seed(0)
    mine = MINE(1, 1, hidden=8, ema=0.9).double()
    batches = [correlated_gaussians(2, 0.5, seed=s) for s in (0, 1)]  # two pairs: the only rotation is the swap
    average = None
    for x, z in batches:
        exp_t = mine.critic(x, z.flip(0)).exp().mean()
        average = float(exp_t.detach()) if average is None else 0.9 * average + 0.1 * float(exp_t.detach())
        loss = mine.learning_loss(x, z)
        ours = torch.autograd.grad(loss, list(mine.parameters()))
        theirs = torch.autograd.grad(exp_t / average - mine.critic(x, z).mean(), list(mine.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert loss.item() == pytest.approx(-float(mine(x, z)), abs=1e-9), "its value is that of the batch, not of the surrogate"
    assert float(mine.log_average.exp()) == pytest.approx(average, rel=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_mine_learns_the_information(dim):
    torch.manual_seed(0)
    mine = MINE(dim, dim, hidden=64).fit(*correlated_gaussians(8000, 0.8, dim), steps=200, batch_size=512, lr=3e-3)
    truth = gaussian_mi(0.8, dim)
    # sampling error of 20,000 fresh pairs with the optimal critic, and 15 % for a short training
    error = 4 * math.sqrt((dim * 0.64 + 0.36**-dim - 1) / 20_000)
    assert float(mine.estimate(*correlated_gaussians(20_000, 0.8, dim, seed=1))) == pytest.approx(truth, abs=error + 0.15 * truth)
    assert mine.mean_of_last(100) == pytest.approx(truth, abs=error + 0.15 * truth)
    assert len(mine.history) == 200 and abs(mine.history[0]) < 0.1


def test_mine_cap_is_log_n():
    x = torch.arange(16.0)[:, None]
    assert float(MINE(critic=lambda x, z: -100 * (x - z).square().sum(1))(x, x)) > math.log(16)
    assert float(MINE(critic=lambda x, z: -100 * (x - z).square().sum(1), cap=True)(x, x)) == pytest.approx(math.log(16))


# --- InfoNCE


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("critic", ["separable", "bilinear", "cosine"])
def test_infonce_equals_the_loop(critic, symmetric):
    torch.manual_seed(0)
    x, z = correlated_gaussians(9, 0.7, 3)
    estimator = InfoNCE(3, 3, critic=critic, temperature=0.5, symmetric=symmetric).double()
    if critic == "cosine":
        f = [[float(torch.dot(a, b) / (a.norm() * b.norm())) / 0.5 for b in z] for a in x]
    elif critic == "bilinear":
        f = [[(a @ estimator.right.weight @ b).item() / 0.5 for b in z] for a in x]
    else:
        f = [[(estimator.left(a) @ estimator.right(b)).item() / 0.5 for b in z] for a in x]
    rows = sum(math.log(math.exp(f[i][i]) / (sum(math.exp(f[i][j]) for j in range(9)) / 9)) for i in range(9)) / 9
    columns = sum(math.log(math.exp(f[i][i]) / (sum(math.exp(f[j][i]) for j in range(9)) / 9)) for i in range(9)) / 9
    assert estimator(x, z).item() == pytest.approx((rows + columns) / 2 if symmetric else rows, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), scale=st.floats(1e-3, 1e3), temperature=st.floats(1e-3, 10), same=st.booleans(), symmetric=st.booleans(), seed=st.integers(0, 100))
def test_infonce_never_exceeds_log_n(n, scale, temperature, same, symmetric, seed):
    x, z = (scale * t.float() for t in correlated_gaussians(n, 0.9, 4, seed))
    z = x if same else z
    for critic in ("cosine", lambda a, b: -torch.cdist(a, b)):
        value = float(InfoNCE(4, 4, critic=critic, temperature=temperature, symmetric=symmetric)(x, z))
        assert value <= math.log(n) + 1e-6 and math.isfinite(value)


def test_infonce_of_identical_inputs_saturates_and_one_pair_is_zero():
    x = correlated_gaussians(64, 0.0, 3)[0]
    assert float(InfoNCE(critic=lambda a, b: -1e6 * torch.cdist(a, b))(x, x)) == pytest.approx(math.log(64), abs=1e-9)
    assert float(InfoNCE(3, 3, "cosine")(x[:1], x[:1])) == 0.0


@pytest.mark.parametrize("n", [4, 64])
def test_infonce_with_the_optimal_critic_estimates_its_population_value(n):
    rho, repeats = 0.8, 600
    rng = np.random.default_rng(0)
    x = rng.standard_normal((repeats, n))
    z = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((repeats, n))
    joint = stats.multivariate_normal(cov=[[1, rho], [rho, 1]])
    grid = np.stack(np.broadcast_arrays(x[:, :, None], z[:, None, :]), -1)
    ratio = np.exp(joint.logpdf(grid) - stats.norm.logpdf(grid).sum(-1))
    reference = np.log(np.diagonal(ratio, axis1=1, axis2=2) / ratio.mean(2)).mean(1)

    ours = InfoNCE(critic=pairwise(log_ratio(rho)))
    x, z = correlated_gaussians(n * repeats, rho, seed=11)
    batches = np.array([float(ours(a, b)) for a, b in zip(x.split(n), z.split(n), strict=True)])
    error = 4 * math.hypot(batches.std(), reference.std()) / math.sqrt(repeats)
    assert batches.mean() == pytest.approx(reference.mean(), abs=error)
    assert batches.mean() < min(gaussian_mi(rho), math.log(n))
    if n == 64:  # the loss is about half the ratio's variance over n
        assert batches.mean() == pytest.approx(gaussian_mi(rho), abs=error + (1 / (1 - rho**2) - 1) / n)


def test_infonce_learns():
    torch.manual_seed(0)
    estimator = InfoNCE(2, 2, hidden=64).fit(*correlated_gaussians(8000, 0.8, 2), steps=200, batch_size=128, lr=3e-3)
    value = float(estimator.estimate(*correlated_gaussians(12_800, 0.8, 2, seed=1), 128))
    truth, loss = gaussian_mi(0.8, 2), (0.36**-2 - 1) / 128
    assert truth - loss - 0.15 * truth < value < truth + 4 * math.sqrt(2 * 0.64 / 12_800)


def test_infonce_rejects_impossible_critics():
    with pytest.raises(ValueError, match='"cosine" compares x and z directly, but dim_x=2 and dim_z=3'):
        InfoNCE(2, 3, "cosine")
    with pytest.raises(ValueError, match="got 'dot'"):
        InfoNCE(2, 2, "dot")
    with pytest.raises(ValueError, match="'bilinear' needs dim_x and dim_z"):
        InfoNCE(critic="bilinear")
    with pytest.raises(ValueError, match="MINE needs dim_x and dim_z"):
        MINE(2)


# --- the interface


@pytest.fixture(params=list(ESTIMATORS))
def estimator(request):
    torch.manual_seed(0)
    return ESTIMATORS[request.param](3, 2)


def test_values_train_the_representations_and_learning_losses_the_estimator(estimator):
    x, z = (t.float().requires_grad_() for t in correlated_gaussians(16, 0.5, 3))
    (w,) = (z[:, :2],)
    value = estimator(x, w)
    value.backward()
    assert value.shape == () and x.grad.abs().sum() > 0
    assert isinstance(estimator, VIB) or z.grad.abs().sum() > 0  # VIB looks at the channel only
    assert all(p.grad is None and p.requires_grad for p in estimator.parameters()), "forward never trains the estimator"
    x.grad = z.grad = None
    loss = estimator.learning_loss(x, w)
    if list(estimator.parameters()):
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in estimator.parameters())
    else:
        assert float(loss) == 0
    assert x.grad is None and z.grad is None, "learning never trains the encoder"


def test_frozen_restores_what_was_live_even_after_an_error():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(layer):
        assert not layer.weight.requires_grad
        raise RuntimeError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


def test_shapes_are_checked(estimator):
    x = torch.randn(6, 3)
    for z, message in ((torch.randn(5, 2), r"\(6, 3\) and \(5, 2\)"), (torch.randn(6), "flatten each sample"), (torch.randn(6, 4), "built for dim_z=2, got z of shape")):
        for call in (estimator, estimator.learning_loss, estimator.fit, estimator.estimate):
            with pytest.raises(ValueError, match=message):
                call(x, z)


def test_a_batch_of_one_is_defined_or_an_error(estimator):
    x, z = torch.randn(1, 3), torch.randn(1, 2)
    if isinstance(estimator, HSIC | MINE):
        with pytest.raises(ValueError, match="needs at least 2 pairs, got 1"):
            estimator(x, z)
    elif isinstance(estimator, VIB):
        assert estimator(x, z).isfinite()
    else:
        assert float(estimator(x, z).detach()) == 0.0
    with pytest.raises(ValueError, match="at least"):
        estimator(x[:0], z[:0])


def test_low_precision_inputs_and_autocast_compute_in_float32(estimator):
    x, z = (t.bfloat16() for t in correlated_gaussians(64, 0.5, 3))
    z = z[:, :2]
    torch.manual_seed(0)
    expected = estimator(x.float(), z.float()).detach()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = estimator(x, z).detach()
        assert estimator.learning_loss(x, z).dtype == torch.float32
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_fit_is_reproducible_and_leaves_the_callers_random_numbers_alone(estimator):
    x, z = correlated_gaussians(100, 0.5, 3)
    twin = copy.deepcopy(estimator)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    estimator.fit(x, z[:, :2], steps=3, batch_size=32, seed=1)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(99)
    twin.fit(x, z[:, :2], steps=3, batch_size=32, seed=1)
    assert twin.history == estimator.history
    assert all(torch.equal(a, b) for a, b in zip(estimator.state_dict().values(), twin.state_dict().values(), strict=True))
    if list(twin.parameters()):
        twin.fit(x, z[:, :2], steps=1, seed=2)
        assert len(twin.history) == 4
        assert not all(torch.equal(a, b) for a, b in zip(estimator.parameters(), twin.parameters(), strict=True)), "a copy is independent"


def test_estimate_averages_whole_batches():
    x, z = correlated_gaussians(25, 0.5)
    criterion = HSIC()
    expected = (criterion(x[:10], z[:10]) + criterion(x[10:20], z[10:20])) / 2
    torch.testing.assert_close(criterion.estimate(x, z, 10), expected)
    torch.testing.assert_close(criterion.estimate(x, z, 1000), criterion(x, z))


def test_mean_of_last_needs_a_history():
    with pytest.raises(ValueError, match="call fit first"):
        MINE(1, 1).mean_of_last()
    mine = MINE(1, 1)
    mine.history = [9.0, 1.0, 3.0]
    assert mine.mean_of_last(2) == 2.0


def test_registry_states_side_and_unit():
    assert {name: (cls.bounds, cls.unit) for name, cls in ESTIMATORS.items()} == {
        "vib": ("upper", "nats"), "vclub": ("upper", "nats"), "hsic": ("neither", "not in nats"), "mine": ("lower", "nats"), "infonce": ("lower", "nats"),
    }


# --- in place of IBB


INPUT_DIMS = {"audio": 5, "image": 6, "text": 4}
DIM = 3


def make_batch(n=20, modalities=("audio", "image"), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    z = {j: torch.randn(n, DIM, dtype=dtype, requires_grad=True) for j in modalities}
    fused = torch.randn(n, DIM, dtype=dtype, requires_grad=True)
    inputs = {j: torch.randn(n, INPUT_DIMS[j], dtype=dtype) for j in modalities}
    return z, fused, torch.arange(n) % 3, inputs


def make_loss(kind, modalities=("audio", "image"), **options):
    torch.manual_seed(1)
    return EstimatorIBLoss(kind, {j: INPUT_DIMS[j] for j in modalities}, DIM, hidden=16, **options)


def cosine_infonce(a, b):
    scores = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1) / 0.1
    labels = torch.arange(len(a))
    return math.log(len(a)) - (torch.nn.functional.cross_entropy(scores, labels) + torch.nn.functional.cross_entropy(scores.T, labels)) / 2


def one_hot_gram(y):
    onehot = torch.nn.functional.one_hot(y).float()
    return onehot @ onehot.T


@pytest.mark.parametrize("modalities", [("audio", "image"), ("audio", "image", "text")])
@pytest.mark.parametrize("kind", ["club", "apib"])
def test_loss_is_the_sum_of_its_parts(kind, modalities):
    z, fused, y, inputs = make_batch(modalities=modalities)
    loss_fn = make_loss(kind, modalities, compression_weight=0.5)
    if kind == "club":
        def compression(j, h, own):
            conditional = (loss_fn.upper.own if own else loss_fn.upper.joint)[j].conditional
            mean, logvar = conditional(inputs[j])
            squares = ((h[None] - mean[:, None]).square() / logvar.exp()[:, None]).sum(-1) / 2
            return (squares.mean(1) - squares.diagonal()).mean()
        alignment, prediction = cosine_infonce, torch.zeros(())
    else:
        def compression(j, h, own):
            return HSIC()(inputs[j], h)
        alignment, prediction = HSIC(), -hsic(HSIC().gram(fused), one_hot_gram(y))
    expected = prediction
    for j in modalities:
        expected = expected + 0.5 * (compression(j, z[j], True) + compression(j, fused, False))
        expected = expected - sum(alignment(z[j], z[k]) for k in modalities if k != j) / (len(modalities) - 1)
    value = loss_fn(z, fused, y, inputs)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert sum(loss_fn.terms.values()) == pytest.approx(float(value.detach()), abs=1e-5)
    others = [k for k in modalities if k != "audio"]
    torch.testing.assert_close(loss_fn.terms["alignment_audio"], -sum(alignment(z["audio"], z[k]) for k in others).detach() / len(others))
    names = {f"{half}_{j}" for half in ("compression", "alignment") for j in modalities} | {"compression_fused"} | ({"prediction"} if kind == "apib" else set())
    assert set(loss_fn.terms) == names and not any(t.requires_grad for t in loss_fn.terms.values())
    value.backward()
    assert all(t.grad.abs().sum() > 0 for t in (*z.values(), fused))
    assert all(p.grad is None for p in loss_fn.parameters())


@pytest.mark.parametrize("modalities", [("audio", "image"), ("audio", "image", "text")])
def test_vib_loss_is_the_sum_of_its_parts_and_trains_the_bottlenecks(modalities):
    h, fused_h, y, _ = make_batch(modalities=modalities)
    loss_fn = make_loss("vib", modalities)
    z = {j: loss_fn.transform(j, h[j]) for j in modalities}
    fused = loss_fn.transform("fused", fused_h)
    value = loss_fn(z, fused, y)
    layers = loss_fn.upper.layers

    def kl(name, h):
        q = torch.distributions.Normal(layers[name].mean(h), (layers[name].logvar(h) / 2).exp())
        return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    expected = len(modalities) * kl("fused", fused_h)
    for j in modalities:
        expected = expected + kl(j, h[j]) - sum(cosine_infonce(z[j], z[k]) for k in modalities if k != j) / (len(modalities) - 1)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    value.backward()
    assert all(p.grad is not None for p in loss_fn.parameters()), "the bottleneck is part of the encoder"
    assert all(t.grad.abs().sum() > 0 for t in (*h.values(), fused_h))
    with pytest.raises(ValueError, match=r"this batch's \['audio', 'image'.*'fused'\] through transform"):
        loss_fn(z, fused, y)  # a price is paid once


def test_vib_needs_the_codes_of_this_batch_and_is_deterministic_in_evaluation():
    z, fused, y, _ = make_batch()
    loss_fn = make_loss("vib").eval()
    for name, h in {**z, "fused": fused}.items():
        assert torch.equal(loss_fn.transform(name, h), loss_fn.transform(name, h))
    with pytest.raises(ValueError, match="this batch's"):
        loss_fn({j: v[:7] for j, v in z.items()}, fused[:7], y[:7])


@pytest.mark.parametrize("kind", ["club", "apib"])
def test_transform_changes_nothing_for_the_others(kind):
    z = make_batch()[0]
    assert make_loss(kind).transform("audio", z["audio"]) is z["audio"]


def test_learning_loss_is_the_likelihood_of_every_network():
    z, fused, _, inputs = make_batch()
    loss_fn = make_loss("club")
    expected = sum(
        gaussian_nll(h, *networks[j].conditional(inputs[j])).mean()
        for j in z for networks, h in ((loss_fn.upper.own, z[j]), (loss_fn.upper.joint, fused))
    )
    loss = loss_fn.learning_loss(z, fused, inputs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters()) and len(list(loss_fn.parameters())) == 4 * 8
    assert all(t.grad is None for t in (*z.values(), fused))
    for kind in ("vib", "apib"):
        assert float(make_loss(kind).learning_loss(z, fused)) == 0.0


def test_club_networks_learn_and_the_upper_half_then_separates_dependence_from_none():
    torch.manual_seed(0)
    x = {j: torch.randn(512, INPUT_DIMS[j]) for j in ("audio", "image")}
    z = {"audio": x["audio"][:, :DIM], "image": torch.randn(512, DIM)}  # one copies its input, one ignores it
    loss_fn = make_loss("club", alignment=False)
    optimiser = torch.optim.Adam(loss_fn.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss_fn.learning_loss(z, z["image"], x).backward()
        optimiser.step()
    loss_fn(z, z["image"], torch.zeros(512).long(), x)
    assert loss_fn.terms["compression_audio"] > 5 and loss_fn.terms["compression_image"] < 1
    assert not any(name.startswith("alignment") for name in loss_fn.terms)


@pytest.mark.parametrize("kind", ["vib", "club", "apib"])
def test_missing_modalities_only_use_the_rows_they_have(kind):
    z, fused, y, inputs = make_batch()
    mask = {"audio": torch.arange(20) < 15, "image": torch.arange(20) >= 5}
    loss_fn = make_loss(kind)

    def terms(z, inputs):
        torch.manual_seed(0)
        t = {j: loss_fn.transform(j, v) for j, v in z.items()}
        value = loss_fn(t, loss_fn.transform("fused", fused), y, inputs, mask)
        return value, loss_fn.terms
    value, before = terms(z, inputs)
    spoilt_z = {j: torch.where(mask[j][:, None], v, torch.full_like(v, 50.0)) for j, v in z.items()}
    spoilt_inputs = {j: torch.where(mask[j][:, None], v, torch.full_like(v, 50.0)) for j, v in inputs.items()}
    spoilt, after = terms(spoilt_z, spoilt_inputs)
    assert set(after) == set(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], msg=name)
    torch.testing.assert_close(value, spoilt)
    if kind == "apib":
        assert float(before["compression_audio"]) == pytest.approx(float(HSIC()(inputs["audio"][:15], z["audio"][:15]).detach()))
        assert float(before["alignment_audio"]) == pytest.approx(-float(HSIC()(z["audio"][5:15], z["image"][5:15]).detach()))
    if kind == "club":
        assert loss_fn.learning_loss(z, fused, inputs, mask).item() == pytest.approx(loss_fn.learning_loss(spoilt_z, fused, spoilt_inputs, mask).item())


@pytest.mark.parametrize("kind", ["vib", "club", "apib"])
@pytest.mark.parametrize("case", ["one sample", "no pair"])
def test_degenerate_batches_have_a_finite_loss_with_a_gradient(kind, case):
    n = 1 if case == "one sample" else 6
    z, fused, y, inputs = make_batch(n)
    mask = None if n == 1 else {"audio": torch.arange(6) < 0, "image": torch.arange(6) < 1}
    loss_fn = make_loss(kind)
    t = {j: loss_fn.transform(j, v) for j, v in z.items()}
    value = loss_fn(t, loss_fn.transform("fused", fused), y, inputs, mask)
    value.backward()
    assert value.isfinite() and all(v.grad is None or v.grad.isfinite().all() for v in (*z.values(), fused))
    if kind != "vib" and n == 1:
        assert value.item() == 0
    assert loss_fn.learning_loss(z, fused, inputs, mask).isfinite()


def test_labels_enter_by_the_rows_that_are_known():
    y = torch.tensor([0, 2, -1, 2, 1, -1])
    known, gram = label_gram(y)
    assert known.tolist() == [True, True, False, True, True, False]
    assert torch.equal(gram, one_hot_gram(y[known]))
    multi = torch.tensor([[0.0, 1], [0, 0], [float("nan"), 1], [1, 0]])
    known, gram = label_gram(multi)
    assert known.tolist() == [True, True, False, True]
    assert gram.tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    z = torch.randn(6, 3)
    expected = naive_hsic(naive_gram(z[y >= 0].numpy(), "gaussian", "dim"), one_hot_gram(y[y >= 0]).numpy())
    assert float(label_hsic(HSIC(), z, y)) == pytest.approx(expected, rel=1e-4)
    assert float(label_hsic(HSIC(), z, torch.full((6,), -1))) == 0
    with pytest.raises(ValueError, match="bin scores first"):
        label_gram(torch.randn(5))


def test_a_gaussian_kernel_of_one_hot_labels_is_the_equality_kernel_up_to_a_factor():
    y = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    z = torch.randn(7, 3)
    onehot = torch.nn.functional.one_hot(y).float()
    gaussian, equality = HSIC()(z, onehot), label_hsic(HSIC(), z, y)
    torch.testing.assert_close(gaussian, (1 - math.exp(-2 / 3)) * equality)


@pytest.mark.parametrize("kind", ["vib", "club", "apib"])
def test_the_loss_can_be_minimised_beside_its_own_learning(kind):
    torch.manual_seed(0)
    y = torch.arange(96) % 3
    inputs = {"audio": torch.randn(96, 5), "image": torch.randn(96, 6)}
    encoders = torch.nn.ModuleDict({j: torch.nn.Linear(INPUT_DIMS[j], DIM) for j in inputs})
    loss_fn = make_loss(kind)
    optimiser = torch.optim.Adam([*encoders.parameters(), *loss_fn.parameters()], 1e-2)
    values = []
    for _ in range(60):
        z = {j: loss_fn.transform(j, encoders[j](x)) for j, x in inputs.items()}
        fused = loss_fn.transform("fused", z["audio"] + z["image"])
        loss = loss_fn(z, fused, y, inputs)
        optimiser.zero_grad()
        (loss + loss_fn.learning_loss(z, fused, inputs)).backward()
        optimiser.step()
        values.append(loss.item())
    assert np.mean(values[-10:]) < np.mean(values[:10])


def test_raw_inputs_of_any_shape_are_flattened_and_state_is_saved():
    z, fused, y, inputs = make_batch()
    loss_fn = make_loss("club")
    images = {j: v.reshape(20, -1, 1) for j, v in inputs.items()}
    assert loss_fn(z, fused, y, images).item() == pytest.approx(loss_fn(z, fused, y, inputs).item())
    twin = EstimatorIBLoss("club", {"audio": 5, "image": 6}, DIM, hidden=16)
    twin.load_state_dict(loss_fn.state_dict())
    assert twin(z, fused, y, inputs).item() == pytest.approx(loss_fn(z, fused, y, inputs).item())


def test_the_loss_says_what_it_lacks():
    z, fused, y, inputs = make_batch()
    with pytest.raises(ValueError, match='"vib", "club" or "apib", got'):
        EstimatorIBLoss("ibb", INPUT_DIMS)
    with pytest.raises(ValueError, match="two modalities or more"):
        EstimatorIBLoss("club", {"audio": 5})
    with pytest.raises(ValueError, match='none called "fused"'):
        EstimatorIBLoss("club", {"audio": 5, "fused": 5})
    for given_inputs in (None, {"audio": inputs["audio"]}):
        with pytest.raises(ValueError, match=r"give inputs with \['audio', 'image'\]"):
            make_loss("club")(z, fused, y, given_inputs)
    with pytest.raises(ValueError, match="built for dim_x=5"):
        make_loss("club")(z, fused, y, {"audio": inputs["image"], "image": inputs["image"]})
