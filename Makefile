# make demo   set up, train FedAvg, FedLP-Homo, FedLP-Hetero and plans with pruning on the embedded data, print and plot the result
# make test   set up, run the tests but for what takes long
# make test-slow   run that: real language models, stops and resumes, Flower's own engine
# make test-hostile   attack it: 100,000 mutated replies of every kind, whole runs with attackers, memory over many rounds
# make check  format, lint, types, all these tests
# make deploy-demo   rehearse a deployment on this machine: SuperLink, TLS, three SuperNodes with keys
# make test-deploy   test that, and what clients, server and network do wrong (as root: on hosts of their own); half an hour
# make docker-test   build the images of docker/ and run a federation in them; needs Docker, else ends with 2

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FIGURES ?= runs/hostile.json
DEMO := runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check lint format types clean deploy-demo test-slow test-hostile test-deploy docker-test

demo: $(VENV)/.ready
	$(BIN)/fedlp -m experiment=demo strategy=fedavg,fedlp_homo,fedlp_hetero,fedlp_plan hydra.sweep.dir=$(DEMO)
	$(BIN)/fedlp-report $(DEMO)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-hostile: $(VENV)/.ready-dev
	FEDLP_HOSTILE_FIGURES=$(FIGURES) FEDLP_HOSTILE_CASES=100000 $(BIN)/python -m pytest -m "not deploy" tests/hostile

deploy-demo: $(VENV)/.ready
	$(BIN)/fedlp-deploy-demo

test-deploy: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m deploy tests/deploy

docker-test:
	docker/test.sh

check: format lint types test test-slow

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build
