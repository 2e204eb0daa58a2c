#!/usr/bin/env bash
# Prepare the container, then become its command: nothing stays between tini and it. stdout is the command's alone.
#
#   PUBLIC_KEY, SSH_PUBLIC_KEY  who may log in by ssh, a key a line; with neither no sshd runs
#   SSHD_PORT, SSHD_ADDRESS     where sshd listens; 22, on every address
#   GRPO_GSM8K_CHECKOUT         a mounted checkout whose code runs instead of the image's; 1: the one in /workspace
#   VSCODE_TUNNEL_NAME          a VS Code tunnel of this name; its log says where to log in
#   UV_PROJECT_ENVIRONMENT      a venv of one's own, as in /workspace/.venv: the image's packages, and what is added
#   HOME, TMPDIR, XDG_CACHE_HOME, XDG_CONFIG_HOME, HF_HOME, PIP_CACHE_DIR, GIT_CONFIG_GLOBAL, VSCODE_AGENT_FOLDER,
#   VSCODE_CLI_DATA_DIR, MPLCONFIGDIR, TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR
#                               win where they are set
#
# /pre_start.sh and /post_start.sh are run where there are any, before and after sshd is started. Without a command the
# container waits for ssh, or prints the help where no sshd runs.
set -euo pipefail

say() { printf 'entrypoint: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

# The volume, where one is mounted.
volume() { if [[ -w /workspace ]] && mountpoint -q /workspace; then echo /workspace; fi; }

# Places to write, also with a read-only root file system, and for a user id that /etc/passwd does not know. Caches and
# settings outlive the container where a volume is mounted.
find_places() {
    local volume cache
    volume="$(volume)"
    if [[ ! -w "${TMPDIR:-/tmp}" ]]; then
        [[ -n "$volume" ]] || fail "there is no place to write: mount a folder at /workspace, or add --tmpfs /tmp"
        export TMPDIR="$volume/.tmp"
        mkdir -p "$TMPDIR"
    fi
    if [[ "${HOME:-/}" == "/" || ! -w "$HOME" ]]; then
        HOME="$(mktemp -d)"
    fi
    if [[ -n "$volume" ]] && mkdir -p "$volume/.cache" 2>/dev/null && [[ -w "$volume/.cache" ]]; then
        export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$volume/.cache}"
        export HF_HOME="${HF_HOME:-$XDG_CACHE_HOME/huggingface}" PIP_CACHE_DIR="${PIP_CACHE_DIR:-$XDG_CACHE_HOME/pip}"
        export XDG_CONFIG_HOME="${XDG_CONFIG_HOME:-$volume/.config}"
        export GIT_CONFIG_GLOBAL="${GIT_CONFIG_GLOBAL:-$volume/dotfiles/gitconfig}"
        export VSCODE_AGENT_FOLDER="${VSCODE_AGENT_FOLDER:-$volume/.vscode-server}"
    fi
    # git makes the file, and not the folder
    [[ -z "${GIT_CONFIG_GLOBAL:-}" ]] || mkdir -p "$(dirname "$GIT_CONFIG_GLOBAL")" 2>/dev/null || true
    cache="${XDG_CACHE_HOME:-$HOME/.cache}"
    export HOME USER="${USER:-$(id -un 2>/dev/null || id -u)}"
    export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/torchinductor}"
}

# The code of a mounted checkout, on the image's dependencies. It leaves no files of root's in there.
use_checkout() {
    local asked="${GRPO_GSM8K_CHECKOUT:-0}" folder
    [[ "$asked" != 0 ]] || return 0
    if [[ "$asked" == 1 ]]; then
        asked=/workspace
        [[ -e /workspace/grpo_gsm8k/cli.py ]] || asked=/workspace/grpo_gsm8k
    fi
    folder="$(realpath -m "$asked")"
    [[ -e "$folder/grpo_gsm8k/cli.py" ]] \
        || fail "GRPO_GSM8K_CHECKOUT=$GRPO_GSM8K_CHECKOUT: no checkout in $folder; mount one there, or name its folder"
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
    unset GRPO_GSM8K_COMMIT # the image's, not the checkout's
    say "the code is that of $folder"
    cmp -s "$folder/uv.lock" /opt/src/uv.lock || say "its uv.lock is not the image's, whose packages are used"
}

