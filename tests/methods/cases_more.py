"""What the generic tests need to know of MMIB, MMRLIB, DMIB, MCIB, CLFA and DCLF."""
import math

from cases_methods import METHOD_CASES, MethodCase, Regulariser


def contrast_floor(data) -> float:
    "Of the supervised contrast: all samples of a class in one place, the others infinitely far; then each of its m - 1 partners has 1 / (m - 1)."
    sizes = [int((data.target == y).sum()) for y in data.target.unique() if y >= 0]
    return sum(m * math.log(m - 1) for m in sizes if m > 1) / sum(m for m in sizes if m > 1)


METHOD_CASES.update({
    "mmib": MethodCase({"code": 4}, (Regulariser("beta", "kl/m0"), Regulariser("beta", "kl/m1"), Regulariser("between", "between")), overfit={"code": 16}),
    "mmrlib": MethodCase({"tokens": 2, "heads": 2}, (Regulariser("beta", "kl/m0"), Regulariser("beta", "kl/m1"), Regulariser("align", "align"))),
    "dmib": MethodCase({}, (Regulariser("gap", "gap", 10.0, epochs=100, lr=3e-3),)),  # slowly: at the end of fast training the toy classes close the gap by themselves
    "mcib": MethodCase(
        {"code": 4, "hidden": 8},
        tuple(Regulariser("weight", f"{part}/{m}") for part in ("kl", "conditional") for m in ("m0", "m1")),
        refuses={"one_class": "a one-class task has none to predict"},
        overfit={"code": 16, "hidden": 32},
    ),
    "clfa": MethodCase(
        {"tokens": 2, "layers": 2, "heads": 2, "feedforward": 8},
        (Regulariser("align", "align"),),
        overfit={"layers": 1, "feedforward": 32},
    ),
    "dclf": MethodCase(
        {},
        (Regulariser("sample", "sample", floor=contrast_floor), Regulariser("context", "context"), Regulariser("modality", "modality", 5.0)),
        refuses={"one_class": "a one-class task has no right answers"},
    ),
})
