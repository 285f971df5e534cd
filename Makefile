# `make quickstart` and `make test` set up the environment themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml train_text_to_image.py

.PHONY: help setup quickstart quickstart-lora test test-slow test-faults lint format docs theory base clean memory-table

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY)  ## set up .venv with the tested versions
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bitsandbytes,dev]'
	@touch $@

quickstart: $(READY)  ## teach the tiny model flags, on the CPU, in minutes
	$(LAUNCH) --config quickstart
	@echo
	@echo "Look at   runs/quickstart/report.html and runs/quickstart/before_after.png"
	@echo "Next      your own pictures (a folder with a metadata.jsonl), on the CPU, starting from the same tiny model:"
	@echo "            $(LAUNCH) \\"
	@echo "              --pretrained_model_name_or_path sd-recipes/tiny-emoji --train_data_dir FOLDER --resolution 64 \\"
	@echo "              --learning_rate 1e-3 --max_train_steps 1000 --use_ema --output_dir runs/mine"
	@echo "          on a GPU, Stable Diffusion 1.5:"
	@echo "            $(BIN)/accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml train_text_to_image.py \\"
	@echo "              --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\"
	@echo "              --train_data_dir FOLDER --resolution 512 --use_ema --output_dir runs/sd15"

quickstart-lora: $(READY)  ## the same by a LoRA
	$(LAUNCH) --config quickstart_lora

test: $(READY) lint  ## run lint, type checks and the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'  # a process per core

test-slow: $(READY)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-faults: $(READY)  ## kill runs a hundred times and at every file operation; takes minutes
	$(BIN)/python -m pytest -s tests/checkpoints/test_faults.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## write the generated parts of the documentation
	$(BIN)/python tools/write_docs.py

memory-table: $(READY)  ## plan the table of docs/memory.md; takes minutes
	$(BIN)/python tools/write_memory_table.py

theory: $(READY)  ## draw the figures of docs/theory.md; takes minutes
	$(BIN)/python tools/draw_theory.py

base: $(READY)  ## rebuild the embedded data set and the tiny base model from scratch (hours on two cores)
	$(BIN)/python tools/build_emoji_dataset.py --output_dir sd_recipes/assets/emoji
	$(BIN)/python tools/train_tiny_vae.py --dataset_dir sd_recipes/assets/emoji --output_dir build/tiny_vae
	$(BIN)/python tools/train_tiny_clip.py --dataset_dir sd_recipes/assets/emoji --output_dir build/tiny_clip
	$(BIN)/python tools/assemble_tiny_base.py --vae build/tiny_vae --clip build/tiny_clip --output_dir build/tiny_parts
	$(LAUNCH) --config tiny_from_scratch --pretrained_model_name_or_path build/tiny_parts --unet_config tools/tiny_unet.json
	$(BIN)/python tools/install_tiny_base.py --run runs/tiny_from_scratch --clip build/tiny_clip \
		--vae_figures build/tiny_vae/figures.json

clean:  ## remove what runs and builds left, but not the environment
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
