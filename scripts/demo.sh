#!/usr/bin/env bash
# The whole path on real data, in a few minutes on two CPU cores: handwritten digits → tokenizer → codes → LPD → parallel
# decoding → scores and pictures in runs/demo. Makes the environment first where there is none. Run again after an
# interruption it resumes where it stopped; --fresh starts over:
#   bash scripts/demo.sh [--fresh] [--output_dir DIR] [--device auto|cpu|cuda]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
exec python -m scripts.demo "$@"
