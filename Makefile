# The two commands of the README are `make demo` and `make test`; each works from nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# An environment behind a link is another checkout's: it is used as it is, nothing goes into it, and
# what runs in it is this checkout's code.
LINKED := $(shell test -L $(VENV) && echo linked)
READY := $(if $(LINKED),,$(VENV)/.installed)
ifdef LINKED
export PYTHONPATH := $(CURDIR)
endif
# A file's tests share what is expensive to make, so they stay in one process.
BESIDE := --numprocesses auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check fmt bench plants defaults docs wheel clean

help:  ## Show the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# A stamp, so that a half-made environment is made again and a changed pyproject or C file installs anew.
# torchattacks pins an old `requests` that it never imports; the last line lifts it (see SECURITY.md).
$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard privacy/native/*.[ch])
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): this downloads PyTorch and takes a few minutes"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade requests 2>/dev/null
	@touch $@

demo: $(READY)  ## Train, attack, seal, open and price a private and robust CNN
	@$(RUN) examples/01_demo.py

test: $(READY)  ## Run the tests, doctests, README blocks and examples, but for the slow ones
	$(RUN) -m pytest $(BESIDE) -m "not slow"

test-all: $(READY)  ## Run every test, the slow ones too
	$(RUN) -m pytest $(BESIDE)

check: $(READY)  ## Formatting, lint, strict types, architecture and public names
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -p no:randomly --no-header tests/test_architecture.py tests/test_public_names.py

fmt: $(READY)  ## Format and fix what can be fixed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(READY)  ## Measure the cost of each protection and regenerate the tables
	$(VENV)/bin/secure-cnn bench step --case compact --case resnet20 \
	  --objective n-fgsm --objective pgd --objective trades \
	  --objective n-fgsm-bfloat16 --objective pgd-bfloat16 \
	  --rival opacus-hooks --rival opacus-functorch --rival opacus-ew --rival opacus-ghost \
	  --rival torchattacks-ffgsm --rival torchattacks-pgd --rival torchattacks-trades \
	  --copies 4 --rounds 11 --memory --kernels --json docs/benchmarks.json
	$(VENV)/bin/secure-cnn bench step --case vgg11 --case resnet18 --rival opacus-hooks \
	  --rounds 7 --memory --kernels --json docs/benchmarks-large.json
	$(VENV)/bin/secure-cnn bench overhead --objective n-fgsm --objective pgd --batch 512 \
	  --rounds 21 --scaling batch --scaling side --json docs/overhead.json
	$(VENV)/bin/secure-cnn bench loader --case compact --case resnet20 --threads 1 --images 128 \
	  --rounds 5 --json docs/loader.json
	$(RUN) docs/slow_path.py
	$(VENV)/bin/secure-cnn bench archive --size 100 --size 1024 --json docs/archive.json
	$(RUN) docs/tables.py

plants: $(READY)  ## Plant each defect that an audit must find, and regenerate its table
	OMP_NUM_THREADS=1 $(RUN) tests/audit_plants.py
	$(RUN) docs/tables.py

defaults: $(READY)  ## Train with the default settings on data of many kinds, and regenerate its table
	@$(RUN) -c 'import skimage' 2>/dev/null || $(RUN) -m pip install --quiet --disable-pip-version-check scikit-image
	OMP_NUM_THREADS=1 $(RUN) tests/defaults_table.py
	$(RUN) docs/tables.py

# Their own step: in one resolution with ours, torchattacks' old pin of `requests` excludes them.
$(VENV)/.docs: $(VENV)/.installed
	@$(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["docs"], sep="\n")' > $@.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --requirement $@.txt
	@touch $@

docs: $(if $(LINKED),,$(VENV)/.docs)  ## Regenerate the tables from the measurements and build the site into site/
	$(RUN) docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

wheel: $(READY)  ## Build the wheel and the source distribution
	$(RUN) -m build --no-isolation

clean:  ## Remove what the verbs made, the environment too
	rm -rf $(if $(LINKED),,$(VENV)) dist runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
