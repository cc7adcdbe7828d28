# make demo: from a fresh clone to a transferred model and its report.  make test: everything CI checks.
PYTHON ?= python3
VENV ?= .venv
VISION ?= .venv-vision
PIP = -m pip install --quiet --disable-pip-version-check
SEED ?= 0

.PHONY: demo test test-vision lint types claims docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/headstart fit digits --labels-per-class 10 --seed $(SEED) --out runs/digits

test: lint types
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

# timm and torchvision need torch's full build, so they get an environment of their own.
test-vision: $(VISION)/.installed
	OMP_NUM_THREADS=1 $(VISION)/bin/python -m pytest -q tests/zoo/test_timm.py tests/run/test_merging_timm.py tests/merge/test_tleg.py

lint: $(VENV)/.developing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.developing
	$(VENV)/bin/mypy

claims: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(VENV)/bin/headstart claims check --all --out src/headstart/claims/verdicts

docs: $(VENV)/.developing
	$(VENV)/bin/python docs/build.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headstart needs python >= 3.11; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing headstart and PyTorch into $(VENV); a few minutes the first time."
	$(VENV)/bin/python $(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(VENV)/bin/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VISION)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python $(PIP) -e '.[vision,text,test]'
	@touch $@

clean:
	rm -rf $(VENV) $(VISION) runs build dist
