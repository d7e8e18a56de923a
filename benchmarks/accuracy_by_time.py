"""Test accuracy against training time: committed sweeps of CIFAR-10, and a training step of each rule measured here.

Run:    OMP_NUM_THREADS=1 python benchmarks/accuracy_by_time.py
A step is main.py's by the rule's best recipe, as the sweeps are run: forward, backward and optimisers in bfloat16 and
channels_last. The rules are timed in random order, round by round; a curve's time is its epochs times the median step.
Prints a table, and writes every single time as JSON and the picture as PNG.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from benchmarks.raw import MEASURED, write_raw
from benchmarks.step_time import Step, quartiles, seconds, warm_up
from feedback import RULES
from models import ConvNet
from training.arguments import positive_int
from training.machine import REPOSITORY, hardware, reuse_memory
from training.optim import autocast, make_optimizers, wrap
from training.plot import Panel, draw, read_metrics

SWEEPS = tuple(f"cifar10-{name}-12-epochs" for name in ("best", "dkp", "drtp", "heads"))
CPU = torch.device("cpu")
IMAGES = 50_000  # of an epoch


def make_step(mode: str) -> tuple[Step, int]:
    """A training step of main.py by `mode` with its best recipe, and the images it takes."""
    args, _, _ = main.parse_arguments(["--train-mode", mode, "--precision", "bf16", "--channels-last"])
    torch.manual_seed(0)
    x, y = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))
    net = wrap(args, ConvNet(10, args.fc_norm), x[:1])
    optimizers = make_optimizers(args, net, nesterov=True)
    x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with autocast(args, CPU):
            loss = F.cross_entropy(net(x, target=y), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step, args.batch_size


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each rule: quartiles of a step in ms and as a ratio to BP's, and all times in seconds."""
    made = {mode: make_step(mode) for mode in RULES}
    for step, _ in made.values():
        warm_up(step, CPU)
    times: dict[str, list[float]] = {mode: [] for mode in made}
    order = list(made)
    for _ in range(rounds):
        random.shuffle(order)
        for mode in order:
            times[mode].append(seconds(made[mode][0], CPU))
    rows = []
    for mode, ours in times.items():
        row = {"rule": mode, "batch": made[mode][1], "ms": [1e3 * value for value in quartiles(ours)]}
        ratios = [a / b for a, b in zip(ours, times["BP"], strict=True)]
        rows.append(row | {"to_BP": quartiles(ratios), "seconds": ours})
    return rows


def run() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=100, help="timed steps of each rule (default: 100)")
    parser.add_argument(
        "--out", type=Path, default=MEASURED, metavar="DIR", help="of the files (default: runs/benchmarks)"
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, no files: to see that it runs")
    args = parser.parse_args()
    reuse_memory()
    rows = measure(3 if args.quick else args.rounds)
    swept = [row for name in SWEEPS for row in read_metrics(REPOSITORY / "benchmarks" / "results" / name)]
    curves = {mode: [row for row in swept if row["mode"] == mode] for mode in RULES}
    print(f"{hardware(CPU)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| rule | step, ms | to BP | 12 epochs, minutes | test accuracy, % |\n|---|---|---|---|---|")
    minutes = {}
    for row in rows:
        mode, (low, median, high) = row["rule"], row["to_BP"]
        minutes[mode] = row["ms"][1] / 6e4 * IMAGES / row["batch"]
        last = [float(of["test_accuracy"]) for of in curves[mode] if of["epoch"] == "12"]
        shown = f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        whole = f"{12 * minutes[mode]:.1f} | {shown}"
        print(f"| {mode} | {row['ms'][1]:.1f} | {median:.2f} ({low:.2f}-{high:.2f}) | {whole} |")
    if not args.quick:
        write_raw("accuracy_by_time", CPU, rows, args.out)
        panel = Panel("test_accuracy", "", "test accuracy, %")
        draw(curves, [panel], args.out / "accuracy_by_time.png", (8, 4.5), per_row=1, minutes=minutes)


if __name__ == "__main__":
    run()
