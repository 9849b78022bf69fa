#!/usr/bin/env bash
# Lint, format, types and tests; makes the environment first where there is none. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh -k cache -x
#   bash scripts/test.sh --with-slurm    installs Slurm first, where missing, for tests/scripts/test_slurm.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_slurm() {
    command -v munged >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null && return
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "only root can install Slurm, with apt-get: its tests will be skipped" >&2
        return
    fi
    # The tests start daemons of their own; the packages must not start theirs, which fails in containers.
    local policy=/usr/sbin/policy-rc.d
    local made=
    if [[ ! -e $policy ]]; then
        made=1
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update >/dev/null &&
        apt-get -qq -y -o DPkg::Lock::Timeout=120 install --no-install-recommends slurm-wlm munge >/dev/null ||
        echo "apt-get could not install slurm-wlm and munge (see above): the Slurm tests will be skipped" >&2
    if [[ -n $made ]]; then rm -f "$policy"; fi
}

if [[ ${1:-} == --with-slurm ]]; then
    shift
    install_slurm
fi
source scripts/env.sh
ruff check
ruff format --check
mypy .
python -m pytest "$@"
