#!/usr/bin/env bash
# Prepare the environment, then become the command: nothing stays between tini and it.
set -euo pipefail

# `--user` with an id that /etc/passwd does not know leaves HOME at "/": caches need a place to write.
if [[ ! -w "${HOME:-/}" || "${HOME:-/}" == "/" ]]; then
    HOME="$(mktemp -d)"
    export HOME
fi

# Downloaded models outlive the container where a volume is mounted; an HF_HOME from outside wins.
if [[ -z "${HF_HOME:-}" && -w /workspace ]] && mountpoint -q /workspace; then
    export HF_HOME=/workspace/.cache/huggingface
fi

exec "$@"
