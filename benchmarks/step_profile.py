"""Where the time of a training step goes: milliseconds per operator, for each rule, on a CPU.

Run:    python benchmarks/step_profile.py
Prints for ConvNet at batch 64, in both memory formats, the median over the steps of each operator's own time; the steps
of the variants (see step_time.py) are interleaved in random order. The profiler itself slows each of them a little.
"""

import argparse
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import write_raw
from benchmarks.step_time import VARIANTS, WARM_UP, Cell, make_step
from training.arguments import positive_int
from training.machine import hardware, reuse_memory

DEVICE, BATCH, SHOWN = torch.device("cpu"), 64, 14


def operator_times(memory_format: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds per step of each operator's own time, by variant and operator's name."""
    way = (memory_format, "fp32", "eager")
    steps = {variant: make_step(Cell("ConvNet", BATCH, [way]), variant, way, DEVICE) for variant in VARIANTS}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    found: dict[str, dict[str, list[float]]] = {variant: defaultdict(list) for variant in steps}
    for _ in range(rounds):
        for variant in random.sample(list(steps), len(steps)):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                steps[variant]()
            for event in profiler.key_averages():
                found[variant][event.key].append(event.self_cpu_time_total / 1e3)
    return {
        variant: {name: statistics.median(times) for name, times in by_name.items()}
        for variant, by_name in found.items()
    }


def main() -> None:
    """Measure and print a table for each memory format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=40, help="profiled steps of each variant (default: 40)")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    reuse_memory()
    print(f"{hardware(DEVICE)}, torch {torch.__version__}, {rounds} rounds")
    raw = []
    for memory_format in ("contiguous", "channels_last"):
        times = operator_times(memory_format, rounds)
        names = sorted(set().union(*times.values()), key=lambda name: -max(t.get(name, 0) for t in times.values()))
        print(f"\n| {memory_format}, ms | {' | '.join(VARIANTS)} |\n|---|{'---|' * len(VARIANTS)}")
        for name in names[:SHOWN]:
            print(f"| {name} | {' | '.join(f'{times[variant].get(name, 0):.2f}' for variant in VARIANTS)} |")
        print(f"| all | {' | '.join(f'{sum(times[variant].values()):.2f}' for variant in VARIANTS)} |")
        raw += [{"memory_format": memory_format, "variant": variant, "ms": times[variant]} for variant in VARIANTS]
    if not args.quick:
        write_raw("step_profile", DEVICE, raw)


if __name__ == "__main__":
    main()
