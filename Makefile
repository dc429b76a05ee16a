# `make` lists the targets. Everything runs from .venv, which `make install` keeps up to date.
.DEFAULT_GOAL := help
.PHONY: help install format lint types layers test test-slow cov smoke bench-smoke demo table4 table8 check clean

# A pyenv shim may exist without its interpreter, so the version is asked, not only the name.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## create .venv and install the package with its tools (again only after changes)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	touch $@

format: install ## format the code and sort imports
	$(BIN)/ruff check --fix --select I . && $(BIN)/ruff format .

lint: install ## ruff, codespell and the size limit of files
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/python scripts/check_file_sizes.py

types: install ## mypy --strict
	$(BIN)/mypy

layers: install ## import-linter: imports go downward only
	$(BIN)/lint-imports

test: install ## tests that need no network and no GPU (under two minutes)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: install ## the slow tests too
	$(BIN)/pytest -m 'not gpu and not network and not smoke'

cov: install ## tests with coverage of cola/
	$(BIN)/pytest --cov=cola --cov-report=term-missing

smoke: install ## two steps of every task with every method on tiny models (five minutes)
	$(BIN)/pytest -m smoke -n auto --maxprocesses 4

bench-smoke: install ## every row of Table 10 on a tiny model, two iterations (half a minute)
	$(BIN)/cola-bench experiment=table10 model=tiny-roberta task.max_length=32 device=cpu \
		bench.batch_sizes=[2] bench.warmup=1 bench.iterations=2 hydra.run.dir=outputs/bench/smoke

demo: install ## FT, LoRA and ColA adapters on digits, offline, one table (about a minute)
	$(BIN)/python scripts/compare.py demo

# Every row of a table is an experiment; OVERRIDES holds for all: OVERRIDES="model=tiny-gpt2 task=synthetic"
rows = $(subst $(eval ) ,$(comma),$(sort $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/$(1)_*.yaml))))
comma := ,

table4 table8: install ## every row of the paper's table of users, then the table (OVERRIDES="...")
	$(BIN)/cola-train -m experiment=$(call rows,$@) $(OVERRIDES)
	$(BIN)/python scripts/user_table.py $(@:table%=%) $(addprefix outputs/,$(subst $(comma), ,$(call rows,$@)))

check: lint types layers test ## what CI runs

clean: ## remove caches and build products (keeps .venv and outputs)
	rm -rf build dist .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find cola tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
