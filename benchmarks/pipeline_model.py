"""What a step over many stages would take: a model of it, checked against the measured two stages, then carried on.

Run:    python benchmarks/pipeline_model.py
Reads what benchmarks/pipeline.py has measured. For a micro-batch a stage takes f for the forward pass, b for the
backward pass by backpropagation (gradients of weights and input), w for it by direct feedback, and u for optimisers.
The link takes a for the activations of a micro-batch and e for its error. By p stages and m micro-batches a step takes

    BP GPipe    (m + p - 1) (max(f, a) + max(b, a)) + 2 (p - 1) latency + u
    direct      m (max(f, a) + w) + u + ((p - 1) (f + a + latency) + e + latency) / k    k steps in a row
    BP DDP      m (f + b) + max(0, all-reduce - m b) + p u    each process has all p stages, and m / p micro-batches

Prints the model beside what was measured, and the predicted ratio of DKP to BP for more stages and other links.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pipeline import BASE, STEPS, pyplot
from training.machine import REPOSITORY

MEASURED = REPOSITORY / "benchmarks" / "results" / "pipeline_cpu.json"
DIRECT = "DKP optimizer"
STAGES = (2, 4, 8, 16)
GBITS = (1, 10, 100)
LATENCY_S = 5e-5


class Stage(NamedTuple):
    """What a stage takes for a micro-batch, in seconds, and what it sends, in bytes."""

    forward: float
    backward: float
    update: float
    activations: float
    error: float


def stage_of(row: dict[str, Any]) -> Stage:
    """The dearest stage of a measured row: the others wait for it."""
    m = row["micro_batches"]
    dearest = max(row["phases_s"], key=lambda phases: phases["forward"] + phases["backward"])
    down, back = row["sent_bytes"][0] / m, row["sent_bytes"][-1] / m
    return Stage(dearest["forward"] / m, dearest["backward"] / m, dearest["update"], down, back)


def gpipe(stage: Stage, p: int, m: int, bytes_per_s: float) -> float:
    """Seconds of a step by GPipe."""
    sent = stage.activations / bytes_per_s
    return (m + p - 1) * (max(stage.forward, sent) + max(stage.backward, sent)) + 2 * (p - 1) * LATENCY_S + stage.update


def direct(stage: Stage, p: int, m: int, bytes_per_s: float, steps: int) -> float:
    """Seconds of each of `steps` steps in a row by direct feedback."""
    sent = stage.activations / bytes_per_s
    fill = (p - 1) * (stage.forward + sent + LATENCY_S) + stage.error / bytes_per_s + LATENCY_S
    return m * (max(stage.forward, sent) + stage.backward) + stage.update + fill / steps


def data_parallel(stage: Stage, p: int, m: int, gradients: float, bytes_per_s: float) -> float:
    """Seconds of a step by DistributedDataParallel of p processes; a ring all-reduce beside the backward pass."""
    reduced = 2 * (p - 1) / p * p * gradients / bytes_per_s
    return m * (stage.forward + stage.backward) + max(0.0, reduced - m * stage.backward) + p * stage.update


def main() -> None:
    """Print both tables and draw the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="JSON of pipeline.py, of two stages")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw the prediction (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="no different: it takes a second")
    args = parser.parse_args()
    if not args.measured.exists():
        parser.error(f"--measured: there is no {args.measured}: run benchmarks/pipeline.py")
    rows = json.loads(args.measured.read_text())["rows"]
    by_key = {(row["net"], row["variant"], row["micro_batches"]): row for row in rows}
    nets = list(dict.fromkeys(row["net"] for row in rows))
    memory = float("inf")  # between processes of one machine

    print(
        "| net | micro-batches | BP GPipe, ms: model | measured | DKP, ms: model | measured | ratio: model | measured |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (net, variant, m), row in by_key.items():
        if variant == BASE:
            ours = by_key[net, DIRECT, m]
            models = [gpipe(stage_of(row), 2, m, memory), direct(stage_of(ours), 2, m, memory, STEPS)]
            measured = [each["ms"][1] / 1e3 for each in (row, ours)]
            pairs = " | ".join(f"{1e3 * a:.0f} | {1e3 * b:.0f}" for a, b in zip(models, measured, strict=True))
            print(f"| {net} | {m} | {pairs} | {models[1] / models[0]:.2f} | {ours['to_gpipe'][1]:.2f} |")

    print("\n| net | stages | " + " | ".join(f"{link} Gbit/s: to GPipe | to DDP" for link in GBITS) + " |")
    print("|---|---|" + "---|---|" * len(GBITS))
    predicted: dict[tuple[str, int], list[float]] = {}
    for net in nets:
        m = 4  # the stages of these costs; with p stages there are 2 p micro-batches, so that all schedules fill them
        chained, ours = stage_of(by_key[net, BASE, m]), stage_of(by_key[net, DIRECT, m])
        gradients = by_key[net, "BP DDP", 1]["sent_bytes"][0] / 2  # of one of two stages
        for p in STAGES:
            cells = []
            for link in GBITS:
                speed = link * 1e9 / 8
                step = direct(ours, p, 2 * p, speed, steps=100)
                to_gpipe = step / gpipe(chained, p, 2 * p, speed)
                cells.append(f"{to_gpipe:.2f} | {step / data_parallel(chained, p, 2 * p, gradients, speed):.2f}")
                predicted.setdefault((net, link), []).append(to_gpipe)
            print(f"| {net} | {p} | {' | '.join(cells)} |")
    if args.out is not None:
        plt = pyplot()
        figure, panels = plt.subplots(
            1, len(nets), figsize=(4 * len(nets), 3), dpi=150, layout="constrained", sharey=True
        )
        for panel, net in zip(panels, nets, strict=True):
            for link in GBITS:
                panel.plot(STAGES, predicted[net, link], marker="o", markersize=3, label=f"{link} Gbit/s")
            panel.set(xscale="log", xticks=STAGES, xticklabels=STAGES, xlabel="stages", title=net, ylim=(0, 1.1))
            panel.minorticks_off()
        panels[0].set_ylabel("DKP's step to GPipe's, predicted")
        panels[0].legend(fontsize=8)
        args.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out / "pipeline_model.png")
        print(f"see {args.out / 'pipeline_model.png'}")


if __name__ == "__main__":
    main()
