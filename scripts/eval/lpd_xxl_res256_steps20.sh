#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" --evaluate --recipe lpd_xxl_res256_steps20 "$@"
