#!/usr/bin/env bash
# All that is to be measured on a GPU, in parts of at most 9 minutes: tests, step times, CIFAR-10 by every rule for ten
# epochs, AlexNet on CIFAR-100 at 224x224 by six. Run it again after it was cut off: it goes on with the next part, and
# with a training where it stopped. Each training's folder has config.json (hardware, versions) and metrics.csv.
# Usage: benchmarks/gpu.sh OUT [DATA [EPOCHS]]      DATA: see docs/data.md (default: data); EPOCHS of AlexNet (default: 90)
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1 data=${2:-data} epochs=${3:-90}
mkdir -p "$out"
stopped=143 # by timeout's signal: the training has been saved

part() { # NAME COMMAND...: unless it is done
    local name=$1
    shift
    [[ -e $out/$name.done ]] && return 0
    echo "== $name: $*"
    timeout --preserve-status 540 "$@" 2>&1 | tee -a "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [[ $status == 0 ]] && touch "$out/$name.done"
    return "$status"
}

train() { # NAME SCRIPT FLAGS...: in as many parts as it takes
    local name=$1 script=$2 status=$stopped
    shift 2
    while [[ $status == "$stopped" ]]; do
        if compgen -G "$out/$name/checkpoint*" >/dev/null; then
            part "$name" python "$script" --resume "$out/$name" "${places[@]}"
        else
            part "$name" python "$script" --out "$out/$name" "${places[@]}" "$@"
        fi
        status=$?
    done
}

part tests python -m pytest -q -m cuda
for net in ConvNet AlexNet; do
    part "step-time-$net" python benchmarks/step_time.py --device cuda --nets "$net" --rounds 10 \
        --executions eager graph graph-streams --out "$out/step-time-$net"
done
part step-time-compiled python benchmarks/step_time.py --device cuda --nets ConvNet --rounds 10 --executions compiled \
    --out "$out/step-time-compiled"
fast=(--precision bf16 --channels-last)
places=(--data "$data" --cuda-graph)
for rule in BP FA KP DFA DKP LAS DRTP FDFA HEAD LOCAL; do
    train "cifar10-$rule" main.py --train-mode "$rule" --epochs 10 "${fast[@]}"
done
places=("$data")
for rule in BP LAS HEAD LOCAL DKP DFA; do
    train "cifar100-$rule" alexnet/main.py --dataset cifar100 --train-mode "$rule" --schedule one-cycle \
        --epochs "$epochs" "${fast[@]}"
done