# A venv of the user's own, which outlives the container on a volume: it sees the image's packages behind its own.
use_venv() {
    local own="${UV_PROJECT_ENVIRONMENT:-/opt/venv}" purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    [[ "$own" != /opt/venv ]] || return 0
    if [[ ! -e "$own/bin/python" ]] && ! python3 -m venv --without-pip "$own" >&2; then
        say "no venv: $own cannot be made; the image's is used"
        return 0
    fi
    if ! python3 -c "$purelib" >"$("$own/bin/python" -c "$purelib")/image.pth"; then
        say "no venv: $own is not one of this image's Python; delete it, or name another"
        return 0
    fi
    export VIRTUAL_ENV="$own" PATH="$own/bin:$PATH"
}

# Where VS Code's command line is, fetched if need be: $1 is its address.
find_code() {
    local folder="${XDG_CACHE_HOME:-$HOME/.cache}/vscode-cli"
    command -v code && return 0
    [[ -x "$folder/code" ]] || python3 - "$1" "$folder" <<'PYTHON' || return 1
import io, sys, tarfile, urllib.request
from pathlib import Path
try:
    with urllib.request.urlopen(sys.argv[1], timeout=60) as reply:
        code = tarfile.open(fileobj=io.BytesIO(reply.read())).extractfile("code").read()  # the bytes of one file alone
    made = Path(sys.argv[2], "code.part")
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(code)
    made.chmod(0o755)
    made.rename(made.with_suffix(""))
except (OSError, KeyError, ValueError, AttributeError, tarfile.TarError) as fault:
    sys.exit(f"{type(fault).__name__}: {fault}")
PYTHON
    echo "$folder/code"
}

# A VS Code tunnel, where one is named. Nothing waits for it, and what keeps it away is only said. Its login is kept
# beside the other settings.
start_tunnel() {
    local name="${VSCODE_TUNNEL_NAME:-}" code kind=x64
    [[ -n "$name" ]] || return 0
    [[ "$(uname -m)" != aarch64 ]] || kind=arm64
    export VSCODE_CLI_DATA_DIR="${VSCODE_CLI_DATA_DIR:-${XDG_CONFIG_HOME:-$HOME/.config}/vscode-cli}"
    {
        if code="$(find_code "${1:-https://update.code.visualstudio.com/latest/cli-alpine-$kind/stable}")"; then
            "$code" tunnel --accept-server-license-terms --name "$name" || say "the VS Code tunnel ended with $?"
        else
            say "no VS Code tunnel: there is no \`code\`, and it cannot be fetched"
        fi
    } </dev/null >&2 &
}

tell_device() {
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]] \
        || say "no GPU is in this container, so the CPU is used (docker run --gpus all hands the GPUs over)"
}

# The environment twice: $1 for `.` in any POSIX shell, $2 for sshd's SetEnv, which cannot hold a line break.
write_environment() {
    local pair name value quote="'\\''"
    # A session's own, and what shells do not let anybody set.
    local own='^(_|PWD|OLDPWD|SHLVL|TERM|SHELL|USER|LOGNAME|MAIL|E?UID|PPID|SSH_.*|(BASH|SHELL)OPTS)$'
    printf 'SetEnv' >"$2"
    while IFS= read -r -d '' pair; do
        name="${pair%%=*}" value="${pair#*=}"
        [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ && ! "$name" =~ $own ]] || continue
        # PAM reads /etc/environment too, in `su`, where root's HOME has no business.
        [[ "$name" == HOME ]] || printf "%s='%s'\n" "$name" "${value//\'/"$quote"}" >>"$1"
        [[ "$value" != *$'\n'* ]] || continue
        value="${value//\\/\\\\}"
        printf ' "%s=%s"' "$name" "${value//\"/\\\"}" >>"$2"
    done < <(env -0)
    printf '\n' >>"$2"
}

