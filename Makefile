# mmfuse: every target says what it does; the first call of any of them makes .venv (7 GB), later calls are quick.
PYTHON ?= python3
NB ?= all
SHELL := bash
BIN := .venv/bin
READY := .venv/.ready
# Notebooks, tests and commands see this checkout and the same seed for hashes.
export PYTHONHASHSEED := 0
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help lab test ledger docs run check export clean setup

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install everything that the course needs

# pip's own output is hundreds of lines, and none at all with --quiet: the large downloads and the last step are shown.
SAY := awk '/Downloading .*([0-9][0-9]\.[0-9] MB|GB)/ {sub(/ *Downloading/, "    downloading"); print; fflush()} \
	/Installing collected/ {print "    installing: some minutes without a word"; fflush()}'

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmfuse needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": call make PYTHON=python3.12, say")'
	@echo "==> installing into .venv (the first time: 3 to 10 minutes, 7 GB; after a change of settings.ini: seconds)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	@set -o pipefail; PYTHONWARNINGS=ignore $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-build-isolation --editable '.[dev,offline,onnx]' | $(SAY)
	@touch $(READY)
	@echo "==> .venv is ready"

lab: $(READY) ## open JupyterLab on the course
	@echo "==> JupyterLab opens on nbs/index.ipynb; Ctrl-C ends it"
	$(BIN)/jupyter lab nbs/index.ipynb

test: $(READY) ## notebooks, docs site, pytest: what CI runs
	@echo "==> testing every notebook"
	$(BIN)/nbdev_test --n_workers 2
	@echo "==> building the docs site and checking its links"
	$(BIN)/python tools/site.py
	@echo "==> pytest (it also checks that notebooks are clean and mmfuse/ is in step with them)"
	$(BIN)/python -m pytest

ledger: $(READY) ## train all arms on the toy COCO and print the fusion ledger
	@echo "==> the fusion ledger on the toy COCO; the result goes to ledger.json and ledger.png"
	$(BIN)/mmfuse ledger --out ledger.json

docs: $(READY) ## build the docs site into _docs/
	@echo "==> building the docs site"
	$(BIN)/python tools/site.py
	@echo "==> open _docs/index.html, or: python -m http.server --directory _docs"

run: $(READY) ## execute one notebook and keep its outputs: make run NB=05 (NB=all for every one)
	@echo "==> executing $(NB) in a fresh kernel"
	$(BIN)/python tools/execute.py $(NB)

check: $(READY) ## execute one notebook and compare with its committed outputs: make check NB=05 (all: 20 minutes)
	@echo "==> comparing $(NB), in fresh kernels, with what is committed"
	$(BIN)/python tools/execute.py --check $(NB)

export: $(READY) ## clean the notebooks and write mmfuse/ from them
	@echo "==> cleaning the notebooks, then exporting mmfuse/"
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

clean: ## remove everything that was built, but not .venv
	@echo "==> removing built files"
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis ledger.json ledger.png
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
