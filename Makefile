# Everything runs in .venv, made on first use from the pinned versions in constraints.txt.
# Paths are relative and quoted nowhere else, so a checkout below a folder with a space works.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test notebooks lab bench lint clean

quickstart: $(VENV)/.core
	$(RUN) -m training quickstart digits --out runs/quickstart-digits

test: $(VENV)/.test
	$(RUN) -m pytest -n auto

notebooks: $(VENV)/.notebooks
	$(RUN) -m jupytext --sync --execute analysis_notebooks/*.py

lab: $(VENV)/.notebooks
	$(RUN) -m jupyterlab analysis_notebooks

# Speed of the experts and of the trainer, and accuracy of the relative entropy on a few laws whose answer is known.
bench: $(VENV)/.test
	$(RUN) benchmarks/experts.py --out runs/experts-speed
	$(RUN) benchmarks/trainer.py
	$(RUN) benchmarks/relative_entropy_accuracy.py --laws gauss-3 uniform-3 --out runs/relative-entropy-accuracy

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) -e ".[test,diffusers,text,hub]"
	touch $@ $(VENV)/.core

$(VENV)/.notebooks: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) -e ".[notebooks]"
	touch $@ $(VENV)/.core

$(VENV)/.dev: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.core
