#!/usr/bin/env bash
# AlexNet on two nodes: two network namespaces, a torchrun in each, talking over a virtual wire. Skips, with status 0,
# where namespaces cannot be made. Usage: tests/two_nodes.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/two_namespaces.sh

node() {  # node SIDE RANK: torchrun there, one process
    on "$1" python -m torch.distributed.run --nnodes 2 --node-rank "$2" --nproc-per-node 1 \
        --master-addr "$first" --master-port 29577 \
        alexnet/main.py "$scratch" --dataset synthetic --image-size 64 --limit-batches 3 -b 8 --lr 0.01 --epochs 1 \
        --out "$scratch/run"
}
node b 1 >"$scratch/b.log" 2>&1 &
other=$!
node a 0 2>&1 | tee "$scratch/a.log"
wait $other || { cat "$scratch/b.log"; exit 1; }
grep -q "2 processes" "$scratch/a.log"
grep -q "test accuracy" "$scratch/a.log"
! grep -q "test accuracy" "$scratch/b.log"
echo "two nodes: passed"