# $1: sshd's own folder. Keys only, one account, no PAM: its pam_env would read /etc/environment, in another syntax.
write_sshd_config() {
    local address
    {
        printf 'Port %s\n' "${SSHD_PORT:-22}"
        for address in ${SSHD_ADDRESS:-}; do printf 'ListenAddress %s\n' "$address"; done
        printf '%s\n' "HostKey $1/host_key" "AuthorizedKeysFile $1/authorized_keys" "AllowUsers $USER" \
            'AuthenticationMethods publickey' 'PermitRootLogin prohibit-password' 'PasswordAuthentication no' \
            'KbdInteractiveAuthentication no' 'UsePAM no' 'StrictModes no' 'PidFile none' 'PrintMotd no' \
            'X11Forwarding no' 'Subsystem sftp internal-sftp'
    } >"$1/config"
    CONTAINER_ENVIRONMENT="$1/environment" write_environment "$1/environment" "$1/setenv"
    cat "$1/setenv" >>"$1/config"
}

# sshd, where a public key is given. A container without it is better than none, so what keeps it away is only said.
start_sshd() {
    local folder base keys="${PUBLIC_KEY:-}"$'\n'"${SSH_PUBLIC_KEY:-}"
    [[ -n "${keys//[[:space:]]/}" ]] || return 1
    USER="$(id -un 2>/dev/null)" \
        || { say "no sshd: user id $(id -u) has no name in /etc/passwd; take root, or --user 1000:1000"; return 1; }
    umask 077
    # In memory if it cannot be /run: keys and the environment must not stay behind on a volume.
    for base in /run /dev/shm "${TMPDIR:-/tmp}"; do [[ ! -w "$base" ]] || break; done
    folder="$(mktemp -d "$base/sshd.XXXXXX")"
    printf '%s\n' "$keys" >"$folder/authorized_keys"
    ssh-keygen -l -f "$folder/authorized_keys" >/dev/null 2>&1 \
        || { say "no sshd: PUBLIC_KEY holds no public key"; return 1; }
    ssh-keygen -q -t ed25519 -N '' -C '' -f "$folder/host_key"
    write_sshd_config "$folder"
    [[ ! -w /etc ]] || install -m 600 "$folder/environment" /etc/environment
    mkdir -p /run/sshd 2>/dev/null || true # a tmpfs at /run hides the image's
    /usr/sbin/sshd -D -e -f "$folder/config" </dev/null >"$folder/log" 2>&1 &
    for _ in {1..100}; do
        ! grep -q '^Server listening' "$folder/log" 2>/dev/null || break
        kill -0 "$!" 2>/dev/null || { say "no sshd: $(tail -n 2 "$folder/log" | tr '\r\n' '  ')"; return 1; }
        sleep 0.05
    done
    say "sshd lets $USER in at port ${SSHD_PORT:-22}; its host key: $(cut -d ' ' -f 1,2 "$folder/host_key.pub")"
}

run_hook() {
    [[ ! -f "$1" ]] || bash "$1" >&2 || fail "$1 ended with $?"
}

main() {
    local waits="grpo-gsm8k --help"
    find_places
    use_checkout
    use_venv
    tell_device
    run_hook /pre_start.sh
    # In a subshell: its umask is not the command's.
    if (start_sshd); then waits="sleep infinity"; fi
    run_hook /post_start.sh
    start_tunnel
    # shellcheck disable=SC2086  # words, ours
    [[ $# -gt 0 ]] || set -- $waits
    exec "$@"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
