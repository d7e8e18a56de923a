"""The batches of an epoch: CIFAR-10 as it is, a CIFAR set cropped on the device, or an ImageNet folder through workers.

Every rank takes its share of the same global batches. What is random about an image is a function of seed, epoch and
place alone, so neither a resume nor the number of ranks changes it.

Shapes: N images of a rank's batch, S pixels a side.
"""

import functools
import hashlib
import itertools
import math
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.augment import centre_crops, random_crops, resize_crops
from training.data import ImageSet, epoch_order, generator, normalise
from training.distributed import rank, replica, world_size
from training.image_files import ImageFileError, ImageFiles
from training.torchvision_import import import_torchvision

Batches = Iterator[tuple[Tensor, Tensor, int]]  # images, labels, and the number of images of all ranks together
Held = tuple[Tensor, ...]  # what `Data.load` makes images and labels of, each tensor with a row per image
CPU_CHUNK = 64  # images cropped at a time, so that what lies between the two products stays in the cache


@dataclass
class Data:
    """Batches of images (N, 3, S, S) on the device, scaled to -1..1, and labels (N,).

    Attributes:
        name: the data set's name.
        where: where it was found.
        classes: the names of its classes.
        images: how many an epoch trains on, all ranks together.
        steps_after: steps_after(seen) is how many steps an epoch has after `seen` images over all ranks.
        train: train(epoch, seen) yields what `load` takes, on the device, and the number of images of all ranks, for
            each batch of the epoch after `seen` images over all ranks.
        load: load(*held) makes images and labels of it there, and is part of the step: a CUDA graph captures it.
        test: test() yields images and labels of this rank's share of the test images, and their number.
        probe: images and labels of the training set, to measure angles on.
        fingerprint: identifies the training data; a resumed run compares it.
    """

    name: str
    where: str
    classes: list[str]
    images: int
    steps_after: Callable[[int], int]
    train: Callable[[int, int], Iterator[tuple[Held, int]]]
    load: Callable[..., tuple[Tensor, Tensor]]
    test: Callable[[], Batches]
    probe: tuple[Tensor, Tensor]
    fingerprint: str


