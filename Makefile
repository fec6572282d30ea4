# Everything runs in the environment .venv, which the first command creates. PYTHON is any Python >= 3.11 with pip.
# TORCH may name another build, for instance TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
PROFILE ?= smoke
JOBS    ?= 2
BIN     := .venv/bin
# Named after the content of what it depends on: nbdev touches pyproject.toml without changing it
STAMP   := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
HTML    := book/_build/html/index.html

# One thread per process: several processes run at once, and sums do not depend on the number of threads.
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED  ?= 0
export HF_HUB_OFFLINE  ?= 1

.PHONY: help setup test lint sync unit notebooks book reproduce stage html check-book bench wheel readme serve clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## create the environment in .venv

$(STAMP):
	@echo "== creating the environment in .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first: what depends on it would otherwise choose the build
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH)
	@# constraints.txt names every package, so there is nothing to resolve
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@rm -f .venv/.installed*; touch $@

test: setup lint sync unit notebooks  ## lint, notebooks in step with modules, pytest, every notebook executed
	@echo "== all tests passed"

lint: setup
	@echo "== ruff"
	$(BIN)/ruff check .

sync: setup
	@echo "== notebooks, modules, README and table of contents in step"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/sync.py
	$(BIN)/python book/stage.py --check-readme
	$(BIN)/python book/stage.py --check-toc

notebooks: setup
	@echo "== notebooks as tests"
	PATH="$(CURDIR)/$(BIN):$$PATH" timeout 1800 $(BIN)/nbdev_test --n_workers $(JOBS)

unit: setup
	@echo "== pytest"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not cuda and not book"

book: setup reproduce stage html check-book  ## run the experiments of a profile and build the book
	@echo "== the book is at $(CURDIR)/$(HTML)"

reproduce: setup  ## run the experiment notebooks: PROFILE=smoke|cpu|paper TABLE=2 DATA=/raw/files JOBS=2 DRY=1
	@echo "== experiments, profile $(PROFILE)"
	$(if $(DATA),IBMA_DATA=$(abspath $(DATA)) )$(BIN)/ibma reproduce --profile $(PROFILE)$(foreach table,$(TABLE), --table $(table))$(if $(filter command% environment%,$(origin JOBS)), --jobs $(JOBS))$(if $(DRY), --dry-run)

stage: setup
	@echo "== executing the pages"
	$(BIN)/python book/stage.py --profile $(PROFILE)
	$(BIN)/python book/gallery.py
	$(BIN)/python book/api_reference.py

html: setup
	@echo "== building the book"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-book build book --all -W -n --keep-going -q

check-book: setup
	@echo "== checking the built book"
	$(BIN)/python -m pytest -m book tests/test_book.py

bench: setup  ## measure speed and memory again (half an hour); writes results/bench.json
	$(BIN)/python benchmarks/speed.py

wheel: setup  ## build the wheel and run every page with it in a fresh environment: PYTHON=python3.12 TORCH="torch==2.6.0"
	$(BIN)/python tests/wheel.py --python $(PYTHON) --torch "$(TORCH)" --jobs $(JOBS)

readme: setup  ## regenerate README.md from nbs/index.ipynb
	$(BIN)/python book/stage.py --readme

serve: setup  ## serve the built book on http://localhost:8000
	$(BIN)/python -m http.server 8000 --directory book/_build/html

clean:  ## remove what was built; keeps the environment and all results
	rm -rf book/_build book/_staged book/_generated build dist *.egg-info
