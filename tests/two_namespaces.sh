# Two network namespaces with addresses of their own and a virtual wire between them; to be sourced. Sets $a, $b, $scratch
# and the function `on`; ends the script with status 0 where namespaces cannot be made (no root, no iproute2).
a=dfa-node-a-$$ b=dfa-node-b-$$ scratch=$(mktemp -d) first=10.77.0.1
if ! { ip netns add "$a" && ip netns add "$b"; } 2>/dev/null; then
    ip netns del "$a" 2>/dev/null || true
    echo "skipped: no network namespaces here (they need root and iproute2)"
    exit 0
fi
trap 'ip netns del "$a"; ip netns del "$b"; rm -rf "$scratch"' EXIT

ip link add veth-a netns "$a" type veth peer name veth-b netns "$b"
for side in a b; do
    node=${!side}
    [ $side = a ] && address=$first || address=10.77.0.2
    ip -n "$node" addr add $address/24 dev veth-$side
    ip -n "$node" link set veth-$side up
    ip -n "$node" link set lo up
done

on() {  # on SIDE COMMAND...: run it in namespace a or b
    local side=$1
    shift
    ip netns exec "${!side}" env GLOO_SOCKET_IFNAME="veth-$side" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= "$@"
}
