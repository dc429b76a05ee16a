# `make` lists the targets. Everything runs from .venv, which `make install` keeps up to date.
.DEFAULT_GOAL := help
.PHONY: help install format lint types layers test test-slow cov smoke bench-smoke demo check clean

# A pyenv shim may exist without its interpreter, so the version is asked, not only the name.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

help: ## list the targets
	@grep -hE '^(# )?[a-z0-9. -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^(# )?([a-z0-9. -]+):.*## /\2\t/' | expand -t 22

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

# The paper's rows (cola/grid.py). Each target goes on where it was stopped, reports what failed and
# then prints what there is. OVERRIDES holds for all rows, for example
# OVERRIDES="seed=0,1,2 hydra/launcher=parallel" or OVERRIDES="model=tiny-gpt2 task=synthetic".
TRAINED := $(addprefix table,2 3 4 6 7 8 9)
FIGURES := $(addprefix figure,4 5 6 7 8 9 10 11)
MEASURED := $(addprefix table,10 11 12 13 14 15 16 17 18)
.PHONY: $(TRAINED) $(MEASURED) $(FIGURES) figures smoke-grid smoke-grid-sample
# The table is printed whether or not all rows went well (0 or 1), unless nothing could be run.
print = ; code=$$?; test $$code -gt 1 || $(BIN)/cola-report --out outputs/report/$@ $(1) || code=$$?; exit $$code

# table2 ... table9: ## every run of an accuracy table, then the table (OVERRIDES="...")
$(TRAINED): install
	@$(BIN)/python scripts/run_grid.py $@ $(OVERRIDES) $(call print,--table $@ outputs)

# table10 ... table18: ## time and memory of a computation table's rows on this machine
$(MEASURED): install
	$(BIN)/cola-bench experiment=$@ $(OVERRIDES)

# figure4 ... figure11: ## the ablation of the adaptation interval in one figure of the paper
$(FIGURES): install
	@$(BIN)/python scripts/run_grid.py $@ $(OVERRIDES) $(call print,--figure $@ outputs)

figures: install ## the ablation of the adaptation interval, all its 88 runs
	@$(BIN)/python scripts/run_grid.py $(FIGURES) $(OVERRIDES) $(call print,$(addprefix --figure ,$(FIGURES)) outputs)

REHEARSED := $(addprefix --table ,$(TRAINED)) outputs/smoke-grid

smoke-grid: install ## two steps of all 335 runs of the paper on tiny models, CPU (three to five minutes)
	@$(BIN)/python scripts/run_grid.py all --rehearse hydra/launcher=parallel $(OVERRIDES) $(call print,$(REHEARSED))

smoke-grid-sample: install ## the same for one run of every experiment (a minute)
	@$(BIN)/python scripts/run_grid.py all --rehearse --sample hydra/launcher=parallel $(OVERRIDES) $(call print,$(REHEARSED))

check: lint types layers test ## what CI runs

clean: ## remove caches and build products (keeps .venv and outputs)
	rm -rf build dist .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find cola tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
