# Every target is one or a few lines of `python`, so that they also run where there is no make.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
TABLE ?= digits
SEEDS ?= 0,1,2
NO := 0 no No NO n N false False FALSE off Off OFF

# The stamp: made anew when what is to be installed changes.
READY := $(VENV)/.ready

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-17s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment in .venv, with the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: setup ## the tests (under 8 minutes on two cores)
	$(RUN) -m pytest -n auto --dist loadfile

lint: setup ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

reproduce-table: setup ## train the runs that a table still lacks, then show it: TABLE=digits|1|2|grid10|grid20|grid100|ablation|ablation_digits|conditions|division|division_cifar|ports|drop|3 SEEDS=0,1,2 DRY=1 BUDGET=s REUSE=1 DEVICE= SET=key=value
	$(RUN) scripts/reproduce_table.py --table $(TABLE) --seeds '$(SEEDS)' $(if $(filter-out $(NO),$(DRY)),--dry) \
	  $(if $(filter-out $(NO),$(REUSE)),--reuse) $(if $(BUDGET),--budget $(BUDGET)) $(if $(DEVICE),--device $(DEVICE)) \
	  $(if $(SET),--set $(SET))

data: setup ## prepare DATASET=inaturalist2017|inaturalist2018|imagenet under ROOT=data: RESIZE=256 DOWNLOAD=1
	$(RUN) scripts/prepare_data.py $(DATASET) --root $(or $(ROOT),data) $(if $(RESIZE),--resize $(RESIZE)) \
	  $(if $(filter-out $(NO),$(DOWNLOAD)),--download)

collect: setup ## publish outputs/runs (or FOLDERS=..., WANDB=entity/project) into results/ and render all of it
	$(RUN) scripts/collect.py $(FOLDERS) $(if $(WANDB),--wandb $(WANDB))
	$(RUN) scripts/figures.py
	$(RUN) scripts/render.py

tables: setup ## results/tables, results/index.html and the README block, from results/runs.csv
	$(RUN) scripts/render.py

notebooks: setup ## notebooks/ executed to HTML in outputs/notebooks
	$(RUN) -m nbconvert --to html --execute --output-dir outputs/notebooks notebooks/*.ipynb

figures: setup ## results/figures, from results/
	$(RUN) scripts/figures.py

bench: setup ## measure training, loading and the ResNet-50 step on this machine, into a page in results/bench: BUDGET=s
	$(RUN) scripts/benchmark.py $(if $(BUDGET),--budget $(BUDGET))

tune: setup ## find the fastest tiles for engine.fused's kernels on this GPU, printed to paste: LANES=1 BUDGET=s
	$(RUN) scripts/tune.py --lanes $(or $(LANES),1) $(if $(BUDGET),--budget $(BUDGET))

.PHONY: help setup test lint reproduce-table data collect tables figures notebooks bench tune
