# make demo          a service, and a whole run on text that every installation has, on CPU, in minutes
# make test          the test suite
# make docs          writes the reference pages again and builds build/docs, with every link checked
# make check         what CI does: lint, types, import contracts, tests
# make test-chaos    kills everything at seeded moments (CHAOS_SEEDS=30 times where machines come and go: half an hour)
# make test-cluster  ray up, for real, a quarter of an hour; as root, with Debian's openssh-server, iproute2 and rsync

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests of seconds gain nothing from threads, and results are compared bit for bit with workers that have one each.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo test test-chaos test-cluster check lint unit docs bench clean

demo: $(INSTALLED)
	@$(BIN)/moedisco demo runs

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 -m "not ray and not chaos and not cluster"
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m "ray and not chaos and not cluster"

test-chaos: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m chaos

test-cluster: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m cluster

unit: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 tests/unit -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test

docs: $(INSTALLED)
	$(BIN)/python -m docs.generate
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run_all

$(INSTALLED): pyproject.toml
	@echo "installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
