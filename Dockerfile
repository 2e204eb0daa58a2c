# syntax=docker/dockerfile:1
#
#   docker build -t grpo-gsm8k .
#   docker build -t grpo-gsm8k:vllm --build-arg EXTRAS="--extra vllm" .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/workspace:/workspace" grpo-gsm8k grpo-gsm8k doctor
#
# Environment variables: see entrypoint.sh. `scripts/check_image` builds this and checks what it promises.
#
# No CUDA base image is needed: torch's wheels carry the CUDA libraries, and triton its own ptxas. What triton
# lacks is a C compiler and Python.h. Any Debian base will do; one without Python gets Debian's, for which the
# Dockerfile's only condition is Python >= 3.11 (bookworm or newer).
#
# python:3.12-slim-bookworm of 2026-08-25 (Python 3.12.14), an index of all platforms; the digest is the one in
# docker-library/repo-info, repos/python/remote/3.12-slim-bookworm.md.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm@sha256:0f5b26b9518d002b6173fd61daad821fa340635ebfec5bba471013f9ca114579

# ---- system: Debian's packages, and two accounts -----------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS system
# Debian's versions are pinned by the base image's digest, not one by one. The host keys that openssh-server makes
# when it is installed would be the same in every container: each makes its own when it boots.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev openssh-server tini \
    && { command -v python3 >/dev/null \
         || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# Whoever owns a mounted checkout: git tells its commit, to root as to any other user.
RUN git config --system safe.directory '*'
# Root by default, as rented GPU machines expect. `--user 1000:1000` works as well; it has a name because sshd lets
# nobody in without one. "*" is no password's hash: keys open these accounts, and passwords never do.
RUN useradd --create-home --uid 1000 --shell /bin/bash trainer \
    && usermod --password '*' trainer \
    && usermod --password '*' --shell /bin/bash root \
    && mkdir -p /run/sshd /workspace \
    && chmod 1777 /workspace

# ---- uv: one static binary, from PyPI like everything else; Debian's pip works in a venv alone ---------------
FROM system AS uv
ARG UV_VERSION=0.13.8
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "uv==${UV_VERSION}"

# ---- dependencies: one layer, that only the lock (or EXTRAS) changes -----------------------------------------
# The image is built on this stage: nothing is copied out of it, so that a change of the source costs seconds.
FROM system AS dependencies
COPY --from=uv /opt/uv/bin/uv /usr/local/bin/uv
# Wherever uv is called, in a checkout on a network volume too: this is the venv.
ENV UV_PROJECT_ENVIRONMENT=/opt/venv
# Copied, not bind-mounted: not every builder hashes bind mounts into the cache key.
COPY pyproject.toml uv.lock /opt/src/
WORKDIR /opt/src
# A list of uv options, split into words on purpose. Never put a secret into a build argument.
ARG EXTRAS=""
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/uv \
    UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=0 UV_SYSTEM_CERTS=1 \
    uv sync --locked --no-install-project --no-dev --python python3 ${EXTRAS}

# ---- package: the project alone, laid out as it will lie in the venv -----------------------------------------
FROM dependencies AS package
COPY README.md LICENSE ./
COPY grpo_gsm8k ./grpo_gsm8k
RUN --mount=type=cache,target=/root/.cache/uv \
    UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=0 UV_SYSTEM_CERTS=1 \
    uv pip install --no-deps --python /opt/venv/bin/python --prefix /opt/package .

# ---- the image ---------------------------------------------------------------------------------------------
FROM dependencies
# An ssh login's /etc/profile sets PATH anew: the container's environment comes back behind it.
COPY --chmod=0644 docker/profile.sh /etc/profile.d/container-environment.sh
COPY --chmod=0755 entrypoint.sh /usr/local/bin/entrypoint.sh
COPY --from=package /opt/package /opt/venv

# CUDA_HOME stays unset. The two NVIDIA variables are what the container runtime reads to hand over the GPUs.
# PYTHONSAFEPATH: the current folder is no import path, so a checkout that happens to be mounted at /workspace is not
# half used; GRPO_GSM8K_CHECKOUT asks for it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace

# tini is process 1: it forwards SIGTERM, so that a stopped run still writes its checkpoint, and reaps orphans.
ENTRYPOINT ["tini", "--", "entrypoint.sh"]
CMD ["grpo-gsm8k", "--help"]
EXPOSE 22

# There is no repository in the image: the commit comes from outside, and run directories are named after it. Last,
# since it changes most often.
ARG BASE_IMAGE
ARG GIT_COMMIT=nogit
ENV GRPO_GSM8K_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="grpo-gsm8k" \
      org.opencontainers.image.description="SFT, expert iteration and GRPO on GSM8K, on one node" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
