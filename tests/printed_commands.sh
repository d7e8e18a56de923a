#!/usr/bin/env bash
# Start every command that a page prints, in the order of the pages, in a copy of this repository with tiny data in the
# places that the pages name. main.py's commands run as printed; what would take long gets smaller numbers at its end.
# Usage: tests/printed_commands.sh COPY
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir "$1"
git ls-files -z -co --exclude-standard | xargs -0 cp --parents -t "$1"
cd "$1"
python - <<'PYTHON'
from pathlib import Path

import numpy as np
from PIL import Image

from training.synthetic import synthetic_images

for folder in ("data", "DATA"):
    Path(folder).mkdir()
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        images = {key: value.numpy() for key, value in synthetic_images(classes, 64, 32).items()}
        np.savez(f"{folder}/{name}.npz", **images)
Image.fromarray(images["x_test"][0]).resize((300, 200)).save("photo.jpg")
PYTHON

small=(--image-size 64 -b 8 --limit-batches 1)
cat README.md docs/*.md alexnet/README.md benchmarks/README.md | grep -E '^(python|torchrun) .*\.(py|plot)\b' |
    awk '!seen[$0]++' | while read -r command; do
    flags=()
    case $command in
        *"accuracy.py --net alexnet"*) flags=("${small[@]}" --modes DFA) ;;
        *--search*) flags=(--quick) ;;
        *accuracy.py*) flags=(--seeds 1) ;;
        *benchmarks/*) flags=(--quick) ;;
        *char_gpt*) flags=(--minutes 0.02) ;;
        *examples/*) ;;
        *"--classify"* | *"--evaluate"*) ;;
        *alexnet/*) flags=("${small[@]}" --epochs 1) ;;
    esac
    echo "+ $command ${flags[*]}"
    # shellcheck disable=SC2086
    $command "${flags[@]}" </dev/null
done
