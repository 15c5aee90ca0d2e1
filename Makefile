# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Waiting threads must sleep, or any other busy process makes two-thread work many times slower.
export OMP_WAIT_POLICY := passive
export DS_ACCELERATOR ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow lint types bench install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as it is installed: backbones/ and the others inside fmrizoo/.
types: install
	rm -rf build/typed && mkdir -p build/typed/fmrizoo
	ln -s $(CURDIR)/fmrizoo/* build/typed/fmrizoo/
	ln -s $(CURDIR)/backbones $(CURDIR)/objectives $(CURDIR)/recipes build/typed/fmrizoo/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fmrizoo

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/backbones/test_mamba2.py -k transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/heads/test_lora_head.py -k peft
	$(BIN)/python benchmarks/swin4d.py
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/heads.py --precision fp32 bf16
	$(BIN)/python benchmarks/io.py
	$(BIN)/python benchmarks/number_formats.py
	$(BIN)/python benchmarks/ablation_truth.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/engine_ranks.py
	$(BIN)/python benchmarks/planner_aurora.py
	$(BIN)/python benchmarks/planner_memory.py
	$(BIN)/python benchmarks/faults.py

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache
