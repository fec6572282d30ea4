"""The public surface: every module imports, names what it exports, and documents it."""
import importlib.util
import inspect
import pkgutil
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
