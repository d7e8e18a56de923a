"""Logits and activations with positions: tokens of a sequence, pixels of an image.

Shapes: N batch, *P positions, K classes or features, which stand last here.

Where a point has other positions than the logits, an affine readout of it would be averaged to the logits' positions
(`to_positions`), as `F.adaptive_avg_pool2d` does, or repeated where the logits have more. The error takes the adjoint
of that way back (`from_positions`): its sum over the positions stays the same.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_dims(
    activations: Mapping[str, Tensor],
    logits: Tensor,
    positions: str,
    class_dim: int | None,
    feature_dim: int | Mapping[str, int] | None,
) -> dict[str, int]:
    """In which dimension each point's h_l has its features.

    Raises:
        ValueError: that is not said of an h_l of four or more dimensions, or it has no such dimension, or other
            positions than can be brought to those of the logits.
    """
    found = {}
    for point, h in activations.items():
        said = feature_dim.get(point) if isinstance(feature_dim, Mapping) else feature_dim
        said = class_dim if said is None else said
        if said is None and h.dim() > 3:
            raise ValueError(
                f"point {point!r} returns {tuple(h.shape)}, and in which dimension the features are is not said: give"
                " class_dim or feature_dim"
            )
        found[point] = -1 if said is None or h.dim() == 2 else said
        if found[point] not in [*range(1, h.dim()), *range(1 - h.dim(), 0)]:
            raise ValueError(f"point {point!r} returns {tuple(h.shape)}, expected features in dimension {said}")
        if positions == "own" and h.dim() not in (2, logits.dim()):
            raise ValueError(
                f"point {point!r} returns {tuple(h.shape)}, and the logits are {tuple(logits.shape)}: expected as many"
                ' dimensions; with positions="pooled" each sample has one error'
            )
    return found


def features_last(h: Tensor, feature_dim: int, positions: str | None) -> Tensor:
    """What B meets of an activation: (N, *P, D), or with `positions="pooled"` its mean (N, D); with None h itself."""
    if positions is None:
        return h
    h = h.movedim(feature_dim, -1)
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
