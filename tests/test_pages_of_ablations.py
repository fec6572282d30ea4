"""What the pages of Tables 5, 6, 8, 9 and of OMIB's tables compute by themselves, against planted truth and slower ways."""
import ast
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "nbs" / "6_reproduction"


def parts_of(notebook, *names, **given):
    """Names of a reproduction page: its parameters and imports, then every cell that defines one of `names`, with `given` in place of what other cells make."""
    path = FOLDER / f"{notebook}.ipynb"
    if not path.is_file():
        pytest.skip("the notebooks are not in this installation")
    cells = [(c["metadata"].get("tags", []), "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    space = {"__name__": notebook}
    for _, source in cells[:2]:
        exec(compile(source, notebook, "exec"), space)
    space.update(given)
    for _, source in cells[2:]:
        kept = [node for node in ast.parse(source).body if getattr(node, "name", None) in names or any(getattr(t, "id", None) in names for t in getattr(node, "targets", []))]
        for node in kept:
            exec(compile(ast.unparse(node), notebook, "exec"), space)
    missing = [name for name in names if name not in space]
    assert not missing, f"{notebook} no longer defines {missing}"
    return space


def trained(n=60, seed=0):
    from ibma.data import load
    from ibma.methods import create
    from ibma.training import TrainingConfig, fit
    data = load("sim-3", n=n, seed=seed)
    method = create("ibma", data, seed=seed, dim=8, encoders={"vector": {"hidden": 4}})
    fit(method, data, config=TrainingConfig(epochs=2))
    return method, data


def plug_in(one, other):
    """Mutual information of two memberships by summing over cells."""
    joint = sum(np.outer(a, b) for a, b in zip(one, other, strict=True)) / len(one)
    rows, columns = joint.sum(1), joint.sum(0)
    return sum(joint[i, j] * math.log(joint[i, j] / rows[i] / columns[j]) for i in range(len(rows)) for j in range(len(columns)) if joint[i, j] > 0)


@pytest.mark.parametrize("reading, temperature, unit", [("printed", 1.0, False), ("default", 2.0, True)])
def test_ib_losses_of_table_5_by_hand(reading, temperature, unit):
    """Memberships, plug-in values and the fused loss of a trained network, recomputed with numpy from its representations."""
    space = parts_of("15_table5", "READINGS", "losses_of")
    method, data = trained()
    found = space["losses_of"](method, data, reading)
    from ibma.probing import representations
    z, _ = representations(method, data)
    inputs = {name: encoder.input_features(data.inputs[name]).detach() for name, encoder in method.model.encoders.items()}
    y = data.target.numpy()

    def memberships(features):
        f = features.double().numpy()
        centres = np.stack([f[y == c].mean(0) for c in range(2)])
        if unit:
            f, centres = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (f, centres))
        e = np.exp(-((f[:, None] - centres[None]) ** 2).sum(-1) / temperature + ((f[:, None] - centres[None]) ** 2).sum(-1).min(1, keepdims=True) / temperature)
        return e / e.sum(1, keepdims=True)

    m, x, labels = {k: memberships(v) for k, v in z.items()}, {k: memberships(v) for k, v in inputs.items()}, np.eye(2)[y]
    shared = plug_in(m["view1"], m["view2"])
    for name in inputs:
        assert found[f"{reading}/input/{name}"] == pytest.approx(plug_in(m[name], x[name]), abs=1e-4)
        assert found[f"{reading}/ib/{name}"] == pytest.approx(plug_in(m[name], x[name]) - shared, abs=1e-4)
    expected = plug_in(m["fused"], x["view1"]) + plug_in(m["fused"], x["view2"]) - plug_in(m["fused"], labels)
    assert found[f"{reading}/ib/fused"] == pytest.approx(expected, abs=1e-4)
    for which in (*inputs, "fused"):
        assert found[f"{reading}/ib/{which}"] <= found[f"{reading}/tight/{which}"] + 1e-5 <= found[f"{reading}/ibb/{which}"] + 2e-5


def test_club_of_every_pair_is_club_in_closed_form():
    """The page's slow CLUB, which is timed, is the value that the package computes."""
    space = parts_of("17_table9", "each_pair")
    torch.manual_seed(0)
    from ibma.mi_estimators import VCLUB
    q, x, z = VCLUB(5, 3, 8), torch.randn(20, 5), torch.randn(20, 3)
    assert space["each_pair"](q, x, z).item() == pytest.approx(q(x, z).item(), abs=1e-5)


def test_ratio_and_exponent_of_times():
    """Within-round ratios are blind to a slow round; the exponent of planted growth comes out."""
    space = parts_of("17_table9", "ratio", "slope")
    slow = pd.Series([1.0, 7.0, 2.0, 1.0])
    middle, low, high = space["ratio"](3 * slow, slow)
    assert (middle, low, high) == pytest.approx((3, 3, 3))
    assert space["ratio"](slow * [1, 2, 4, 8], slow)[0] == pytest.approx(3) and math.isnan(space["ratio"](slow[:1], slow[:1])[1])
    rows = pd.DataFrame({f"a/{n}": n**2 * slow for n in (100, 1000, 20)} | {f"b/{n}": slow * (1 if n < 100 else n / 100) for n in (10, 100, 1000, 10000)})
    mean, low, high, at, _ = space["slope"](rows, "a")
    assert (mean, low, high) == pytest.approx((2, 2, 2)) and at == [20, 100, 1000]  # by number, not by name
    assert space["slope"](rows, "b", 3)[0] == pytest.approx(1) and space["slope"](rows, "b")[0] < 0.8


def test_scores_of_the_simulation_have_the_sign_of_its_classes():
    """OMIB's Table 4 on the simulation: the score is the distance from the hyperplane that made the classes, on MOSI's scale."""
    space = parts_of("20_omib_tables", "SEVEN", "with_scores")
    from ibma.data import load
    data = load("sim-3", n=500, seed=3)
    found = space["with_scores"](data, 3)
    assert torch.equal(found.target > 0, data.target == 1) and found.task.kind == "regression"
    assert found.target.abs().max() <= 3 and 1.3 < found.target.std() < 1.5  # 1.5 before it is cut
    assert found.splits.keys() == data.splits.keys()
    assert not torch.equal(space["with_scores"](data, 4).target > 0, data.target == 1)  # another seed, another hyperplane


def test_rule_of_stability():
    """Table 8's verdict: inside the margin, outside with a value told apart, too wide."""
    from ibma.verdicts import Verdict
    space = parts_of("18_table8", "GAIN", "verdict_of", Verdict=Verdict)
    means = pd.Series({0.1: 60.0, 0.5: 60.5, 0.9: 60.0})
    table = lambda low, high: pd.DataFrame({"difference": [0.0, (low + high) / 2], "low": [-0.5, low], "high": [0.5, high]}, index=[0.1, 0.9])  # noqa: E731
    assert space["verdict_of"](table(-1.5, 1.7), means, "x").word == "direction only"
    apart = space["verdict_of"](table(-2.5, -0.3), means, "x")
    assert apart.word == "not reproduced" and "η = 0.9 differs" in apart.reason
    assert "too few" in space["verdict_of"](table(-2.5, 0.3), means, "x").reason


def test_the_development_part_is_never_tested():
    """Table 6 chooses on samples that no split tests on."""
    space = parts_of("16_table6", "DEVELOPMENT", "divided")
    from ibma.data import load
    try:
        load("mfeat")
    except (FileNotFoundError, OSError):
        pytest.skip("mfeat is not at hand")
    config = {"data": "mfeat", "splits": 5, "samples": 0, "tested": 0}
    train, valid = space["divided"](config | {"split": -1})
    tests = [space["divided"](config | {"split": s}) for s in range(5)]
    key = lambda part: {tuple(row) for row in torch.cat([part.inputs[k] for k in sorted(part.inputs)], 1).numpy().round(4).tolist()}  # noqa: E731
    developed = key(train) | key(valid)
    assert all(not developed & key(test) and not key(fitted) & key(test) for fitted, test in tests)
    assert sum(len(test) for _, test in tests) + len(train) + len(valid) == len(load("mfeat"))
