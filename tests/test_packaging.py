"""What is shipped: the contents of wheel and sdist, and the wheel itself, installed away from the checkout and used."""
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and sdist, built from a copy of what git knows (and what it would, once added)."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z", "--", ".", ":!results"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "book" / "_build").mkdir()
    (copy / "book" / "_build" / "page.html").write_text("built")   # must not be shipped
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if not re.match(r"ibma-[\d.]+\.dist-info/", name)}
    expected = {path.relative_to(ROOT).as_posix() for pattern in ("*.py", "py.typed", "data/tokenizers/*/*") for path in (ROOT / "ibma").rglob(pattern)
                if path.is_file() and "__pycache__" not in path.parts}
    assert inside == expected and "ibma/py.typed" in inside and any("tokenizers" in name for name in inside)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert f"Version: {PROJECT['version']}" in metadata and all(f"Provides-Extra: {extra}" in metadata for extra in ("gpu", "media", "book", "dev", "all"))
    assert any(name.endswith("licenses/LICENSE") or name.endswith("LICENSE") for name in names)
    entry = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    assert "ibma = ibma.cli:main" in entry
    assert wheel.stat().st_size < 5_000_000


def test_the_sdist_holds_the_sources_of_book_and_tests_but_nothing_built(built):
    [sdist] = built.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    for wanted in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "settings.ini", "pyproject.toml", "nbs/1_bound/03_ib_bound.ipynb", "tests/test_ibb.py",
                   "tests/data/test_meld.py", "book/_toc.yml", "book/reference/README.md", "data_prep/meld/prepare.py", "ibma/data/core.py"):
        assert wanted in names or not (ROOT / wanted).exists(), wanted
    assert not [name for name in names if re.search(r"_build|_staged|_generated|__pycache__|\.runs|\.venv|^results/", name)]


def test_citation_workflows_and_container_agree_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"] and citation["license"] == PROJECT["license"]["text"] and citation["cff-version"] == "1.2.0"
    named = {f"{author['family-names']}, {author['given-names']}" for author in citation["preferred-citation"]["authors"]}
    entry = re.search(r"@misc\{wang2026ibma,\s*author = \{(.*?)\}", (ROOT / "book/references.bib").read_text())[1]
    assert named == set(entry.split(" and "))
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        content = yaml.safe_load(workflow.read_text())
        assert content["jobs"] and all("timeout-minutes" in job for job in content["jobs"].values() if "steps" in job and len(job["steps"]) > 1), workflow
        targets = set(re.findall(r"\bmake ([a-z]+)", workflow.read_text()))
        assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)), targets
    docker = (ROOT / "Dockerfile").read_text()
    extras = re.search(r'"\.\[(.*?)\]"', docker)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())


def test_all_is_every_extra_but_the_one_that_needs_a_gpu():
    extras = PROJECT["optional-dependencies"]
    named = re.search(r"ibma\[(.*)\]", extras["all"][0])[1].split(",")
    assert set(named) == set(extras) - {"all", "gpu"}


def imported_by(code, **env):
    """Modules that are loaded after some code, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_costs_nothing_but_what_is_used():
    assert not {"torch", "numpy"} & imported_by("import ibma")
    assert "torch" not in imported_by("import ibma.data, ibma.methods, ibma.runs")
    heavy = {"transformers", "datasets", "matplotlib", "pandas", "sklearn", "faiss", "accelerate", "optuna", "torchvision", "scipy"}
    assert not heavy & imported_by("from ibma.objective import IBBLoss")
    assert not {"transformers", "datasets", "matplotlib", "faiss", "optuna", "torchvision"} & imported_by("from ibma.data import MultimodalData; from ibma.training import fit; from ibma.methods import create")


def test_wherever_an_extra_is_named_it_exists():
    for path in [*(ROOT / "ibma").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "book").glob("*.md")]:
        for extra in re.findall(r"""ibma\[([\w,]+)\]""", path.read_text()):
            assert set(extra.split(",")) - {"extra"} <= set(PROJECT["optional-dependencies"]), (path, extra)


@pytest.mark.slow
def test_the_installed_wheel_works(built, tmp_path):
    """Installed into a folder of its own, with the checkout out of reach: all modules import, the README's example and the command run."""
    [wheel] = built.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    # the editable install of the checkout answers to the same name: a path comes before its finder
    code = (f"import importlib, pkgutil, ibma\nassert ibma.__file__.startswith({str(site)!r}), ibma.__file__\n"
            "for m in pkgutil.walk_packages(ibma.__path__, 'ibma.'): importlib.import_module(m.name)\nprint('all imported')")
    prepare = "from ibma.encoders import declare_torchvision_operators as d; d()\n"
    done = subprocess.run([sys.executable, "-c", prepare + code], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "all imported" in done.stdout, done.stderr[-2000:]
    readme = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S))
    readme = readme.split("from ibma.objective import IBBLoss")[0]   # what follows shows lines of the reader's own loop
    done = subprocess.run([sys.executable, "-c", readme], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    command = [sys.executable, "-m", "ibma.cli"]
    for argv in (["--version"], ["train", "digits", "--epochs", "1", "--dim", "8", "--out", "m.safetensors", "-q"], ["predict", "m.safetensors", "digits", "--part", "test"]):
        done = subprocess.run([*command, *argv], cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
