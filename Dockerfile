# syntax=docker/dockerfile:1
#
#   docker build -t grpo-gsm8k .
#   docker build -t grpo-gsm8k:vllm --build-arg EXTRAS="--extra vllm" .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/workspace:/workspace" grpo-gsm8k grpo-gsm8k doctor
#
# No CUDA base image is needed: torch's wheels carry the CUDA libraries, and triton its own ptxas. What triton
# lacks is a C compiler and Python.h. Any Debian base will do; one without Python gets Debian's, for which the
# Dockerfile's only condition is Python >= 3.11 (bookworm or newer). Pin the base by digest where it matters:
#   --build-arg BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm@sha256:...
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

# ---- system: what the build and the final image share --------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Debian's versions are pinned by the base image's digest, not one by one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev tini \
    && { command -v python3 >/dev/null \
         || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# ---- builder: uv, the dependencies in a layer of their own, then the package -----------------------------------
FROM system AS builder
ARG UV_VERSION=0.13.8
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=0 \
    UV_PROJECT_ENVIRONMENT=/opt/venv
# uv in a venv of its own: Debian's Python refuses a system-wide pip install.
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "uv==${UV_VERSION}"

WORKDIR /src
# Copied, not bind-mounted: not every builder hashes bind mounts into the cache key.
COPY pyproject.toml uv.lock ./
# A list of uv options, split into words on purpose. Never put a secret into a build argument.
ARG EXTRAS=""
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --locked --no-install-project --no-dev --python python3 ${EXTRAS}

COPY README.md LICENSE ./
COPY grpo_gsm8k ./grpo_gsm8k
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --locked --no-editable --no-dev --python python3 ${EXTRAS}

# ---- the image ---------------------------------------------------------------------------------------------
FROM system
COPY --from=builder /opt/venv /opt/venv
COPY --chmod=0755 entrypoint.sh /usr/local/bin/entrypoint.sh

# CUDA_HOME stays unset. The two NVIDIA variables are what the container runtime reads to hand over the GPUs.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# There is no git in the image: the commit comes from outside, and run directories are named after it.
ARG GIT_COMMIT=nogit
ENV GRPO_GSM8K_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="grpo-gsm8k" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_COMMIT}"

# Root by default, as rented GPU machines expect; `--user 1000:1000` works as well, hence the sticky bit.
RUN mkdir -p /workspace && chmod 1777 /workspace
WORKDIR /workspace

# tini is process 1: it forwards SIGTERM, so that a stopped run still writes its checkpoint, and reaps orphans.
ENTRYPOINT ["tini", "--", "entrypoint.sh"]
CMD ["grpo-gsm8k", "--help"]
