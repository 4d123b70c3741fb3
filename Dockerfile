# vmkit, vsh and a built guest image in a container: `docker run --rm -it --network=none vmkit` and then `vmkit up && vsh --cid 3`.
# Nothing in it needs privileges, devices, added capabilities or, once it is built, a network. Stages: `run` to use it, `test` with the checkout and
# all its tests. No BuildKit is needed. `vmkit docker build` builds it, with progress and errors that say what to do; so does plain `docker build .`.
ARG BASE=debian:trixie-slim

# What every stage stands on: QEMU, Python, and what builds guest images. Changes when Debian does.
FROM ${BASE} AS base
COPY images/docker/install /usr/local/lib/vmkit-docker/install
RUN /usr/local/lib/vmkit-docker/install python3 python3-venv qemu-system-x86 zstd debian-archive-keyring ca-certificates \
    mmdebstrap e2fsprogs tini
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Compiled Python is checked by hash and not by time, and comes out the same in every build (py_compile reads SOURCE_DATE_EPOCH).
# Arguments and not variables: what is built in a container of this image has times of its own.
ARG SOURCE_DATE_EPOCH=0
ARG PYTHONHASHSEED=0
RUN useradd --create-home --uid 1000 --shell /bin/bash vmkit && python3 -m venv /opt/vmkit && mkdir /results && chown vmkit: /results
ENV PATH=/opt/vmkit/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin

# Python's packages, by hash. Changes when the locks do.
FROM base AS dependencies
ARG SOURCE_DATE_EPOCH=0
ARG PYTHONHASHSEED=0
COPY requirements/run.lock /tmp/run.lock
RUN pip install --require-hashes -r /tmp/run.lock && rm /tmp/run.lock

# The guest image's Debian packages. Only the modules that fetch them are here, so that a change elsewhere does not fetch them again.
FROM dependencies AS packages
COPY vmkit/__init__.py vmkit/architectures.py vmkit/errors.py vmkit/run.py vmkit/state.py /src/vmkit/
COPY vmkit/image /src/vmkit/image
COPY vsh/__init__.py vsh/errors.py vsh/text.py /src/vsh/
COPY vshd/__init__.py /src/vshd/
COPY images /src/images
COPY templates /src/templates
COPY images/docker/fetch /src/fetch
USER vmkit
# LOCKED=1 takes exactly the packages of images/tiny.lock.
ARG LOCKED=
RUN /src/fetch ${LOCKED:+--locked} tiny && rm -rf ~/.cache/vmkit/apt ~/.cache/vmkit/flock

# What a user wants.
FROM dependencies AS run
ARG SOURCE_DATE_EPOCH=0
ARG PYTHONHASHSEED=0
COPY --from=packages --chown=vmkit:vmkit /home/vmkit/.cache /home/vmkit/.cache
COPY LICENSE README.md pyproject.toml /tmp/src/
COPY images /tmp/src/images
COPY completions /tmp/src/completions
COPY docs/man /tmp/src/docs/man
COPY templates /tmp/src/templates
COPY vshd /tmp/src/vshd
COPY vsh /tmp/src/vsh
COPY vmkit /tmp/src/vmkit
RUN pip install --no-deps --no-build-isolation /tmp/src && python3 -m vsh --launcher > /opt/vmkit/bin/vsh
USER vmkit
WORKDIR /home/vmkit
# What is compared is remembered by inode and time, which no two builds share.
RUN vmkit build --quiet tiny && rm -rf ~/.cache/vmkit/flock ~/.cache/vmkit/compared
# tini is pid 1: it reaps, and hands signals on.
ENTRYPOINT ["/usr/bin/tini", "-g", "--"]
CMD ["/bin/bash"]

# The tests and all they need; the programs are those of the checkout in /src.
FROM run AS test
ARG SOURCE_DATE_EPOCH=0
ARG PYTHONHASHSEED=0
USER root
COPY Makefile /tmp/Makefile
# What `make test` installs, and what a slim base lacks.
RUN /usr/local/lib/vmkit-docker/install $(sed -n 's/^TEST_PACKAGES := //p' /tmp/Makefile) docker-registry gpg-agent man-db make procps systemd \
 && rm /tmp/Makefile
COPY requirements/test.lock /tmp/test.lock
RUN pip install --require-hashes -r /tmp/test.lock && rm /tmp/test.lock
# Root of the container, without any capability added: half of the tests of vshd are about becoming other users.
COPY --from=run --chown=root:root /home/vmkit/.cache /root/.cache
COPY . /src
WORKDIR /src
RUN pip install --no-deps --no-build-isolation --editable . && python3 -m vsh --launcher > /opt/vmkit/bin/vsh \
 && mkdir -p /results/evidence && ln -s /results/evidence test-evidence
