"""Images of any size for AlexNet: a CIFAR set cropped on the device, or an ImageNet folder through DataLoader workers.

Every rank takes its share of the same global batches. What is random about an image is a function of seed, epoch and
place alone, so neither a resume nor the number of ranks changes it.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.augment import centre_crops, random_crops, resize_crops, resized_side
from training.data import Batches, ImageSet, epoch_order, normalise
from training.distributed import rank, world_size
from training.torchvision_import import import_torchvision

CPU_CHUNK = 64  # images cropped at a time, so that what lies between the two products stays in the cache


@dataclass
class Source:
    """Batches of images (n, 3, S, S) on the device, normalised to -1..1, labels (n,), and the images of all ranks.

    classes: their names.
    train_batches: (epoch, images of it that all ranks have seen) to the rest of that epoch's share.
    test_batches: to this rank's share of the test images. probe: images and labels spread over the training set.
    fingerprint: of the training data, for a resumed run to compare.
    """

    name: str
    where: str
    classes: list[str]
    train_images: int
    train_batches: Callable[[int, int], Batches]
    test_batches: Callable[[], Batches]
    probe: tuple[Tensor, Tensor]
    fingerprint: str


def global_batches(images: int, batch_size: int, seed: int, epoch: int, seen: int) -> list[Tensor]:
    """The index batches that are left of an epoch. A short last one is left out if a rank would get under 2 images."""
    batches = list(epoch_order(images, seed, epoch)[seen:].split(batch_size))
    if batches and len(batches[-1]) < 2 * world_size():
        batches.pop()
    return batches


def share(batch: Tensor) -> slice:
    """This rank's stretch of a global batch; the stretches differ by one image at most."""
    start, stop = (len(batch) * number // world_size() for number in (rank(), rank() + 1))
    return slice(start, stop)


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A random generator of its own for each (seed, *numbers)."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def cifar_source(data: ImageSet, size: int, batch_size: int, seed: int, probe_images: int) -> Source:
    """RandomResizedCrop and flip for training, Resize and CenterCrop for test, a whole batch at once on the device.

    A training batch lies in memory that the next one overwrites.
    """
    images, side = len(data.x_train), data.x_train.shape[2]
    device = data.x_train.device

    buffer = torch.empty(-(-batch_size // world_size()), 3, size, size, device=device)
    chunk = CPU_CHUNK if device.type == "cpu" else batch_size

    def train_batches(epoch: int, seen: int) -> Batches:
        for batch in global_batches(images, batch_size, seed, epoch, seen):
            boxes, flips = random_crops(len(batch), side, generator(seed, epoch, int(batch[0])))
            mine = share(batch)
            index = batch[mine].to(device)
            small = normalise(data.x_train[index])
            x = buffer[: len(index)]
            for part in zip(*(t.split(chunk) for t in (small, boxes[mine], flips[mine], x)), strict=True):
                resize_crops(*part[:3], size, out=part[3])
            yield x, data.y_train[index], len(batch)

    def test_batches() -> Batches:
        x, y = data.x_test[rank() :: world_size()], data.y_test[rank() :: world_size()]
        per_rank = -(-batch_size // world_size())
        for images, labels in zip(x.split(per_rank), y.split(per_rank), strict=True):
            yield centre_crops(normalise(images), size), labels, len(labels)

    spread = torch.linspace(0, images - 1, probe_images).long().to(device)
    probe = (centre_crops(normalise(data.x_train[spread]), size), data.y_train[spread])
    return Source(data.name, data.source, data.classes, images, train_batches, test_batches, probe, data.sha256())


class SeededImages(Dataset):
    """An image folder whose random transform of image i is a function of (seed, epoch, i)."""

    def __init__(self, folder: Dataset, seed: int, epoch: int) -> None:
        self.folder, self.seed, self.epoch = folder, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image (3, S, S) and its label."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(self.seed, self.epoch, index).get_state())
            return self.folder[index]


def folder_source(
    folder: Path, size: int, batch_size: int, seed: int, probe_images: int, workers: int, device: torch.device
) -> Source:
    """An ImageNet folder, train/CLASS/* and val/CLASS/*, through torchvision's transforms and DataLoader workers.

    Raises:
        ValueError: a folder or the images in it are missing, or train and val have other classes.
    """
    try:
        datasets = import_torchvision().datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise ValueError(f"--dataset imagenet needs torchvision: {error}") from error
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_tensor])
    centre = v2.Compose([v2.Resize(resized_side(size)), v2.CenterCrop(size), *to_tensor])
    try:
        train = datasets.ImageFolder(folder / "train", random)
        plain, test = datasets.ImageFolder(folder / "train", centre), datasets.ImageFolder(folder / "val", centre)
    except OSError as error:
        raise ValueError(f"cannot read an ImageNet folder (train/CLASS/*, val/CLASS/*) in {folder}: {error}") from error
    if train.classes != test.classes:
        raise ValueError(f"{folder}: train/ has {len(train.classes)} classes, val/ not the same ones")

    def load(dataset: Dataset, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def train_batches(epoch: int, seen: int) -> Batches:
        batches = global_batches(len(train), batch_size, seed, epoch, seen)
        mine = [batch[share(batch)].tolist() for batch in batches]
        for (x, y), batch in zip(load(SeededImages(train, seed, epoch), mine), batches, strict=True):
            yield x, y, len(batch)

    def test_batches() -> Batches:
        mine = range(rank(), len(test), world_size())
        per_rank = -(-batch_size // world_size())
        for x, y in load(test, [list(mine[i : i + per_rank]) for i in range(0, len(mine), per_rank)]):
            yield x, y, len(y)

    spread = torch.linspace(0, len(train) - 1, probe_images).long().tolist()
    probe = next(load(plain, [spread]))
    names = "\n".join(f"{Path(path).relative_to(folder)} {label}" for path, label in train.samples)
    fingerprint = hashlib.sha256(names.encode()).hexdigest()
    return Source("imagenet", str(folder), train.classes, len(train), train_batches, test_batches, probe, fingerprint)


def ignore_signals(worker: int) -> None:
    """Let the process that a DataLoader worker serves decide when to stop, where a signal goes to all of them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
