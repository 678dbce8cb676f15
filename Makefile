# `make demo` and `make test` need Python 3.11 or later, pip and make; they set up what is missing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two processes share the test files; every test computes on one thread.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.installed

.PHONY: demo ablation-demo test test-server test-browser test-latex test-full lint bench clean

demo: $(INSTALLED)
	$(BIN)/ditbench compare --config digits

# Every block x 2 and 5 head layers, 2 seeds: 26 runs. Evaluated twice each, as evaluations take half of the time.
ablation-demo: $(INSTALLED)
	$(BIN)/ditbench ablate --config digits --method vae_repa --grid.block all --grid.head_layers 2,5 \
	  --seeds 0,1 --evaluation.points 2 --workers 2

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SHARED) -m "not full and not server and not browser and not latex"

# Needs the binaries of PostgreSQL (Debian: postgresql), and fails without them.
test-server: $(INSTALLED)
	$(BIN)/python -m pytest -m server

# Reports in a real browser; what it saw stays in build/screenshots. Needs Chromium (Debian: chromium), and fails without.
test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser tests/browser

# Tables of reports in a document. Needs pdflatex with booktabs (Debian: texlive-latex-base texlive-latex-recommended).
test-latex: $(INSTALLED)
	$(BIN)/python -m pytest -m latex tests/latex

# The kill and fuzz tests at their whole numbers, and those that need a server, a browser or LaTeX, as well.
test-full: $(INSTALLED)
	DITBENCH_FULL=1 $(BIN)/python -m pytest $(SHARED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tables of docs/performance.md, and build/bench.json. `make bench BENCH="training_step loader"` runs those alone.
bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(BENCH)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
