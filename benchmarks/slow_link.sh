#!/usr/bin/env bash
# benchmarks/pipeline.py over a wire of 1 Gbit/s between two network namespaces, a stage in each. Skips, with status 0, where
# they cannot be made. Usage: benchmarks/slow_link.sh [flags of pipeline.py]
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/two_namespaces.sh
for side in a b; do
    ip netns exec "${!side}" tc qdisc add dev veth-$side root tbf rate 1gbit burst 128kb latency 20ms
done
stage() {  # stage SIDE RANK FLAGS...
    on "$1" python benchmarks/pipeline.py --link "1 Gbit/s" --url "tcp://$first:29578" --rank "$2" "${@:3}"
}
stage b 1 "$@" >"$scratch/b.log" 2>&1 &
other=$!
stage a 0 "$@" || { kill $other; cat "$scratch/b.log"; exit 1; }
wait $other
