"""The built-in synthetic image set: hard enough that how the hidden blocks learn makes a difference."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES, CELLS, SHIFT = 4, 6, 2  # silhouettes of a class, coarse cells a side that they grow from, shift in pixels
HUE, CLOUDS, NOISE = 0.2, 0.7, 0.2  # contrasts, beside a fill of about 0.8
SCENES, SCENE_SHIFT = 1000, 16
CHUNK = 2000  # images made at once, to spare memory


def synthetic_images(num_classes: int, train: int, test: int, seed: int = 0) -> dict[str, Tensor]:
    """Make a labelled image set, the same for the same arguments, in a few seconds and without files.

    A class is four silhouettes, each with a faint hue of its own. An image is one silhouette of its class, flipped or
    not and shifted by up to two pixels each way, filled with a colour drawn anew, before a cloudy scene, with pixel
    noise. It is hard because the fill is as often darker than the scene as lighter: the outline tells the class, single
    pixels hardly. From 20,000 images of 10 classes ridge regression on the pixels gets 39 %, and 18 % without the
    hue.

    Returns:
        x_train, x_test: uint8 (N, 32, 32, 3) RGB; y_train, y_test: int64 (N,), the classes in turn.
    """
    generator = torch.Generator().manual_seed(seed)

    def colours(*shape: int) -> Tensor:
        """Random colours (*shape, 3), zero for mid-grey, that differ more in brightness than in hue."""
        brightness, hue = (torch.randn(*shape, channels, generator=generator) for channels in (1, 3))
        return 0.7 * brightness + 0.3 * hue

    def smooth(cells: Tensor) -> Tensor:
        """Enlarge (n, s, s, c) to (n, 32, 32, c)."""
        return F.interpolate(cells.movedim(3, 1), size=32, mode="bilinear").movedim(1, 3).contiguous()

    def view_of(images: Tensor, index: Tensor, shift: int) -> Tensor:
        """The images of these indices, (n,) to (n, 32, 32, c), each flipped or not and shifted with wrap-around."""
        shifts = torch.randint(-shift, shift + 1, (2, len(index), 1), generator=generator)
        rows, columns = (torch.arange(32) + shifts) % 32
        flipped = torch.rand(len(index), 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    blobs = smooth(torch.randn(num_classes * SHAPES, CELLS, CELLS, 1, generator=generator))
    blobs /= blobs.std((1, 2, 3), keepdim=True)
    square = torch.linspace(-1, 1, 32).square()[:, None]
    masks = (0.5 + 3 * (blobs + 0.9 - 1.8 * (square + square[:, None]))).clamp(0, 1)  # 1 inside, most of it central
    hues = torch.randn(num_classes * SHAPES, 1, 1, 3, generator=generator)
    scenes = torch.zeros(())
    for cells in (1, 2, 4, 8, 16, 32):
        scenes = scenes + smooth(colours(SCENES, cells, cells)) / cells**0.8

    labels = torch.arange(train + test) % num_classes
    images = torch.empty(len(labels), 32, 32, 3, dtype=torch.uint8)
    for chunk, label in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        shape = label * SHAPES + torch.randint(SHAPES, label.shape, generator=generator)
        x = CLOUDS * view_of(scenes, torch.randint(SCENES, label.shape, generator=generator), SCENE_SHIFT)
        fill = colours(len(label), 1, 1) + HUE * hues[shape]
        x += view_of(masks, shape, SHIFT) * (fill - x)
        x += NOISE * torch.randn(x.shape, generator=generator)
        chunk.copy_((127.5 + 50 * x).clamp_(0, 255))
    return {"x_train": images[:train], "y_train": labels[:train], "x_test": images[train:], "y_test": labels[train:]}
