# make quickstart: the whole method on real images, and a report.  make test: everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart
BENCH_DIR ?= runs/bench
GPU_DIR ?= runs/gpu-$(shell date +%Y%m%d-%H%M%S)
GPU_SECONDS ?= 600
CAMPAIGN_DIR ?= runs/campaign
SEED ?= 0
MINUTES ?= 10
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
SAVED ?= runs/bench/saved.json
AOT_DIR ?= runs/aot
TRITONS ?= 3.5.0 3.6.0 newest

.PHONY: quickstart test lint docs matrix release release-check bench bench-full bench-compare gpu campaign aot-matrix clean
.DELETE_ON_ERROR:

# One environment for users, tests and benchmarks; made again when the project's requirements change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test,bench]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/gif quickstart --output $(RUN_DIR)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core, each of one thread: many of the tests are small, and threads of several processes would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# The documentation as a site, in runs/site. A link, an anchor or a public name that leads nowhere is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open runs/site/index.html, or: $(BIN)/mkdocs serve"

# An environment for each pair of PyTorch and Triton, oldest and newest packages, each Python at hand; gigabytes and an hour
# each. To choose: MATRIX="--only torch-2.9-oldest --steps interpreter gif"; MATRIX=--list says what there is.
matrix: $(VENV)/.installed
	$(BIN)/python -m tools.matrix $(MATRIX)

# RELEASING.md: sdist and wheel in dist/, tried in clean environments. release writes version and changelog's heading first.
release release-check: $(VENV)/.installed
	$(BIN)/python -m tools.release $(VERSION) $(if $(filter release-check,$@),--check) $(RELEASE_FLAGS)

# Small sizes, minutes; bench-full: the whole grid. Each writes a report; bench-compare says what became slower since SAVED.
bench bench-full: $(VENV)/.installed
	mkdir -p $(BENCH_DIR)
	$(BIN)/python -m pytest benchmarks --benchmark-only -q --benchmark-json=$(BENCH_DIR)/$@.json $(if $(filter bench-full,$@),--full)
	$(BIN)/python -m benchmarks.report $(BENCH_DIR)/$@.json --output $(BENCH_DIR)

bench-compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare $(SAVED) $(BENCH_DIR)/bench.json

# Every kernel for every target, with each Triton that is supported: a Triton in a folder before the environment's own, since
# the kernels need PyTorch only for its dtypes. All are tried, whatever fails. To choose: AOT_FLAGS="--target sm_90".
aot-matrix: $(TRITONS:%=$(AOT_DIR)/triton-%/triton)
	status=0; for version in $(TRITONS); do \
		PYTHONPATH=$(CURDIR)/$(AOT_DIR)/triton-$$version:$(CURDIR) $(BIN)/python -m gif_kernels.aot \
			--json $(AOT_DIR)/$$version.json $(AOT_FLAGS) || status=1; \
	done; exit $$status

$(AOT_DIR)/triton-%/triton: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton$(if $(filter-out newest,$*),==$*)

# Everything that a GPU can say, in minutes, without installing anything: see docs/gpu.md.
gpu:
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu --seconds $(GPU_SECONDS) --output $(GPU_DIR)

# Damaged files, kills before each write, two commands on one output, planted code: by SEED, for MINUTES; it goes on where it was.
campaign: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.campaign --seed $(SEED) --minutes $(MINUTES) --output $(CAMPAIGN_DIR)

clean:
	rm -rf $(VENV) runs
