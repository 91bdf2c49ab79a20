# make demo and make test set themselves up: Python >= 3.11 and pip are all that must be there.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
OLDEST_TRANSFORMERS := 5.17.0
OLDEST_TRITON := 3.6.0
PIP    := -m pip install --quiet --disable-pip-version-check
# Two processes of one thread each: at these sizes a second thread of torch gains nothing.
PYTEST := -m pytest -q -n 2 --dist worksteal
test test-oldest: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help demo example test test-oldest check bench bench-gpu clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

$(VENV)/.stamp: pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) (once, a few minutes)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) "$$(grep '^torch==' requirements-dev.txt)"
	@$(BIN)/python $(PIP) -c requirements-dev.txt -e '.[dev]'
	@touch $@

# The oldest supported Transformers in a thin environment that borrows the rest from the first one.
$(OLDEST)/.stamp: $(VENV)/.stamp
	@test -d $(OLDEST) || $(BIN)/python -m venv $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_borrowed.pth"
	@$(OLDEST)/bin/python $(PIP) transformers==$(OLDEST_TRANSFORMERS) triton==$(OLDEST_TRITON)
	@touch $@

demo: $(VENV)/.stamp  ## train a small GRIN MoE on real text, save it, load it elsewhere, chat (2 minutes, after the set-up)
	@$(BIN)/grinmoe demo --output demo-output

example: $(VENV)/.stamp  ## pretrain, sft with QLoRA, dpo on real text, and a report (about 5 minutes)
	@$(BIN)/python scripts/worked_example.py --output worked-example

test: $(VENV)/.stamp  ## the whole CPU test suite
	@$(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/.stamp  ## the model's tests on the oldest supported Transformers
	@$(OLDEST)/bin/python -c 'import transformers; assert transformers.__version__ == "$(OLDEST_TRANSFORMERS)", transformers.__version__'
	@$(OLDEST)/bin/python $(PYTEST) tests/goldens tests/remote_code tests/distributed tests/test_balance.py tests/test_block.py \
		tests/test_checkpoint.py tests/test_configuration.py tests/test_estimators.py tests/test_estimator_forwards.py tests/test_experts.py \
		tests/test_generate.py tests/test_mask_schedule.py tests/test_modeling.py tests/test_monitoring.py tests/test_monitoring_alarms.py \
		tests/test_routing.py tests/test_routing_record.py tests/test_saving.py tests/test_tokenization.py tests/test_training.py \
		tests/test_chat_template.py tests/test_hub_server.py tests/test_tokenizer_build.py tests/test_tokenizer_loading.py \
		tests/test_tokenizer_sources.py tests/test_tokenizer_verify.py tests/test_uploading.py tests/test_release.py \
		tests/test_push.py tests/test_pull.py tests/test_private_text.py tests/test_model_card.py tests/test_card_facts.py \
		tests/test_card_metadata.py tests/test_trainer_card.py tests/test_push_options.py tests/test_elsewhere.py \
		tests/test_cpu_experts.py tests/test_dispatch.py tests/test_triton_experts.py tests/test_kernels_compile.py tests/test_counter_draws.py \
		tests/test_router_kernels.py tests/test_experts_kernels.py tests/test_decode_kernels.py tests/test_static_cache.py \
		tests/test_analyze.py tests/test_data.py tests/test_export.py tests/test_gguf_export.py tests/test_phimoe_engines.py tests/test_upcycle.py tests/test_evaluation.py tests/test_evaluation_suite.py tests/test_guide.py tests/test_expert_lora.py tests/test_finetuning.py tests/test_interruption.py tests/test_lora.py \
		tests/test_merge.py tests/test_packing.py tests/test_plan.py tests/test_preference.py tests/test_quantization.py \
		tests/test_quantized_experts.py tests/test_recipe.py tests/test_routing_analysis.py tests/test_scripts.py tests/test_serve.py tests/test_serve_inside.py tests/test_text_stream.py tests/test_training_data.py

check: $(VENV)/.stamp  ## ruff, mypy, symbolic links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find . -xtype l -not -path './.venv*' | (! grep .) || (echo "broken symbolic links above" >&2; exit 1)

bench: $(VENV)/.stamp  ## measure on this CPU and write dated reports (about 5 minutes; leave the machine alone meanwhile)
	@$(BIN)/python -m benchmarks cpu

bench-gpu: $(VENV)/.stamp  ## measure on a GPU and write dated reports (9 minutes; needs torch, triton and transformers alone)
	@$(BIN)/python -m benchmarks gpu

clean:  ## remove environments and build output
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo-output worked-example .pytest_cache .hypothesis .ruff_cache .mypy_cache
