"""Does the built wheel run every page of the book, in a fresh environment and away from the checkout? Run by `make wheel`.

    python tests/wheel.py [--python python3.12] [--torch "torch==2.6.0"] [--pages nbs/7_guides ...] [--jobs 2]

Builds the wheel, installs it with all extras into an environment of its own (with whatever versions pip finds), and executes the pages with
nbdev_test in a copy of the notebooks and results that has no folder `ibma`. Downloads packages: not part of `make test`.
"""
from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("nbs", "book", "results", "data_prep", "settings.ini", "pyproject.toml", "README.md")   # what pages read; not the package


def run(*command, **options):
    print("==", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", default="torch", help="requirement, with pip's options")
    parser.add_argument("--pages", nargs="*", default=["nbs"])
    parser.add_argument("--jobs", default="2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, env = Path(folder) / "work", Path(folder) / "env"
        work.mkdir()
        # from a copy: setuptools would leave folders in the checkout, and take in what an earlier build left there
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        source = Path(folder) / "source"
        for name in filter(None, listed):
            copies = [source] * (not name.startswith("results/")) + [work] * (name.split("/")[0] in COPIED)
            for to in copies if (ROOT / name).is_file() else ():
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, to / name)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", folder, source, stdout=subprocess.DEVNULL)
        shutil.rmtree(source)
        run(args.python, "-m", "venv", env)
        pip, [wheel] = (env / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"), Path(folder).glob("*.whl")
        run(*pip, *shlex.split(args.torch))
        # torch again: what else is installed must not exchange it for another version
        run(*pip, f"{wheel}[all]", shlex.split(args.torch)[0])
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "VIRTUAL_ENV"))}
        clean |= {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
        run(env / "bin/python", "-c", "import ibma, sys, torch; assert ibma.__file__.startswith(sys.prefix), ibma.__file__; print(sys.version.split()[0], torch.__version__)", cwd=work, env=clean)
        run(env / "bin/ibma", "--version", cwd=work, env=clean)
        for pages in args.pages:
            run(env / "bin/nbdev_test", "--path", pages, "--n_workers", args.jobs, cwd=work, env=clean)
    print("== the wheel runs", *args.pages)


if __name__ == "__main__":
    main()
