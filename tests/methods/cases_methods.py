"""What the generic tests need to know of each method, and the toy data and training loop they use.

A further group of methods adds its entries in a module `cases_<group>.py` of this folder, which calls `METHOD_CASES.update({...})`
on the dictionary it imports from here.
"""
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cases import toy_data

from ibma.data import MultimodalData, load
from ibma.methods import create

KINDS = ("single_label", "multi_label", "regression", "one_class")
SMALL = {"dim": 8, "encoders": {"vector": {"hidden": 8}, "image": {"width": 4}}}


@dataclass
class Regulariser:
    "A term of the loss, and the option that is its weight."

    option: str
    term: str
    weight: float = 1.0  # large enough to show, whatever the default
    epochs: int = 40
    lr: float = 3e-2
    floor: Callable = lambda data: 0.0  # data -> the least value that the term can take


@dataclass
class MethodCase:
    options: dict = field(default_factory=dict)  # beside SMALL: what makes the method small
    regularisers: tuple[Regulariser, ...] = ()
    refuses: dict[str, str] = field(default_factory=dict)  # kind of task -> what the ValueError says
    phases: tuple[int, ...] = (0,)  # epochs whose on_epoch_start starts another phase
    modalities: tuple[int, ...] = (2, 3)  # numbers of modalities it takes
    overfit: dict = field(default_factory=dict)  # options for the overfitting test
    steps: int = 150  # of the overfitting test
    lr: float = 1e-2


METHOD_CASES: dict[str, MethodCase] = {
    "label_smoothing": MethodCase(refuses={"regression": "needs labels: a regression task has none", "one_class": "needs labels: a one_class task has none"}),
    "misa": MethodCase(
        {"hidden": 8, "feedforward": 8},
        (Regulariser("alpha", "difference"), Regulariser("beta", "similarity", 5.0, lr=1e-2), Regulariser("gamma", "reconstruction")),
        overfit={"hidden": 64, "feedforward": 16, "dropout": 0.1},
        lr=3e-3,
    ),
    "deep_ib": MethodCase({"code": 4}, (Regulariser("alpha", "kl/m0", 0.1), Regulariser("beta", "kl/m1", 0.1))),
    "e_mib": MethodCase({"code": 4, "hidden": 8}, (Regulariser("beta", "kl/fused"),)),
    "l_mib": MethodCase({"code": 4, "hidden": 8}, (Regulariser("beta", "kl/m0"), Regulariser("beta", "kl/m1")), overfit={"code": 16}),
    "c_mib": MethodCase({"code": 4, "hidden": 8}, (Regulariser("beta", "kl/m0"), Regulariser("beta", "kl/fused"))),
}


def case_of(name: str) -> MethodCase:
    return METHOD_CASES.get(name, MethodCase())


def regularised() -> list[tuple[str, Regulariser]]:
    return [(name, r) for name, case in METHOD_CASES.items() for r in case.regularisers]


def small(name, data, seed=0, **options):
    "A method small enough for tests."
    return create(name, data, seed=seed, **SMALL | case_of(name).options | options)


def kind_of_data(kind="single_label", num_modalities=2, masks=False, n=33, seed=0) -> MultimodalData:
    "Toy data of a kind of task, some targets unknown (in a one-class task, some anomalies)."
    data = toy_data(n, num_modalities, multi_label=kind == "multi_label", masks=masks, unlabelled=kind == "single_label", seed=seed)
    if kind in ("single_label", "multi_label"):
        return data
    whole, rows = data[:], torch.arange(n)
    inputs = {name: x.numpy() for name, x in whole.inputs.items()}
    present = {name: m.numpy() for name, m in whole.mask.items()}
    if kind == "regression":
        noise = 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
        target = (whole.target.float() - 1 + noise).masked_fill(rows % 5 == 2, float("nan"))
        return MultimodalData.from_arrays(inputs, target.numpy(), mask=present, kind="regression", bins=(-0.5, 0.5))
    target = torch.where(rows % 7 == 3, 1, torch.where(rows % 5 == 2, -1, 0))
    return MultimodalData.from_arrays(inputs, target.numpy(), mask=present, kind="one_class", num_classes=3)


def short_fit(method, batches, epochs=1, lr=1e-2) -> dict[str, float]:
    "The hooks in their order, as `ibma.training.fit` calls them, without its machinery; returns the last terms."
    batches = list(batches)
    method.on_fit_start(batches)
    extra = list(method.optimizers(None))
    own = {id(p) for o in extra for group in o.param_groups for p in group["params"]}
    optimiser = torch.optim.Adam([p for p in method.parameters() if p.requires_grad and id(p) not in own], lr)
    method.train()
    for epoch in range(epochs):
        method.on_epoch_start(epoch)
        for batch in batches:
            step(method, batch, optimiser, extra)
        terms = {name: value.item() for name, value in method.loss(batch).items()}
        method.on_epoch_end(batches)
    return terms


def step(method, batch, optimiser, extra=()):
    optimiser.zero_grad()
    sum(method.loss(batch).values()).backward()
    optimiser.step()
    if extra:
        for o in extra:
            o.zero_grad()
        method.learning_loss(batch).backward()
        for o in extra:
            o.step()
    method.after_step(batch)


def digits32():
    "Thirty-two digits of all classes."
    return load("digits")[:32]


for further in sorted(Path(__file__).parent.glob("cases_*.py")):
    if further.stem != "cases_methods":
        importlib.import_module(further.stem)
