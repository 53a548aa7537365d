# make demo   set up, train FedAvg, FedLP-Homo, FedLP-Hetero and FedLP-Plan on built-in images, print a table, write a report page;
#             it compares bytes; the accuracies show no order. Under two minutes after set-up on two idle cores
# make test   set up, run the tests but for what takes long
# make test-slow   run that: real language models, stops and resumes, Flower's own engine
# make test-hostile   attack it: 100,000 mutated replies of every kind, whole runs with attackers, memory over many rounds
# make check  format, lint, types, all these tests
# make docs   build the documents as a site in site/, offline; a warning or a dead link is an error
# make deploy-demo   rehearse a deployment on this machine: SuperLink, TLS, three SuperNodes with keys
# make test-deploy   test that, and what clients, server and network do wrong (as root: on hosts of their own); half an hour
# make docker-test   build the images of docker/ and run a federation in them; needs Docker, else ends with 2

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FIGURES ?= runs/hostile.json
DEMO := runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo docs test check lint format types clean deploy-demo test-slow test-hostile test-deploy docker-test

demo: $(VENV)/.ready
	$(BIN)/fedlp -m experiment=demo strategy=fedavg,fedlp_homo,fedlp_hetero,fedlp_plan hydra.sweep.dir=$(DEMO)
	$(BIN)/fedlp-report $(DEMO)
	@echo "What this shows: how many bytes four methods send for one model, and that every part works."
	@echo "What it does not: an order. The accuracies differ by a few of 359 test images, and so between machines."
	@echo "Open $(DEMO)/report/report.html; docs/index.md goes on from here."

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-hostile: $(VENV)/.ready-dev
	FEDLP_HOSTILE_FIGURES=$(FIGURES) FEDLP_HOSTILE_CASES=100000 $(BIN)/python -m pytest -m "not deploy" tests/hostile

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

deploy-demo: $(VENV)/.ready
	$(BIN)/fedlp-deploy-demo

test-deploy: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m deploy tests/deploy

docker-test:
	docker/test.sh

check: format lint types docs test test-slow

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

# torch goes first: a looser request by another package could bring in another build of several gigabytes.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build site
