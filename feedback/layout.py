"""How B and the activations lie in memory, and how many images a product with B takes.

Shapes: N batch, K classes, D features of one block.
"""

import torch
from torch import Tensor

FEW_IMAGES, PAGE_BYTES, CACHED_BYTES = range(16, 7, -1), 2**12, 2**21  # see `images_at_a_time`


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory of `x` is ordered (N, H, W, C) and in no other way."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def as_rows(x: Tensor, channels_last: bool) -> Tensor:
    """Flatten (N, ...) to (N, D); a view where the memory of `x` has the order that `channels_last` names."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).flatten(1)


def from_rows(rows_ND: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """Undo `as_rows`: view (N, D) as (N, *shape)."""
    if not channels_last:
        return rows_ND.view(-1, *shape)
    channels, height, width = shape
    return rows_ND.view(-1, height, width, channels).permute(0, 3, 1, 2)


def images_at_a_time(feedback_KD: Tensor, batch: int) -> int:
    """Images per product with B: a few on a CPU if B fits in cache, otherwise the whole batch.

    A product over the whole batch touches many pages of memory at once. Splitting helps only if each row fills a page.
    Half precision takes the whole batch: a sum of e^T @ h over pieces would be rounded at each.
    """
    if torch.compiler.is_compiling() or feedback_KD.device.type != "cpu" or feedback_KD.itemsize < 4:
        return batch
    if not PAGE_BYTES * len(feedback_KD) <= feedback_KD.nbytes <= CACHED_BYTES:
        return batch
    return next((rows for rows in FEW_IMAGES if batch % rows == 0), batch)
