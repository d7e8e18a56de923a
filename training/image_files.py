"""Image files, read one at a time with Pillow: for --classify, and for the DataLoader workers of an ImageNet folder.

Shapes: S pixels a side.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from training.augment import resized_side
from training.data import generator
from training.torchvision_import import import_torchvision


class ImageFileError(ValueError):
    """A file is no image, or not a whole one, or cannot be read; the message names it."""


def read_rgb(path: str, upright: bool = False) -> Image.Image:
    """Read an image file as RGB with 8 bits a channel, turned `upright` as its EXIF data say where asked for.

    Raises:
        ImageFileError: naming the file.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageFileError(f"{path} cannot be read as an image: {reason}") from error


@functools.cache
def transform(size: int, random: bool) -> Callable[[Image.Image], Tensor]:
    """torchvision's transform to (3, S, S) uint8: a random crop and flip, or the centre."""
    v2 = import_torchvision().transforms.v2
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    if not random:
        crop = [v2.Resize(resized_side(size)), v2.CenterCrop(size)]
    return v2.Compose([*crop, v2.ToImage()])


class ImageFiles(Dataset):
    """Image files and their labels, cropped to (3, S, S) uint8: at random where a seed is given, else the centre.

    The random crop of image i is a function of (seed, epoch, i). Holds names and numbers alone, so that a worker
    process of any start method can take it over.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], size: int, seed: int | None = None, epoch: int = 0) -> None:
        self.samples, self.size, self.seed, self.epoch = samples, size, seed, epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The cropped image (3, S, S) and its label; ImageFileError where the file cannot be read."""
        path, label = self.samples[index]
        image = read_rgb(path)
        if self.seed is None:
            return transform(self.size, random=False)(image), label
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(self.seed, self.epoch, index).get_state())
            return transform(self.size, random=True)(image), label
