# Everything works in .venv, which the first command that needs it makes. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV   ?= .venv
BENCH  ?= --quick
TESTS  ?= tests
GPU    ?= --stage check
# Processes that share the tests. Kernels use all cores in each of them, so more do not help.
WORKERS ?= 2
# pip prefers the CPU wheel (2.13.0+cpu) to the index's own, which brings gigabytes of CUDA; an index that cannot be
# reached costs a second. With a GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup build test test-all test-transformers sanitize avx512 lint bench gpu demo readme readme-figures clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make .venv with everything that tests, lint and bench need

$(VENV)/.installed: constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "fastllm needs Python 3.10 or newer, which '$(PYTHON)' is not. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  || echo "'$(PYTHON)' has no Python.h, which the C++ kernels need. On Debian and Ubuntu: apt-get install python3-dev"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the tools of constraints-dev.txt into $(VENV); this takes a minute or more"
	@$(PIP) install -qq --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints-dev.txt)"
	@$(PIP) install -qq -r constraints-dev.txt
	@touch $@

build: $(VENV)/.built ## compile the C++ kernels and install the package, editable

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	  || echo "No C++ compiler: building without the CPU kernels, everything runs on plain PyTorch. On Debian and Ubuntu: apt-get install g++"
	$(PIP) install -q --no-build-isolation --no-deps --editable .
	@touch $@

test: build ## the fast tests: CPU only; 9 to 13 minutes on two threads of a Zen 3
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist worksteal -m "not slow"

test-all: build ## the slow tests too
	$(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist worksteal

TRANSFORMERS ?= 5.17 5.18 5.19 5.20 5.21 5.22 5.23
test-transformers: build ## Hugging Face's tests beside several versions of transformers; TRANSFORMERS="5.19" chooses
	$(BIN)/python tests/transformers_versions.py $(TRANSFORMERS)

# A build of its own beside the installed one; `pytest` alone does not put the folder it is called in before it.
SANITIZED := build/sanitized
EMULATED := build/emulated
SANITIZE_TESTS ?= $(patsubst %,tests/test_%.py,attention attention_threads varlen kvcache norm softmax cross_entropy linear_cross_entropy activation rope linear weight_only optim)
sanitize: setup ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	FASTLLM_SANITIZE=address,undefined FASTLLM_REQUIRE_EXTENSION=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  $(BIN)/pytest $(SANITIZE_TESTS) -m "not slow" -k "cpu and not opcheck and not compile"

avx512: setup ## the kernel tests of AVX-512, emulated on a CPU that has AVX2 alone
	FASTLLM_EMULATE=1 FASTLLM_REQUIRE_EXTENSION=1 $(BIN)/python setup.py -q build --build-lib $(EMULATED)
	PYTHONPATH=$(EMULATED) $(BIN)/pytest $(SANITIZE_TESTS) -m "not slow" -k "avx512 and not opcheck and not compile"

lint: setup ## ruff and clang-format, without changing anything
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

bench: build ## ratios against PyTorch into report/bench; BENCH="attention --full" chooses
	$(BIN)/fastllm bench $(BENCH) --out report/bench

gpu: ## on a GPU machine: correctness, ceilings, bars, into bench/results; GPU="--stage tune|accept --budget 510" chooses
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) -m fastllm.bench.gpu $(GPU)

demo: build ## the main job: verify the kernels, train on real text with and without them, write report/index.html
	$(BIN)/fastllm demo

readme: build ## refresh what the README takes from the code, report/demo.json and the reports in bench/results
	$(BIN)/python -m fastllm.bench.readme

readme-figures: readme ## the same; the README's figures are drawn from the committed reports, light and dark

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info fastllm/_C.*.so fastllm/_cuda.so fastllm/_autograd.so fastllm/_build_info.json $(VENV)/.built report .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
