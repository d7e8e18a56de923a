"""torchvision's crops for a whole batch at once, on the device where the images lie.

Shapes: N images, S pixels a side of the result. A bilinear resize is a matrix product from either side of an image.
"""

import math

import torch
from torch import Tensor

SCALE, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision.transforms.RandomResizedCrop's


def random_crops(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw crops of square images as RandomResizedCrop with RandomHorizontalFlip does.

    Returns:
        boxes (n, 4) int64, each top, left, height, width in pixels; flips (n,) bool; both on the CPU.
    """
    area = side * side * torch.empty(n, ATTEMPTS).uniform_(*SCALE, generator=generator)
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = torch.empty(n, ATTEMPTS).uniform_(low, high, generator=generator).exp()
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.long().argmax(1, keepdim=True)  # the first attempt that fits; where none does, the whole image
    height, width = (
        torch.where(fits.any(1), size.gather(1, first).squeeze(1), torch.tensor(side)) for size in (height, width)
    )
    place = torch.rand(2, n, generator=generator)
    top, left = ((place * (side + 1 - torch.stack((height, width)))).long()).unbind()
    flips = torch.rand(n, generator=generator) < 0.5
    return torch.stack((top, left, height, width), dim=1), flips


def resize_weights(start: Tensor, length: Tensor, side: int, size: int, flips: Tensor | None = None) -> Tensor:
    """Bilinear weights (N, size, side) that enlarge pixels [start, start + length) of a line to `size`.

    A pixel counts by a triangle around the place where the result's centre falls, held within the stretch:
    torchvision's resize, where nothing shrinks and so nothing needs antialiasing.

    Args:
        start, length: (N,) in pixels; length at most `size`.
        side: pixels of the line.
        size: pixels of the result.
        flips: (N,) bool, end for start.
    """
    start, length = start.view(-1, 1).float(), length.view(-1, 1).float()
    centres = start + (torch.arange(size, device=start.device) + 0.5) * (length / size)
    centres = torch.minimum(torch.maximum(centres, start + 0.5), start + length - 0.5)
    if flips is not None:
        centres = torch.where(flips.view(-1, 1), centres.flip(1), centres)
    pixels = torch.arange(side, device=start.device) + 0.5
    return (pixels - centres.unsqueeze(2)).abs_().neg_().add_(1).clamp_(min=0)


def resize_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """Cut a box out of each image, enlarge it to `size` x `size`, flip it where asked for.

    Args:
        images: (N, 3, H, H) float32. Normalise before, not after: it is the smaller tensor, and gives the same result.
        boxes: (N, 4) beside them, top, left, height, width in pixels.
        flips: (N,) bool, left for right.
        size: S, at least H.
        out: (N, 3, S, S) to write to, if given. Memory that is used again costs no page faults.

    Returns:
        (N, 3, S, S) float32.
    """
    n, channels, side, _ = images.shape
    top, left, height, width = boxes.unbind(1)
    rows = resize_weights(top, height, side, size)
    columns = resize_weights(left, width, side, size, flips)
    narrow = torch.bmm(rows, images.transpose(1, 2).reshape(n, side, channels * side))  # (N, S, 3 * H)
    narrow = narrow.view(n, size, channels, side).transpose(1, 2).reshape(n, channels * size, side)
    if out is None:
        out = images.new_empty(n, channels, size, size)
    torch.bmm(narrow, columns.transpose(1, 2), out=out.view(n, channels * size, size))
    return out


def resized_side(size: int) -> int:
    """The pixels that a test image's shorter side is resized to before its centre is cut out: 256 for 224."""
    return round(size * 256 / 224)


def centre_crops(images: Tensor, size: int) -> Tensor:
    """Enlarge each image to 256/224 of `size` and cut out its centre: (N, 3, H, H) to (N, 3, S, S), S at least H."""
    side, resized = images.shape[2], resized_side(size)
    zero = torch.zeros(1, device=images.device)
    weights = resize_weights(zero, zero + side, side, resized)
    edge = round((resized - size) / 2)
    weights = weights[:, edge : edge + size]
    return weights @ images @ weights.transpose(1, 2)
