"""A CIFAR-10 epoch of main.py, by each rule, against the same net trained the usual way; from start to end.

Run:    python benchmarks/epoch_time.py --data DIR
Prints a table of seconds per epoch, training and test both, and the ratio to the usual way round by round. The usual
way is backpropagation with a DataLoader of two workers, and a transform to tensor and a normalisation of each image.
main.py's time includes reading the set, angles and checkpoints; the usual way's images lie ready as PIL images.
"""

import argparse
import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as script
from benchmarks.raw import write_raw
from models import ConvNet
from training.arguments import positive_int
from training.data import ImageSet, load_images
from training.machine import hardware, reuse_memory
from training.torchvision_import import import_torchvision

BATCH, TEST_BATCH, WORKERS = 50, 1000, 2
RUNS = {
    "main.py BP": ["--train-mode", "BP"],
    "main.py DFA": ["--train-mode", "DFA"],
    "main.py DKP": ["--train-mode", "DKP"],
    "main.py DKP inplace": ["--train-mode", "DKP", "--b-update", "inplace"],
}


class PerImage(Dataset):
    """Images as PIL images, transformed one by one."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        transforms = import_torchvision().transforms
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
        self.labels = y.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One image (3, 32, 32) and its label."""
        return self.transform(self.images[index]), self.labels[index]


def usual_epoch(train: Dataset, test: Dataset) -> None:
    """Train for an epoch and test, as most scripts do."""
    torch.manual_seed(1)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), 5e-4, momentum=0.9, nesterov=True, weight_decay=1e-6)
    for x, y in DataLoader(train, BATCH, shuffle=True, num_workers=WORKERS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for x, y in DataLoader(test, TEST_BATCH, num_workers=WORKERS):
            (model(x).argmax(1) == y).sum().item()


def of_main(flags: list[str], dataset: str, folder: str, quick: bool) -> None:
    """An epoch of main.py in this process."""
    common = [
        "--no-cuda",
        "--recipe",
        "original",
        "--dataset",
        dataset,
        "--data",
        folder,
        "--batch-size",
        str(BATCH),
        "--epochs",
        "1",
    ]
    with tempfile.TemporaryDirectory() as out:
        if script.main([*common, *flags, "--out", out, *(["--dry-run"] if quick else [])]) != 0:
            raise RuntimeError(f"main.py {' '.join(flags)} failed")


def first_images(data: ImageSet, quick: bool) -> tuple[Dataset, Dataset]:
    """Training and test images for the usual way; of --quick, one batch of each."""
    train, test = (BATCH, TEST_BATCH) if quick else (len(data.x_train), len(data.x_test))
    return PerImage(data.x_train[:train], data.y_train[:train]), PerImage(data.x_test[:test], data.y_test[:test])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="data", metavar="DIR", help="folder where CIFAR-10 is found (default: ./data)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="epochs of each (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="one step of each on the synthetic set, to see that it runs"
    )
    args = parser.parse_args()
    reuse_memory()
    data = load_images("synthetic" if args.quick else None, args.data)
    train, test = first_images(data, args.quick)
    ways: dict[str, Callable[[], None]] = {"the usual way": lambda: usual_epoch(train, test)}
    for name, flags in RUNS.items():
        ways[name] = functools.partial(of_main, flags, data.name, args.data, args.quick)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rounds = 1 if args.quick else args.rounds
    with tqdm(total=rounds * len(ways), unit="epoch", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, epoch in random.sample(list(ways.items()), len(ways)):
                start = time.perf_counter()
                epoch()
                seconds[name].append(time.perf_counter() - start)
                bar.update()
    print(f"{data.source}; {hardware(torch.device('cpu'))}, torch {torch.__version__}, {rounds} rounds")
    print("| | seconds, median | least | most | to the usual way |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["the usual way"], strict=True))
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} | {ratio:.2f} |")
    if not args.quick:
        rows = [{"way": name, "seconds": values} for name, values in seconds.items()]
        write_raw("epoch_time", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
