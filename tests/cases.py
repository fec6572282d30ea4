"""Random cases for property tests (from uniform to one-hot assignments, skewed classes, soft targets, missing labels), and toy data."""
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ibma.assignments import assignment_table, class_prior, log_floored
from ibma.data import MultimodalData


@dataclass
class Case:
    "Log assignments in float64 (a one-hot one holds -inf), targets, tables."

    targets: Tensor  # (n, C) rows that sum to 1 (known) or 0 (unknown)
    log_z: Tensor
    log_other: Tensor
    log_fused: Tensor
    log_x: list[Tensor]
    log_prior: Tensor
    log_q: Tensor
    log_q_fused: Tensor
    log_r: Tensor

    @property
    def known(self) -> Tensor:
        return self.targets.sum(-1) > 0


SHARPNESS = st.sampled_from(["uniform", 0.1, 1.0, 5.0, 100.0, "one-hot"])


def log_memberships(draw, targets: Tensor, g: torch.Generator) -> Tensor:
    "Assignments of a drawn sharpness, tied to the target or not."
    sharpness, tie = draw(SHARPNESS), draw(st.sampled_from([0.0, 1.0, 3.0]))
    score = tie * targets + torch.randn(targets.shape, generator=g, dtype=torch.float64)
    if sharpness == "uniform":
        return torch.zeros_like(score).log_softmax(-1)
    if sharpness == "one-hot":
        return torch.nn.functional.one_hot(score.argmax(-1), score.shape[-1]).double().log()
    return (sharpness * score).log_softmax(-1)


def tables(draw, phi: Tensor, other: Tensor, g: torch.Generator) -> Tensor:
    "A conditional distribution: of Eq. (10), at random, of the assignments themselves, or certain."
    kind, k = draw(st.sampled_from(["label", "random", "optimal", "certain"])), phi.shape[-1]
    if kind in ("label", "optimal"):
        return log_floored(assignment_table(phi, other), -2)
    if kind == "certain":
        return log_floored(torch.eye(k, dtype=torch.float64)[torch.randperm(k, generator=g)], -2)
    return (3 * torch.randn(k, k, generator=g, dtype=torch.float64)).log_softmax(-2)


@st.composite
def cases(draw, min_classes: int = 2, max_classes: int = 20, min_modalities: int = 1) -> Case:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, k, m = draw(st.integers(1, 25)), draw(st.integers(min_classes, max_classes)), draw(st.integers(min_modalities, 4))
    skew = (draw(st.sampled_from([0.0, 1.0, 4.0])) * torch.randn(k, generator=g, dtype=torch.float64)).softmax(0)
    targets = torch.nn.functional.one_hot(torch.multinomial(skew, n, replacement=True, generator=g), k).double()
    if draw(st.booleans()):  # soft
        targets = (2 * targets + torch.randn(n, k, generator=g, dtype=torch.float64)).softmax(-1)
    targets = targets * (torch.rand(n, 1, generator=g) >= draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])))
    z, other, fused, *x = (log_memberships(draw, targets, g) for _ in range(3 + m))
    marginal = fused.exp().mean(0) if draw(st.booleans()) else torch.rand(k, generator=g, dtype=torch.float64).softmax(0)
    return Case(
        targets, z, other, fused, x,
        log_prior=log_floored(class_prior(targets)),
        log_q=tables(draw, z.exp(), draw(st.sampled_from([targets, other.exp()])), g),
        log_q_fused=tables(draw, fused.exp(), targets, g),
        log_r=log_floored(marginal),
    )


def toy_data(n=33, num_modalities=2, num_classes=3, *, multi_label=False, masks=False, unlabelled=False, image=False, seed=0, noise=0.7) -> MultimodalData:
    "Small learnable data: class means plus noise, as vectors (the first modality as images with `image`)."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    means = np.random.default_rng(100).normal(size=(num_modalities, num_classes, 16))
    inputs = {f"m{j}": means[j, labels] + noise * rng.normal(size=(n, 16)) for j in range(num_modalities)}
    if image:
        inputs["m0"] = inputs["m0"].reshape(n, 1, 4, 4)
    target = labels
    if multi_label:
        target = np.stack([labels == c for c in range(num_classes)], 1).astype(float)
        target[rng.random(target.shape) < 0.2] = np.nan
    elif unlabelled:
        target = np.where(np.arange(n) % 5 == 2, -1, labels)
    present = None
    if masks:
        here = rng.random((n, num_modalities)) < 0.6
        here[~here.any(1), 0] = True
        present = {f"m{j}": here[:, j] for j in range(num_modalities)}
    return MultimodalData.from_arrays(inputs, target, mask=present)
