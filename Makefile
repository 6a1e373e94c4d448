PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin

# On scikit-learn's handwritten digits. Run in demo/, away from other runs' files.
DEMO = cd demo && ../$(BIN)/python
DEMO_RUN = ../train.py --name demo --recipe small --dataset digits --train_batch_size 64 \
	--num_steps 400 --warmup_steps 40 --eval_every 50 --set flip=False pool=token

.PHONY: setup demo test lint bench check-gpu soak tensorboard clean

setup: .venv/.installed  ## once: .venv with all that use and development need

demo: .venv/.installed_to_run  ## trains two norm types on digits, evaluates and compares them
	mkdir -p demo
	$(DEMO) $(DEMO_RUN) --norm_type LN --overwrite
	$(DEMO) $(DEMO_RUN) --norm_type Rescale --overwrite
	$(DEMO) $(DEMO_RUN) --norm_type LN --eval
	$(DEMO) $(DEMO_RUN) --norm_type Rescale --eval
	$(DEMO) ../plot_acc_loss.py output/*.txt --above img/plot_attn/*_attention.png
	$(DEMO) ../results.py output/*.txt
	@echo "Curves and attention of both: demo/img/plot_acc_loss/overview.png"
	@echo "Figures: demo/img/. Logs and checkpoints: demo/output/."
	@echo "Curves: $(BIN)/tensorboard --logdir demo/logs"

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmark.py

check-gpu: .venv/.installed_to_run  ## what the GPUs here compute against the CPU, as a table
	$(BIN)/python check_gpu.py

soak: setup
	$(BIN)/python tests/soak.py

tensorboard: .venv/.installed_to_run  ## the curves in logs/, for this machine's browsers only
	$(BIN)/tensorboard --logdir logs --host 127.0.0.1

clean:  ## caches only
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed_to_run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/.installed: .venv/.installed_to_run requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
