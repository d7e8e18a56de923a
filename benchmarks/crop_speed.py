"""Images per second of AlexNet's training pipeline on a CIFAR set: whole batches on the device, or one by one.

Run:    python benchmarks/crop_speed.py
Prints a table: RandomResizedCrop(224), flip and normalisation of 32x32 images, in batches of 256, for a whole batch at
once (training/augment.py) and by torchvision's transforms per image in 4 DataLoader workers; rounds are interleaved.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import write_raw
from training.arguments import positive_int
from training.batches import crops
from training.data import checked_set
from training.machine import hardware
from training.synthetic import synthetic_images
from training.torchvision_import import import_torchvision

BATCH, SIZE, WORKERS = 256, 224, 4


class PerImage(Dataset):
    """The same images as PIL images through torchvision's transforms."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        v2 = import_torchvision().transforms.v2
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.labels = labels
        normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), *normalise])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One cropped image and its label."""
        return self.transform(self.images[index]), int(self.labels[index])


def images_per_second(batches: Iterable[Any], device: torch.device) -> float:
    """Run through a stream of batches; the first one, which starts workers and touches memory, does not count."""
    stream = iter(batches)
    next(stream)
    start, images = time.perf_counter(), 0
    for batch in stream:
        images += len(batch[1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=5, help="of 11 batches each (default: 5)")
    parser.add_argument("--device", default="cpu", help="where the whole-batch pipeline runs (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    arrays = synthetic_images(100, 12 * BATCH, BATCH)
    data = checked_set("synthetic", "made for this", 100, arrays)
    whole = crops(data.to(device), SIZE, BATCH, 1, 2)
    loader = DataLoader(PerImage(data.x_train, data.y_train), BATCH, shuffle=True, num_workers=WORKERS)
    speeds: dict[str, list[float]] = {"whole batches": [], f"torchvision, {WORKERS} workers": []}
    for epoch in tqdm(range(1 if args.quick else args.rounds), unit="round", leave=False, disable=None):
        loaded = (whole.load(*held) for held, _ in whole.train(epoch + 1, 0))
        speeds["whole batches"].append(images_per_second(loaded, device))
        speeds[f"torchvision, {WORKERS} workers"].append(images_per_second(loader, torch.device("cpu")))
    print(f"{hardware(device)}, torch {torch.__version__}, {len(speeds['whole batches'])} rounds")
    print("| pipeline | images/s, median | least | most |\n|---|---|---|---|")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(f"ratio, round by round: median {statistics.median(ratios):.1f}, least {min(ratios):.1f}")
    if not args.quick:
        write_raw("crop_speed", device, [{"pipeline": name, "images_per_s": values} for name, values in speeds.items()])


if __name__ == "__main__":
    main()
