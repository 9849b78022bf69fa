#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" --evaluate --recipe lpd_xl_res256_steps32 "$@"
