PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: demo test slow device processes notebooks

demo: .venv/base  ## train the main config, generate, print what came out
	$(BIN)/lit-llm fit --config configs/pretraining/llama_stdlib.yaml --run_dir $(RUN)
	@echo; echo "What it writes:"; echo
	@$(BIN)/lit-llm generate --model $(RUN)/model --prompt "def read_file(" --max_new_tokens 100 --seed 1
	@echo
	@echo "All of it lies in $(RUN):"
	@echo "  model/               opens with transformers' AutoModelForCausalLM and AutoTokenizer"
	@echo "  learning_curve.png   metrics.csv  tensorboard/  samples.txt  results.json"
	@echo "  config.yaml          the run as one file     checkpoints/   best and last"
	@echo "Try next (put .venv/bin on your PATH first):"
	@echo "  lit-llm generate --model $(RUN)/model --prompt 'class Stack:'"
	@echo "  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --data.path YOUR_TEXTS/"
	@echo
	@$(BIN)/python -c "import json; print('val/bits_per_byte', round(json.load(open('$(RUN)/results.json'))['val/bits_per_byte'], 4))"

test: .venv/dev  ## style, and all tests but those marked slow: minutes
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

slow: .venv/dev device  ## the tests marked slow: killed processes, whole chains, every command of the README
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "slow and not processes"

device: .venv/dev  ## the tests of an accelerator, and two steps of most configs, on a simulated one
	SIMULATED_DEVICE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/gpu tests/test_configs.py \
	  -k "test_accelerator or takes_two_steps"

processes: .venv/dev  ## whole runs over several processes, under each strategy: a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/pytest -m processes

notebooks: .venv/dev  ## run all notebooks in place, as they are committed
	$(BIN)/jupyter-nbconvert --to notebook --execute --inplace --log-level WARN --ExecutePreprocessor.timeout=1800 \
	  --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,compression,evaluation,export,serving,sweep]'
	@touch $@
