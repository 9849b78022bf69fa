#!/usr/bin/env bash
# Runs main_lpd.py with the given flags; where the machine has several GPUs, under torchrun with one process per GPU.
# NPROC_PER_NODE overrides the number of processes. For several machines set NNODES, NODE_RANK and MASTER_ADDR (and
# MASTER_PORT) on each; scripts/cli/run.py does that under Slurm.
# On Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 to this process the training saves and exits with status 130 (Ctrl-C) or
# 75 (start it again).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
processes=${NPROC_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
nodes=${NNODES:-1}
if [[ $nodes == 1 && $processes == 1 ]]; then
    exec python main_lpd.py "$@"
elif [[ $nodes == 1 ]]; then
    rendezvous=(--standalone)
else
    rendezvous=(--node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}")
fi
exec python -m scripts.cli.supervise --nnodes "$nodes" --nproc_per_node "$processes" "${rendezvous[@]}" \
    -m scripts.cli.worker main_lpd.py "$@"
