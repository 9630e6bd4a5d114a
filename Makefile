# The two commands a stranger starts with are `make run` and `make test`. Needs Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# For `make run`: the task, where its files are, and anything else as ARGS="-p seed 1 -p method lora".
TASK ?= grammar
DATA_DIR ?=
OUT ?= runs/$(TASK)
SETTINGS ?= notebooks/settings/$(if $(filter grammar,$(TASK)),laptop,glue_laptop).yaml

.PHONY: run test lint notebooks lab clean

run: $(READY)
	$(BIN)/python -m drlora_ref.experiments notebook notebooks/09_a_real_run.ipynb $(OUT) \
	  -f $(SETTINGS) -p task $(TASK) -p data_dir "$(DATA_DIR)" $(ARGS)

# Unit tests, doctests and notebooks by papermill; then the equation notebooks compared output by
# output (strict), and those that train run through (lax).
# One thread: for models as small as the tests', a second one makes the first one wait.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -q
	$(BIN)/python -m pytest -q --nbval-lax --nbval-current-env notebooks/08_*.ipynb notebooks/13_*.ipynb
	$(BIN)/python -m pytest -q --nbval --nbval-current-env notebooks/0[0-7]_*.ipynb

lint: $(READY)
	$(BIN)/ruff check drlora_ref tests notebooks
	$(BIN)/ruff format --check drlora_ref tests notebooks

# Executes every notebook top to bottom in a clean kernel and writes it in place.
notebooks: $(READY)
	rm -rf notebooks/runs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

lab: $(READY)
	$(BIN)/jupyter lab notebooks

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $(READY)

clean:
	rm -rf .venv runs notebooks/runs
