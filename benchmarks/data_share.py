"""How much of a training step on CIFAR-10-sized data is data handling: picking, copying and normalising a batch.

Run:    python benchmarks/data_share.py
Prints, for a DKP step of main.py at each batch size, the median milliseconds of both parts, and the data's share.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import write_raw
from feedback import DirectFeedback
from models import ConvNet
from training.arguments import positive_int
from training.batches import whole_images
from training.data import ImageSet
from training.machine import hardware


def measure(batch_size: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of data handling and of the rest of the step, each for `steps` steps after five to warm up."""
    images = max(50_000, (steps + 5) * batch_size)
    x = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(10, (images,))
    model = ConvNet()
    net = DirectFeedback(model, model.points, "DKP", torch.zeros(1, 3, 32, 32))
    optimizers = [
        torch.optim.SGD(model.parameters(), 5e-4, momentum=0.9, nesterov=True, weight_decay=1e-6, fused=True),
        torch.optim.Adam(net.feedback.parameters(), 1e-4, weight_decay=1e-6, fused=True),
    ]
    data_s, step_s = [], []
    data = whole_images(ImageSet("random", "random", 10, x, y, x[:1], y[:1]), batch_size, 1, seed=1, probe_images=1)
    stream = data.train(1, 0)
    for _ in tqdm(range(steps + 5), desc=f"batch {batch_size}", unit="step", leave=False, disable=None):
        start = time.perf_counter()
        held, _ = next(stream)
        batch, labels = data.load(*held)
        got = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(net(batch), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        data_s.append(got - start)
        step_s.append(time.perf_counter() - got)
    return data_s[5:], step_s[5:]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=200, help="timed steps per batch size (default: 200)")
    parser.add_argument("--quick", action="store_true", help="five steps, to see that it runs")
    args = parser.parse_args()
    print(f"{hardware(torch.device('cpu'))}, torch {torch.__version__}")
    print("| batch | data, ms | rest of the step, ms | data's share |\n|---|---|---|---|")
    rows = []
    for batch_size in (50, 64, 512):
        data_s, step_s = measure(batch_size, 5 if args.quick else args.steps)
        rows.append({"batch": batch_size, "data_s": data_s, "step_s": step_s})
        share = sum(data_s) / (sum(data_s) + sum(step_s))
        data_ms, step_ms = 1e3 * statistics.median(data_s), 1e3 * statistics.median(step_s)
        print(f"| {batch_size} | {data_ms:.2f} | {step_ms:.2f} | {100 * share:.1f} % |")
    if not args.quick:
        write_raw("data_share", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
