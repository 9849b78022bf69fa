#!/usr/bin/env bash
# Writes the four published files of locality-aware orders, 60,000 orders each, to orders/lpd_orders_generated/. They are
# optional: without a file, evaluation draws its orders itself. The binary form is smaller and loads at once:
#   bash orders/run_lpd_order.sh [json|safetensors]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
form=${1:-json}
case $form in
    json | safetensors) ;;
    *) echo "error: form '$form' must be json or safetensors." >&2; exit 2 ;;
esac
while read -r img_size steps repulsion; do
    python -m orders generate --img_size "$img_size" --steps "$steps" --repulsion_threshold "$repulsion" \
        "orders/lpd_orders_generated/res${img_size}_steps${steps}_repulsion${repulsion}.$form"
done <<'PUBLISHED'
256 20 2
256 20 3
256 32 2
512 48 4
PUBLISHED
