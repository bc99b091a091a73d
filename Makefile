# Each target is complete on a fresh machine with Python 3.11, make and network: it makes .venv and installs what it
# needs. A stamp per set of extras keeps the second call quick; pyproject.toml decides when it is out of date.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
TEST_FLAGS ?=
# One worker a core, one thread a worker: `TEST_FLAGS="-n 0"` runs everything in one process.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist worksteal
OUT ?= runs/quickstart
JOBS ?= 2

# The oldest versions that pyproject.toml allows, in an environment of their own, and what is run there: merging,
# refining, saving and loading, transformers, proxies.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/test_oldest.py tests/pleas/network/test_counting.py tests/pleas/test_merge.py \
	tests/pleas/refine/test_refine.py tests/pleas/test_transformers.py tests/datafree/artefact/test_save_load.py \
	tests/datafree/test_pipeline.py tests/datafree/proxy/test_build.py tests/datafree/proxy/kinds/test_diffusion.py \
	tests/datafree/proxy/kinds/test_inversion.py

.PHONY: help quickstart test test-all test-oldest lint types format docs evidence clean

help:
	@echo "make quickstart   merge two digit networks from inverted images alone; table, artefact and report in $(OUT)"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-all     every test"
	@echo "make test-oldest  the tests of what is promised of the oldest versions that pyproject.toml allows"
	@echo "make lint types   ruff and pyright"
	@echo "make docs         the generated pages, and the documentation as a site in site/"
	@echo "make format       let ruff format the sources"
	@echo "make evidence     every published table and every grid of recipes/ablations again; hours, goes on where it stopped"

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/datafree merge recipes/quickstart.yaml --out $(OUT) --overwrite

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(TEST_FLAGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) $(TEST_FLAGS)

test-oldest: $(OLDEST)/.installed
	DATAFREE_OLDEST=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(OLDEST)/bin/python -m pytest -n auto --dist worksteal \
		-m "not slow" $(TEST_FLAGS) $(OLDEST_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m datafree.docs
	$(BIN)/mkdocs build --strict

# A grid that lost a cell does not keep the others from running; make fails in the end.
evidence: $(VENV)/.installed-quickstart
	$(BIN)/python -m benchmarks.propagate --groups resnet20,halves,mnist_usps,resnet20_other,mnist_mnistm,mnist_mnistm_heads,usps_mnist_mnistm \
		--images inverted --count 512 --budgets 1,1.25,1.5 --seeds 0 --name propagate
	$(BIN)/python -m benchmarks.propagate --groups resnet20_three --images public --count 512 --budgets 1,1.5,2,3 \
		--seeds 0 --name propagate_three
	$(BIN)/python -m benchmarks.propagate --groups imagenet_mobilenet --images real --count 384 --budgets 1 \
		--seeds 0 --name propagate_imagenet
	failed=; for grid in recipes/ablations/*.yaml; do \
		$(BIN)/datafree ablate $$grid -o runs/evidence/$$(basename $$grid .yaml) --jobs $(JOBS) || failed="$$failed $$grid"; \
	done; [ -z "$$failed" ] || { echo "not finished:$$failed"; exit 1; }

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "datafree needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[$*]'
	touch $@

$(OLDEST)/.installed: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
		-c $(OLDEST)/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
