# shellcheck shell=sh
# Sourced by login shells: the container's environment, which entrypoint.sh has written down.
if [ -r "${CONTAINER_ENVIRONMENT:-/etc/environment}" ]; then
    set -a
    # shellcheck source=/dev/null
    . "${CONTAINER_ENVIRONMENT:-/etc/environment}"
    set +a
fi
