# Every target sets up what it needs in VENV first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
LINKS := .typecheck/tensorsleuth
PARTS := __init__.py __main__.py api.py py.typed analyze capture cli examples porting references store
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-transformers5 lint dev bench clean

demo: $(VENV)/.ready-demo  ## plant a bug in the shipped model's port and find it
	$(BIN)/sleuth demo sleuth-demo --fault attention-scale --overwrite || test $$? -eq 1

test: $(VENV)/.ready-test  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-transformers5: $(VENV)-transformers5/.ready  ## run the capture and demo tests on the newest transformers 5
	$(VENV)-transformers5/bin/python -m pytest -n 2 --dist loadfile tests/test_demo.py tests/test_capture_*.py

lint: dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd .typecheck && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p tensorsleuth

dev: $(VENV)/.ready-dev  ## an editable environment with every tool, and the link tree that type checkers read
	@mkdir -p $(LINKS)
	@for part in $(PARTS); do ln -sfn ../../$$part $(LINKS)/$$part; done

bench: $(VENV)/.ready-test  ## print every benchmark's ratios
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-transformers5 .typecheck build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -e '.[capture]' -c constraints.txt
	@touch $@

$(VENV)/.ready-test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -e '.[capture,porting,test]' -c constraints.txt
	@touch $@

$(VENV)/.ready-dev: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -e '.[capture,porting,test,dev]' -c constraints.txt
	@touch $@

$(VENV)-transformers5/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-transformers5
	$(VENV)-transformers5/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-transformers5/bin/python -m pip install --quiet -e '.[capture,test]' 'transformers>=5'
	@touch $@
