"""The public surface: every module imports, names what it exports, and documents it."""
import ast
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pytest

import ibma

MODULES = sorted(m.name for m in pkgutil.walk_packages(ibma.__path__, "ibma.") if not m.name.rsplit(".", 1)[1].startswith("_"))


@pytest.mark.parametrize("name", MODULES)
def test_everything_exported_exists_and_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_without_warnings(name):
    path = importlib.util.find_spec(name).origin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(Path(path).read_text(), path, "exec")


PROMISED = {
    "ibma.information": "entropy kl_divergence mutual_information",
    "ibma.assignments": "class_centroids log_assignments assignment_table",
    "ibma.ibb": "compression alignment ibb ibb_fused tight_ibb tight_ibb_fused ib_loss ib_loss_fused",
    "ibma.objective": "IBBLoss",
    "ibma.data": "MultimodalData load DATASETS",
    "ibma.methods": "METHODS create",
    "ibma.training": "fit TrainingConfig Result",
    "ibma.estimator": "MultimodalClassifier MultimodalArrays",
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_promised_names_are_there(name):
    module = importlib.import_module(name)
    for public in PROMISED[name].split():
        assert hasattr(module, public), f"{name}.{public}"


def test_signatures_others_call():
    """The names of arguments are part of the interface."""
    from ibma import assignments, ibb, information, objective, training

    expected = {
        information.entropy: "p dim", information.kl_divergence: "p q dim", information.mutual_information: "joint",
        assignments.class_centroids: "features targets", assignments.log_assignments: "z centroids temperature normalize present",
        assignments.assignment_table: "phi targets", ibb.compression: "log_phi_x log_prior", ibb.alignment: "log_phi log_phi_other log_q",
        ibb.ibb: "log_phi log_phi_x log_phi_other log_prior log_q", ibb.tight_ibb: "log_phi log_phi_other log_q",
        ibb.tight_ibb_fused: "log_phi targets log_q log_marginal num_modalities", ibb.ib_loss: "phi phi_x phi_other",
        objective.IBBLoss.forward: "self z fused targets mask", objective.IBBLoss.observe: "self z fused targets mask", objective.IBBLoss.refresh: "self",
        training.fit: "method train valid config",
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names.split(), function.__qualname__
    options = inspect.signature(objective.IBBLoss).parameters
    assert {"num_classes", "modalities", "dim", "bound", "multi_label", "temperature", "normalize", "prototypes", "table", "refresh"} <= set(options)


# ---- the frozen list: what may not change without a new version ------------------------------------------------------------

FROZEN = Path(__file__).with_name("public_api.txt")
OFFERED = ["assignments", "anomaly", "data", "data.core", "encoders", "estimator", "fusion", "gradcam", "ibb", "information", "integrations", "many", "methods", "methods.base", "methods.semi", "metrics", "mi_estimators",
           "model", "model_files", "objective", "probing", "representations", "runs", "selection", "significance", "tables", "training", "verdicts"]


def named_in_code_that_runs():
    """Words in the pages' own code (not in what they export) and in the tests."""
    root, words = Path(__file__).resolve().parents[1], set()
    for path in (root / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not re.match(r"#\s*\|\s*(export|eval: false)", source):
                words |= set(re.findall(r"[A-Za-z_]\w*", source))
    for path in (root / "tests").rglob("*.py"):
        words |= {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)} | {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return words


def surface():
    """One line per function and class of the offered modules, with its parameters, as far as an example of it runs."""
    known, lines = named_in_code_that_runs(), []
    for module in (f"ibma.{name}" for name in OFFERED):
        found = importlib.import_module(module)
        for public in getattr(found, "__all__", None) or ["METHODS", "create"]:
            value = getattr(found, public)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module and public in known:
                try:
                    parameters = ", ".join(inspect.signature(value).parameters)
                except ValueError:
                    parameters = "..."
                lines.append(f"{module}.{public}({parameters})")
    return lines


def test_nothing_of_the_frozen_list_is_gone_or_changed():
    """A name or a parameter may be added at the end. To change one: raise the version, note it in CHANGELOG.md, and run `python tests/test_api.py`."""
    now = {line.split("(")[0]: line.split("(", 1)[1].rstrip(")").split(", ") for line in surface()}
    for line in FROZEN.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, parameters = line.split("(")[0], line.split("(", 1)[1].rstrip(")").split(", ")
        assert name in now, f"{name} is gone, or no page and no test names it any more"
        kept = [p for p in now[name] if p in parameters]
        assert kept == parameters or parameters == ["..."], f"{name} took ({', '.join(parameters)}), now ({', '.join(now[name])})"


def test_every_frozen_name_is_in_the_reference():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book"))
    import api_reference as reference
    for line in FROZEN.read_text().splitlines():
        if not line.startswith("#"):
            module, name = line.split("(")[0].rsplit(".", 1)
            assert name in reference.public_names(module) and reference.part_of(module), line


if __name__ == "__main__":
    FROZEN.write_text("# The public interface: names and parameters that others may rely on. Written by `python tests/test_api.py`; tests/test_api.py keeps the package to it.\n" + "\n".join(surface()) + "\n")