def whole_images(
    images: ImageSet,
    batch_size: int,
    test_batch_size: int,
    seed: int,
    probe_images: int,
    *,
    least: int = 1,
    limit: int | None = None,
) -> Data:
    """The images of a CIFAR set as they are, in one process.

    Args:
        images: on the device to train on.
        batch_size, test_batch_size: images a batch.
        seed: of the order.
        probe_images: how many, the first training images.
        least: a last batch of fewer images is left out.
        limit: batches of an epoch, and of a test; all by default.

    Raises:
        ValueError: no batch would be left.
    """
    count = len(images.x_train)
    steps_after = functools.partial(steps_left, count, batch_size, least, limit)
    if steps_after(0) == 0:
        raise ValueError(f"{images.source} has too few training images ({count}), expected {least} or more")

    def train(epoch: int, seen: int) -> Iterator[tuple[Held, int]]:
        order = epoch_order(count, seed, epoch)[seen:].to(images.x_train.device)
        return (((index,), len(index)) for index in order.split(batch_size))

    def load(index: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(images.x_train[index]), images.y_train[index]

    def test() -> Batches:
        pairs = zip(images.x_test.split(test_batch_size), images.y_test.split(test_batch_size), strict=True)
        return ((normalise(x), y, len(y)) for x, y in itertools.islice(pairs, limit))

    probe = (normalise(images.x_train[:probe_images]), images.y_train[:probe_images])
    return Data(
        name=images.name,
        where=images.source,
        classes=images.classes,
        images=count,
        steps_after=steps_after,
        train=train,
        load=load,
        test=test,
        probe=probe,
        fingerprint=images.sha256(),
    )


def global_batches(images: int, batch_size: int, seed: int, epoch: int, seen: int) -> list[Tensor]:
    """The index batches that are left of an epoch. A short last one is left out if a rank would get under 2 images."""
    batches = list(epoch_order(images, seed, epoch)[seen:].split(batch_size))
    if batches and len(batches[-1]) < 2 * replica()[1]:
        batches.pop()
    return batches


def share(batch: Tensor) -> slice:
    """This process's stretch of a global batch; the stretches differ by one image at most."""
    mine, shares = replica()
    return slice(len(batch) * mine // shares, len(batch) * (mine + 1) // shares)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to `device`; to a GPU without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def steps_left(images: int, batch_size: int, least: int, limit: int | None, seen: int) -> int:
    """Steps of an epoch after `seen` of its images: at most `limit` in all, and no last one of under `least` images."""
    left = min(images, (limit or images) * batch_size) - seen
    return max(0, math.ceil(left / batch_size) - (0 < left % batch_size < least))


def shared_steps(images: int, batch_size: int, limit: int | None) -> Callable[[int], int]:
    """`Data.steps_after` where every rank takes its share of the batches that `global_batches` cuts.

    Raises:
        ValueError: an epoch would have no step.
    """
    steps_after = functools.partial(steps_left, images, batch_size, 2 * replica()[1], limit)
    if steps_after(0) == 0:
        raise ValueError(f"too few training images ({images}), expected 2 or more for each of {replica()[1]} processes")
    return steps_after


def crops(images: ImageSet, size: int, batch_size: int, seed: int, probe_images: int, limit: int | None = None) -> Data:
    """RandomResizedCrop and flip for training, Resize and CenterCrop for test, a whole batch at once on the device.

    A training batch is loaded into memory that the next one overwrites.

    Args:
        images: a CIFAR set, on the device to train on.
        size: S.
        batch_size: images of a global batch.
        seed: of order, crops and flips.
        probe_images: how many, spread over the training set.
        limit: batches of an epoch, and of a test; all by default.

    Raises:
        ValueError: there are too few images.
    """
    count, side = len(images.x_train), images.x_train.shape[2]
    device = images.x_train.device

    buffer = torch.empty(-(-batch_size // replica()[1]), 3, size, size, device=device)
    chunk = CPU_CHUNK if device.type == "cpu" else batch_size

    def train(epoch: int, seen: int) -> Iterator[tuple[Held, int]]:
        for batch in global_batches(count, batch_size, seed, epoch, seen):
            mine = share(batch)
            held = batch, *random_crops(len(batch), side, generator(seed, epoch, int(batch[0])))
            yield tuple(on_device(t[mine], device) for t in held), len(batch)

    def load(index: Tensor, boxes: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        small, x = normalise(images.x_train[index]), buffer[: len(index)]
        for pixels, box, flip, out in zip(*(t.split(chunk) for t in (small, boxes, flips, x)), strict=True):
            resize_crops(pixels, box, flip, size, out)
        return x, images.y_train[index]

    def test() -> Batches:
        x, y = images.x_test[rank() :: world_size()], images.y_test[rank() :: world_size()]
        per_rank = -(-batch_size // world_size())
        pairs = zip(x.split(per_rank), y.split(per_rank), strict=True)
        for pixels, labels in itertools.islice(pairs, limit):
            yield centre_crops(normalise(pixels), size), labels, len(labels)

    spread = torch.linspace(0, count - 1, probe_images).long().to(device)
    return Data(
        name=images.name,
        where=images.source,
        classes=images.classes,
        images=count,
        steps_after=shared_steps(count, batch_size, limit),
        train=train,
        load=load,
        test=test,
        probe=(centre_crops(normalise(images.x_train[spread]), size), images.y_train[spread]),
        fingerprint=images.sha256(),
    )


def image_samples(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes of `folder`, its subfolders but hidden ones, and each image file's path and class number.

    Raises:
        ValueError: the folder cannot be read, or a class has no image.
    """
    try:
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        numbers = {name: number for number, name in enumerate(classes)}
        datasets = import_torchvision().datasets.folder
        samples = datasets.make_dataset(str(folder), numbers, extensions=datasets.IMG_EXTENSIONS)
    except OSError as error:
        raise ValueError(f"cannot read a folder of images (CLASS/*) in {folder}: {error}") from error
    return classes, [(path, label) for path, label in samples if not os.path.basename(path).startswith(".")]


def image_folder(
    folder: Path,
    size: int,
    batch_size: int,
    seed: int,
    probe_images: int,
    workers: int,
    device: torch.device,
    limit: int | None = None,
) -> Data:
    """An ImageNet folder, train/CLASS/* and val/CLASS/*, through torchvision's transforms and DataLoader workers.

    Args:
        folder: of train/ and val/.
        size, batch_size, seed, probe_images, limit: as in `crops`.
        workers: processes that read images.
        device: that the batches go to.

    Raises:
        ValueError: a folder or the images in it are missing or too few, or train and val have other classes.
        ImageFileError: an image cannot be read; also while the batches are run through.
    """
    try:
        (classes, train), (tested, test) = (image_samples(folder / split) for split in ("train", "val"))
    except ImportError as error:
        raise ValueError(f"--dataset imagenet needs torchvision: {error}") from error
    if classes != tested:
        differ = {
            name: sorted(set(one) - set(other))
            for name, one, other in (("train", classes, tested), ("val", tested, classes))
        }
        alone = "; ".join(f"{name}/ alone has {', '.join(names[:5])}" for name, names in differ.items() if names)
        raise ValueError(f"{folder}: train/ and val/ have not the same classes: {alone}")

    def read(dataset: Dataset, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        except ImageFileError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the loader, and so its workers alive
            reason = str(error).strip().splitlines()[-1]  # a worker's has that process's traceback in front
            raise ImageFileError(reason.removeprefix("training.image_files.ImageFileError: ")) from None

    def load(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(pixels), labels

    def train_batches(epoch: int, seen: int) -> Iterator[tuple[Held, int]]:
        batches = global_batches(len(train), batch_size, seed, epoch, seen)
        mine = [batch[share(batch)].tolist() for batch in batches]
        for held, batch in zip(read(ImageFiles(train, size, seed, epoch), mine), batches, strict=True):
            yield held, len(batch)

    def test_batches() -> Batches:
        mine = range(rank(), len(test), world_size())
        per_rank = -(-batch_size // world_size())
        batches = [list(mine[i : i + per_rank]) for i in range(0, len(mine), per_rank)]
        for pixels, labels in read(ImageFiles(test, size), batches[:limit]):
            yield normalise(pixels), labels, len(labels)

    spread = torch.linspace(0, len(train) - 1, probe_images).long().tolist()
    names = "\n".join(f"{Path(path).relative_to(folder)} {label}" for path, label in train)
    return Data(
        name="imagenet",
        where=str(folder),
        classes=classes,
        images=len(train),
        steps_after=shared_steps(len(train), batch_size, limit),
        train=train_batches,
        load=load,
        test=test_batches,
        probe=load(*next(read(ImageFiles(train, size), [spread]))),
        fingerprint=hashlib.sha256(os.fsencode(names)).hexdigest(),
    )


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader worker: its parent decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
