# Two commands for a newcomer: `make up` (a VM and a shell in it) and `make test`. Both install what is missing and are quick the second time.
# Nothing here or below it may open AF_VSOCK of this host: on a machine that is itself a guest it leads to somebody else's host.
export VSH_AF_VSOCK := deny
# With it set, each program that tests start compiles our modules anew: a third of the time of `make quick`.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# zstd unpacks Debian's kernel; the keyring verifies Debian's packages; mmdebstrap and e2fsprogs make images with a disk.
PACKAGES := qemu-system-x86 zstd debian-archive-keyring ca-certificates mmdebstrap e2fsprogs
# The tests sign archives of their own, try every compression, boot a busybox to measure against, look into a guest with gdb, play recordings and
# captures, and make container images, disks and file systems of every kind.
TEST_PACKAGES := cpio gpg lz4 busybox-static gdb nftables iproute2 curl socat openssh-client openssh-sftp-server asciinema tshark btrfs-progs erofs-utils fdisk qemu-utils skopeo squashfs-tools umoci xfsprogs
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The slow tests boot guests of other architectures, build a kernel, and start a Slurm cluster.
SLOW_PACKAGES := qemu-system-arm qemu-system-misc flex bison bc gcc libelf-dev linux-source make munge musl-tools slurm-client slurmctld slurmd xz-utils
# These would run as services if they were installed. The tests start them from the virtual environment.
UNPACKED_PACKAGES := docker-registry
PYTEST_ARGS ?=

.PHONY: help up down test slow quick unit vm wall-full lint drift docker bench fuzz api lock packages test-packages slow-packages clean

help:
	@echo 'make up         install what is missing, build the image tiny, boot it, run a command in it'
	@echo 'make down       stop every machine of vmkit'
	@echo 'make test       install what is missing, then run the tests, real VMs included: half an hour'
	@echo 'make quick      run the tests that start no programs: seconds'
	@echo 'make unit       run the tests without VMs'
	@echo 'make vm         run the tests with VMs'
	@echo 'make slow       run the slowest tests, which make test skips: half an hour'
	@echo 'make lint       check style and types'
	@echo 'make fuzz       fuzz every parser for longer than the tests do (CASES=1000000)'
	@echo 'make docker     build the Docker image, and run the tests in it; starts an engine if none runs'
	@echo 'make wall-full  attack every image, kernel and backend, and write docs/explanation/wall.md: an hour'
	@echo 'make bench      print the figures of docs/explanation/benchmarks.md that need no more than a checkout'
	@echo 'make drift      build from the newest packages, and list the packages that differ from images/*.lock'
	@echo 'make api        write docs/reference/python.md from the docstrings, and the same as HTML into build/api'
	@echo 'make lock       renew requirements/*.lock from pyproject.toml'
	@echo 'make clean      remove .venv and everything that builds and tests made here'

up: $(VENV)/.run
	@$(BIN)/vmkit up --reuse tiny
	@echo '$$ vsh --vm_name tiny -- uname -srm'
	@$(BIN)/vsh --vm_name tiny -- uname -srm
	@echo 'open a shell:  $(BIN)/vsh --vm_name tiny'

down: $(VENV)/.run
	@$(BIN)/vmkit down --all

# Files stay whole, for tests of one file share machines. Tests without machines wait more than they compute: four
# workers for two cores. Of these, two take the files with machines (tests/dealer.py): up to five at a time, 4 GiB.
WORKERS ?= 4
PARALLEL := -n $(WORKERS) --dist loadfile
test: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(PYTEST_ARGS)

# The rest, green before a release: its summary goes into docs/explanation/benchmarks.md. On a busy host the build of a
# kernel takes longer than the 900 s after which pytest takes a test to hang.
slow: $(VENV)/.test slow-packages
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=6000 $(PYTEST_ARGS)

# In-process tests alone, on two cores: while you edit.
QUICK := tests/test_architecture.py tests/vmkit/image tests/vmkit/machine tests/vmkit/matrix tests/vmkit/vsock tests/vsh tests/vshd
quick: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 -m 'not vm and not process and not load and not slow' $(QUICK) $(PYTEST_ARGS)

