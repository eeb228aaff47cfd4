# Two commands matter to a new user: `make demo` and `make test`. Both install what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.installed

.PHONY: test-arm test-yocto demo test lint venv run bench bench-delta test-delta test-powercut test-ring test-endurance test-world constraints clean deps deps-test test-generated

demo: venv deps ## pull, run, read logs, exec, stop: on a private socket and data root
	$(BIN)/python -m tests.demo

test: venv deps deps-test ## every test
	scratch=$$(mktemp -d /tmp/balenapy-test-XXXX) && \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --basetemp=$$scratch/t $(PYTEST_ARGS) && rm -rf $$scratch

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml .ci/constraints.txt
	.ci/packages python3-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r .ci/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --config-settings editable_mode=compat -e .
	$(BIN)/python -m compileall -q balenapy delta
	touch $@

deps: ## Debian packages the engine and the demonstration use
	.ci/packages crun runc conmon iproute2 nftables procps tini docker-registry busybox-static

deps-test: ## Debian packages only the tests use
	.ci/packages skopeo strace nodejs npm docker.io docker-compose git rdiff openssl fdisk dosfstools mtools e2fsprogs cpio zstd chromium \
	  qemu-user-static binutils-aarch64-linux-gnu kmod squashfs-tools

run: venv deps ## the engine in the foreground, on the default sockets
	$(BIN)/balenapyd

bench: venv deps deps-test ## side by side with dockerd where that is installed
	$(BIN)/python -m compileall -q balenapy delta
	$(BIN)/python -m tests.bench

bench-delta: venv deps-test ## sizes and costs of deltas; PAIRS names a folder of image pairs
	$(BIN)/python -m tests.bench.delta $(PAIRS)

test-delta: venv ## the long form of what `make test` tries of deltas: 100,000 random pairs, 1,000,000 damaged deltas
	$(BIN)/python -m tests.delta.inverse 100000 1000000
	$(BIN)/python -m tests.delta.fuzz 1000000 1000000

test-powercut: venv deps deps-test ## real power cuts in a virtual machine
	.ci/packages qemu-system-x86
	tests/powercut/fetch
	POWERCUT_ROUNDS=5 $(BIN)/python -m pytest -s tests/powercut/test_machine.py

test-arm: venv deps deps-test ## build an image for ARM boards, boot it in an emulator, update it, cut its power (an hour)
	.ci/packages mmdebstrap qemu-user-static binfmt-support arch-test qemu-system-arm qemu-efi-aarch64 ipxe-qemu qemu-utils \
	  squashfs-tools binutils-aarch64-linux-gnu kmod
	ARM_IMAGES=$${ARM_IMAGES:-build/arm} $(BIN)/python -m pytest -s tests/arm $(PYTEST_ARGS)

test-yocto: venv ## parse and dry-run the Yocto layer; BITBAKE_BUILD names a build directory that has its layers
	BITBAKE_BUILD=$(BITBAKE_BUILD) $(BIN)/python -m pytest -s tests/arm/test_yocto.py

test-generated: venv deps deps-test ## 20,000 requests made up from the API's description
	REQUESTS=20000 $(BIN)/python -m pytest -s tests/compat/test_generated.py

test-world: venv deps deps-test ## Dockerfiles as people have them, on Debian and with package registries
	.ci/packages mmdebstrap
	WORLD=all $(BIN)/python -m pytest -s tests/build/test_world.py

test-ring: venv ## the ring log against a hundred thousand histories of crashes
	RING_EXAMPLES=100000 $(BIN)/python -m pytest -s tests/core/test_ring_crashes.py

test-endurance: venv deps deps-test ## an hour: the daemon killed 50 times, ten idle minutes, a flood, a soak of 30 minutes
	LOG_KILLS=50 IDLE_SECONDS=600 FLOOD_SECONDS=60 SOAK_SECONDS=1800 $(BIN)/python -m pytest -s tests/endurance

constraints: venv ## remake .ci/constraints.txt from setup.cfg (needs the package index)
	$(PYTHON) -m venv build/pip-tools && build/pip-tools/bin/pip install --quiet pip-tools
	build/pip-tools/bin/pip-compile --quiet --generate-hashes --no-header --strip-extras \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  --allow-unsafe --extra test --extra lint --extra build --output-file=.ci/constraints.txt setup.cfg
	sed -i '1i # Every wheel of the engine, its tests and its linters, by version and hash (make constraints).' .ci/constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
