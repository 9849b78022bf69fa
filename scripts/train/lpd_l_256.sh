#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" --recipe lpd_l_256 "$@"
