"""The benchmarks run, compare what they say they compare, and (slow) meet their aims with room for a busy machine."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_take_turns_and_the_first_round_does_not_count(speed):
    calls = []
    found = speed.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert calls == ["a", "b"] * 4 and {name: len(v) for name, v in found.items()} == {"a": 3, "b": 3}
    assert speed.ratio({"x": [2, 9, 4], "y": [1, 3, 2]}, "x", "y") == 2


@pytest.mark.parametrize("modalities", [2, 3])
def test_the_literal_form_is_the_bound_with_its_constant_and_has_its_gradient(speed, modalities):
    from ibma.objective import IBBLoss
    n, classes, dim = 30, 5, 8
    z, fused, labels, inputs = speed.problem(n, classes, dim, modalities)
    loss = IBBLoss(classes, tuple(z), dim)
    for _ in range(2):
        loss.observe(z, fused, labels)
        loss.refresh()
    literal = speed.Literal(loss, inputs, labels)
    leaves = [*z.values(), fused]
    slow, fast = torch.autograd.grad(literal(z, fused), leaves), torch.autograd.grad(loss(z, fused, labels), leaves)
    assert max(g.abs().max() for g in fast) > 1e-3
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_all_pairs_are_the_closed_form_of_club_up_to_its_authors_average(speed):
    from ibma.mi_estimators import VCLUB
    torch.manual_seed(0)
    x, z, club = torch.randn(20, 6), torch.randn(20, 4), VCLUB(6, 4, 8)
    torch.testing.assert_close(speed.all_pairs_club(club, x, z), club.value(x, z), atol=1e-4, rtol=1e-4)


def test_counts_are_those_of_the_products(speed):
    n, classes, dim = 16, 5, 8
    z, fused, _, _ = speed.problem(n, classes, dim, 2)
    found = speed.memory(speed.products(z, fused, classes)["products, bare"])
    assert found["flop"] == 2 * n * classes * (6 * dim + 4 * classes)
    assert found["peak_bytes"] >= 4 * n * dim


@pytest.mark.parametrize("part", ["terms", "refresh", "scaling", "seeds"])
def test_every_part_runs_and_leaves_the_others_alone(speed, part, tmp_path, capsys):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"other": 1}))
    threads = torch.get_num_threads()
    try:
        speed.main(["--quick", "--parts", part, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    assert record["other"] == 1 and record[part]["rows"] and record[part]["machine"]["threads"] == 1 and record[part]["machine"]["commit"]
    assert "written to" in capsys.readouterr().out


def test_unknown_parts_are_refused(speed, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--parts", "everything"])
    assert "everything" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bound_costs_hardly_more_than_its_products(speed):
    chosen = {name: f for name, (f, _) in speed.forms(**speed.BASE).items() if name in ("products", "paper", "tight", "literal")}
    found = speed.take_turns(chosen, 5)
    for form in ("paper", "tight"):
        assert min(found[form]) < 2 * min(found["products"]), sys.argv
    assert min(found["literal"]) > 15 * min(found["paper"])