unit: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) -m 'not vm and not slow' $(PYTEST_ARGS)

vm: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) -m 'vm and not slow' $(PYTEST_ARGS)

# Some forty guests, those of the backend vhost in a host VM: most of an hour under emulation.
wall-full: $(VENV)/.test
	VMKIT_WALL_FULL=docs/explanation/wall.md $(BIN)/python -m pytest tests/guest/wall $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

drift: $(VENV)/.run
	$(BIN)/vmkit build --update --drift tiny

docker: $(VENV)/.test
	.ci/docker

bench: $(VENV)/.test
	$(BIN)/python -m tests.bench.first_light all
	$(BIN)/python -m tests.bench.vsh
	$(BIN)/python -m tests.bench.short_sessions
	$(BIN)/python -m tests.bench.forwards
	$(BIN)/python -m tests.bench.copies
	$(BIN)/python -m tests.bench.ktap
	$(BIN)/python -m tests.bench.matrix
	$(BIN)/python -m tests.bench.snapshots
	$(BIN)/python -m tests.bench.pool
	$(BIN)/vmkit bench --quick
	@echo 'the figures of the Docker image need an engine and its image: $(BIN)/python -m tests.bench.docker'
	$(BIN)/python -m tests.bench.wall

CASES ?= 1000000
fuzz: $(VENV)/.test
	$(BIN)/python -m pytest -q --hypothesis-profile=explore $$(grep -rl hypothesis tests --include='test_*.py')
	$(BIN)/python -m tests.fuzz.fuzz_vsh_wire --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_vsh_token --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_socks --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_ports --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_cores --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_units --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_notes --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_vsock_device --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_vsock_peers --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_btf --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_kernel_log --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_sftp_client --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_sftp --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_fuse --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_9p --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_commands --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_ktap --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_roots --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_users --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_syslog --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_maitred --cases $(CASES)
	$(BIN)/python -m tests.fuzz.fuzz_cros --cases $(CASES)

# apt is asked only when a package is missing, so a second run needs neither root nor a network.
packages: WANTED := $(PACKAGES)
test-packages: WANTED := $(TEST_PACKAGES)
slow-packages: WANTED := $(SLOW_PACKAGES)
packages test-packages slow-packages:
	@missing=''; for name in $(WANTED); do \
	    dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q 'install ok installed' || missing="$$missing $$name"; \
	done; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then \
	    echo "installing Debian packages:$$missing"; \
	    $(SUDO) apt-get update -q=2 || echo 'apt-get update had errors: going on with the lists it has'; \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q=2 -y --no-install-recommends $$missing; \
	fi

$(VENV)/.run: requirements/run.lock pyproject.toml | packages
	@echo 'making the virtual environment $(VENV)'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements/run.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@# pip's own script imports half of the standard library before the first line of vsh.
	@$(BIN)/python -m vsh --launcher > $(BIN)/vsh.new && chmod +x $(BIN)/vsh.new && mv $(BIN)/vsh.new $(BIN)/vsh
	@touch $@

$(VENV)/packages: | test-packages $(VENV)/.run
	@echo 'unpacking Debian packages: $(UNPACKED_PACKAGES)'
	@rm -rf $@.new && mkdir $@.new
	@cd $@.new && { apt-get download -q=2 $(UNPACKED_PACKAGES) || \
	    { $(SUDO) apt-get update -q=2; apt-get download -q=2 $(UNPACKED_PACKAGES); }; }
	@cd $@.new && for name in *.deb; do dpkg-deb -x $$name . || exit; done && rm *.deb
	@mv $@.new $@

$(VENV)/.test: requirements/test.lock $(VENV)/.run | test-packages $(VENV)/packages
	@echo 'adding what the tests need'
	@$(PIP) install --require-hashes -r requirements/test.lock
	@touch $@

api: $(VENV)/.test
	$(BIN)/python -m tests.docs.api_page build/api

lock: $(VENV)/.test
	$(PIP) install 'uv>=0.5'
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 \
	    --no-header requirements/build.in pyproject.toml -o requirements/run.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 \
	    --no-header --all-extras requirements/build.in pyproject.toml -o requirements/test.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis test-evidence
