"""Logits and activations with positions: tokens of a sequence, pixels of an image.

Shapes: N batch, *P positions, K classes or features, which stand last here.

Where a point has other positions than the logits, an affine readout of it would be averaged to the logits' positions
(`to_positions`), as `F.adaptive_avg_pool2d` does, or repeated where the logits have more. The error takes the adjoint
of that way back (`from_positions`): its sum over the positions stays the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def features_last(h: Tensor, class_dim: int, positions: str | None) -> Tensor:
    """What B meets of an activation: (N, *P, D), or with `positions="pooled"` its mean (N, D); with None h itself."""
    if positions is None:
        return h
    h = h.movedim(class_dim, -1)
    return h.flatten(1, -2).mean(1) if positions == "pooled" and h.dim() > 2 else h


def to_positions(readout: Tensor, positions: Sequence[int]) -> Tensor:
    """(N, *Q, K) averaged to (N, *positions, K), or repeated; (N, K) is repeated at each of the positions."""
    if readout.dim() == 2 and len(positions):
        return readout.unflatten(0, (-1, *[1] * len(positions))).expand(-1, *positions, -1)
    for dim, size in enumerate(positions, start=1):
        if readout.shape[dim] != size:
            readout = along(readout, dim, averaging(readout.shape[dim], size, readout))
    return readout


def from_positions(error: Tensor, positions: Sequence[int]) -> Tensor:
    """The adjoint of `to_positions`: (N, *P, K) to (N, *positions, K), or summed to (N, K) where those are none."""
    if not len(positions):
        return error.flatten(1, -2).sum(1) if error.dim() > 2 else error
    for dim, size in enumerate(positions, start=1):
        if error.shape[dim] != size:
            error = along(error, dim, averaging(size, error.shape[dim], error).T)
    return error


def averaging(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """The matrix (inputs, outputs) by which adaptive average pooling takes one length to the other."""
    return F.adaptive_avg_pool1d(torch.eye(inputs, dtype=like.dtype, device=like.device), outputs)


def along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Multiply one dimension of `x` by `matrix`."""
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)
