# `make demo` and `make test` create .venv, install all packages there, and run the demo or tests.
# The README lists the commands of the demo. To use another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = demo

.PHONY: demo paper notebook test test-slow lint clean same-python

demo: $(VENV)/installed
	$(BIN)/python -m tools.make_demo_dataset --out $(DEMO)/dataset
	$(BIN)/python build_mtt.py --data-dir $(DEMO)/dataset
	$(BIN)/python train.py --data-dir $(DEMO)/dataset --train-dir $(DEMO)/log \
	  --init-features 16 --batch-size 10 --lr 0.05 --num-lr-decays 2 --max-epochs 5 --patience 4
	$(BIN)/python eval.py $(DEMO)/log/1 --data-dir $(DEMO)/dataset --report $(DEMO)/report
	$(BIN)/python extract_excitations.py $(DEMO)/log/1 --data-dir $(DEMO)/dataset \
	  --out $(DEMO)/excitations.pkl
	EXCITATIONS=$(DEMO)/excitations.pkl DATA_DIR=$(DEMO)/dataset $(BIN)/jupyter nbconvert \
	  --to notebook --execute excitation_analysis.ipynb --output-dir $(DEMO) \
	  --ExecutePreprocessor.timeout=300 --log-level ERROR \
	  --ExecutePreprocessor.extra_arguments=--log-level=ERROR
	@echo
	@echo "The demo is complete:"
	@echo "  $(DEMO)/dataset                    synthetic clips, their annotations and shards"
	@echo "  $(DEMO)/log                        checkpoints, training.csv and event logs of 2 stages"
	@echo "  $(DEMO)/report                     test scores and mistakes: open report.html in a browser"
	@echo "  $(DEMO)/excitations.pkl            mean excitations of the test clips"
	@echo "  $(DEMO)/excitation_analysis.ipynb  the notebook, executed on these excitations"

# The paper's twelve networks at small size, on the demo's dataset.
paper: $(VENV)/installed
	$(BIN)/python -m tools.paper --data-dir $(DEMO)/dataset --out $(DEMO)/paper \
	  --init-features 4 --batch-size 10 --lr 0.05 --num-lr-decays 1 --max-epochs 2

# Execute the committed notebook on the demo, without timings and widget state.
notebook: $(VENV)/installed
	$(BIN)/python extract_excitations.py $(DEMO)/log/1 --data-dir $(DEMO)/dataset \
	  --segments --depths 0 --out $(DEMO)/segments.parquet
	mkdir -p $(DEMO)/figures
	EXCITATIONS=$(DEMO)/excitations.pkl EXCITATIONS_SEGMENTS=$(DEMO)/segments.parquet \
	  DATA_DIR=$(DEMO)/dataset FIGURES_DIR=$(DEMO)/figures $(BIN)/jupyter nbconvert \
	  --to notebook --execute --inplace excitation_analysis.ipynb \
	  --ExecutePreprocessor.record_timing=False \
	  --ExecutePreprocessor.extra_arguments=--log-level=ERROR \
	  --ExecutePreprocessor.store_widget_state=False
	cp $(DEMO)/figures/first_block_heat_map.png $(DEMO)/figures/loudness.png docs/images
	$(BIN)/jupyter nbconvert --to notebook --inplace excitation_analysis.ipynb \
	  --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_all_outputs_tags=interactive \
	  --ClearMetadataPreprocessor.enabled=True \
	  --ClearMetadataPreprocessor.preserve_cell_metadata_mask=tags \
	  --ClearMetadataPreprocessor.clear_notebook_metadata=False

# One process per core, but at most 4: each needs about 1 GB of memory.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

test: $(VENV)/installed
	$(PYTEST) --dist loadfile

# Single tests take minutes, so a process that has finished takes tests from another.
test-slow: $(VENV)/installed
	$(PYTEST) --dist worksteal -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Where PYTHON is given, refuse an environment that another version of Python made.
same-python:
ifneq ($(origin PYTHON),file)
	@if [ -x $(BIN)/python ]; then \
	  has=$$($(BIN)/python -V) && wanted=$$($(PYTHON) -V) || exit; \
	  [ "$$has" = "$$wanted" ] || { echo "$(VENV) contains $$has, but PYTHON=$(PYTHON) is" \
	    "$$wanted: delete $(VENV), or choose another folder with VENV=" >&2; exit 2; }; \
	fi
endif

# One environment: the toolkit's requirements, then tests, lint and Jupyter. --upgrade-deps
# installs the newest pip, which installs packages faster than that of Python 3.11.
$(VENV)/installed: requirements.txt requirements/tag.txt requirements/dev.txt | same-python
	@$(PYTHON) -B toolkit/supported_python.py
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements/dev.txt
	touch $@

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -r {} +
