#!/usr/bin/env bash
# AlexNet on two nodes: two network namespaces with addresses of their own, a torchrun in each, talking over a virtual
# wire. Skips, with status 0, where namespaces cannot be made (no root, no iproute2). Usage: tests/two_nodes.sh
set -euo pipefail
cd "$(dirname "$0")/.."
a=dfa-node-a-$$ b=dfa-node-b-$$ scratch=$(mktemp -d)
if ! { ip netns add "$a" && ip netns add "$b"; } 2>/dev/null; then
    ip netns del "$a" 2>/dev/null || true
    echo "skipped: no network namespaces here (they need root and iproute2)"
    exit 0
fi
trap 'ip netns del "$a"; ip netns del "$b"; rm -rf "$scratch"' EXIT

ip link add veth-a netns "$a" type veth peer name veth-b netns "$b"
for side in a b; do
    node=${!side}
    [ $side = a ] && address=10.77.0.1 || address=10.77.0.2
    ip -n "$node" addr add $address/24 dev veth-$side
    ip -n "$node" link set veth-$side up
    ip -n "$node" link set lo up
done

node() {  # node NAMESPACE RANK INTERFACE: torchrun there, one process
    ip netns exec "$1" env GLOO_SOCKET_IFNAME="$3" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
        python -m torch.distributed.run --nnodes 2 --node-rank "$2" --nproc-per-node 1 \
        --master-addr 10.77.0.1 --master-port 29577 \
        alexnet/main.py "$scratch" --dataset synthetic --image-size 64 --limit-batches 3 -b 8 --lr 0.01 --epochs 1 \
        --out "$scratch/run"
}
node "$b" 1 veth-b >"$scratch/b.log" 2>&1 &
other=$!
node "$a" 0 veth-a 2>&1 | tee "$scratch/a.log"
wait $other || { cat "$scratch/b.log"; exit 1; }
grep -q "2 processes" "$scratch/a.log"
grep -q "test accuracy" "$scratch/a.log"
! grep -q "test accuracy" "$scratch/b.log"
echo "two nodes: passed"
