# The two commands are `make book` and `make test`; `make help` lists the rest.
# On a machine with several Pythons: make PYTHON=python3.12 book

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INDEX := _build/html/index.html
PORT ?= 8000
JOBS ?= 2
EXTRAS := .[book,test]
TORCH := $(shell grep '^torch==' constraints.txt)
SOURCES := $(shell find book dmd data/results -type f -not -path '*/.*' -not -path '*/__pycache__/*' 2>/dev/null)

# $(call step,what,command): one line before the command, one after it with the time it took.
step = @echo "== $(1) ..."; start=$$(date +%s); $(2) \
  && echo "== $(1): $$(($$(date +%s) - start)) s" \
  || { echo "== $(1): FAILED after $$(($$(date +%s) - start)) s"; exit 1; }

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test notebooks repository serve clean lint types pairs tests chapters browser

help:
	@echo 'make book        build the book into _build/html'
	@echo 'make test        everything that has to hold: style, types, pairs, tests, chapters, book'
	@echo 'make serve       show the book at http://localhost:$(PORT) (make PORT=9000 serve)'
	@echo 'make notebooks   bring book/NN_name.md and .ipynb into agreement (FROM=md or FROM=ipynb)'
	@echo 'make repository  URL=https://github.com/you/yours: point the book at your own copy'
	@echo 'make clean       remove what was built, but not .venv'

book: $(VENV)/installed
	@rm -rf _build
	@$(MAKE) --no-print-directory $(INDEX)
	@echo "The book: $(CURDIR)/$(INDEX)"

test: lint types pairs tests chapters
	@$(MAKE) --no-print-directory book browser

# The environment. torch is named with its pin in every call: see constraints.txt.
$(VENV)/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer: name one that is, as in" \
	    "'make PYTHON=python3.12 book'" >&2; exit 1; }
	$(call step,venv,$(PYTHON) -m venv $(VENV))
	$(call step,torch,$(BIN)/pip install --quiet -c constraints.txt setuptools wheel $(TORCH))
	$(call step,everything else,$(BIN)/pip install --quiet -c constraints.txt \
	  --no-build-isolation $(TORCH) --editable '$(EXTRAS)')
	@touch $@

# A strict build: warnings are errors, references are checked, every chapter is executed.
$(INDEX): $(SOURCES) _config.yml _toc.yml $(VENV)/installed
	$(call step,book,OMP_NUM_THREADS=1 $(BIN)/jupyter-book build -W -n --keep-going .)

lint: $(VENV)/installed
	$(call step,ruff,$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .)

types: $(VENV)/installed
	$(call step,mypy,$(BIN)/mypy)

pairs: $(VENV)/installed
	$(call step,pairs,$(BIN)/python tools/pairs.py --check)

tests: $(VENV)/installed
	$(call step,tests,OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) tests \
	  --ignore tests/browser)

chapters: $(VENV)/installed
	$(call step,chapters,OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --nbmake \
	  --nbmake-kernel=python3 --nbmake-timeout=120 book)

# The built pages in Chromium; skipped with a reason where there is none.
browser: $(INDEX)
	$(call step,browser,$(BIN)/pytest -q -rs -n $(JOBS) tests/browser)

notebooks: $(VENV)/installed
	@$(BIN)/python tools/pairs.py $(if $(FROM),--from $(FROM))

repository:
	@$(PYTHON) tools/set_repository.py $(URL)

serve: $(INDEX)
	@echo "The book: http://localhost:$(PORT) (Ctrl-C ends it)"
	@$(BIN)/python -m http.server --bind localhost --directory _build/html $(PORT) >/dev/null

clean:
	rm -rf _build .pairs.json .pytest_cache .ruff_cache .mypy_cache
