# Two commands on a fresh machine: `make demo` and `make test`. Both make the same environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROMPT ?= a small red circle left of a large blue square

# Two workers on one thread each: OpenMP threads that spin for each other are what makes a suite slow on two cores.
.PHONY: demo test lint format clean

# torch comes first and pinned, so that nothing after it chooses another build.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "== environment: $(VENV) (about 2.6 GB with every backend)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/edgegen student pack --output demo/shapes.pt
	$(BIN)/edgegen build --target iphone15,linux-x86 --output demo demo/shapes.pt
	$(BIN)/edgegen run demo/linux-x86 --prompt "$(PROMPT)" --seed 7 --steps 4 --output demo/picture.png
	@echo "== drawn by a built bundle on this machine: demo/picture.png"
	@echo "== for the phone: demo/iphone15 (open demo/iphone15/report.html)"

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo build dist .mypy_cache .pytest_cache .ruff_cache
