"""Heads: a small net at each point, from h_l to logits of its own, that carries an error back to h_l.

LAS is the linear case. A head's parameters learn by the head's own error e_l, the gradient of the loss at its logits z.

    grad_h     = J^T e       J = dz/dh_l: by the network's error, as DFA's (HEAD)
    grad_h     = J^T e_l     by the head's own, so that a block waits for nothing (LOCAL: Nokland, Eidnes 2019;
                             Belilovsky, Eickenberg, Oyallon 2019)
    grad_theta = (dz/dtheta)^T e_l

Shapes: N batch, K classes, D features of one block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from feedback.labels import Labels

HEAD_WIDTH, HEAD_POOL = 128, 7
MakeHead = Callable[[Tensor, int], nn.Module]  # (an h_l, K) to its head


class OwnError(torch.autograd.Function):
    """Return an empty, 0-d, whose gradient is the factor that scales the loss. The logits (N, ..., K) get e_l."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Labels) -> Tensor:
        ctx.labels = labels
        ctx.save_for_backward(logits)
        return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        labels = ctx.labels._replace(shape=tuple(logits.shape[:-1]), scale=scale)
        return labels.error_of(logits.flatten(0, -2)).view_as(logits).to(logits.dtype), None


def head_point(h: Tensor, head: nn.Module, labels: Labels, own_error: bool) -> tuple[Tensor, ...]:
    """What `feedback.functional.feedback_point` is for a matrix: return empties for `broadcast_error`.

    Args:
        h: (N, ...), still attached to its own block's graph.
        head: maps h to logits (N, ..., K), the classes last.
        labels: those of the batch.
        own_error: send the head's own error to `h` instead of the network's.
    """
    if own_error:
        return (OwnError.apply(head(h), labels),)
    fixed = {name: tensor.detach() for name, tensor in head.named_parameters()}
    fixed |= {name: tensor.clone() for name, tensor in head.named_buffers()}
    return functional_call(head, fixed, h), OwnError.apply(head(h.detach()), labels)


def mlp_head(h: Tensor, classes: int, width: int = HEAD_WIDTH, pool: int = HEAD_POOL) -> nn.Sequential:
    """The head that HEAD and LOCAL have by default: average pooling, Linear, batch norm, ReLU, Linear.

    Args:
        h: such as the point's h_l, (N, D) or (N, C, H, W); the latter is averaged to `pool` x `pool` at most.
        classes: K.
        width: features between the Linears.

    Raises:
        ValueError: an h_l of other dimensions.
    """
    first: list[nn.Module] = []
    if h.dim() == 4:
        sides = tuple(min(pool, size) for size in h.shape[2:])
        first = [nn.AdaptiveAvgPool2d(sides), nn.Flatten()]
    elif h.dim() != 2:
        raise ValueError(f"a point returns {tuple(h.shape)}, expected (N, D) or (N, C, H, W): give a head of your own")
    with torch.no_grad():
        features = nn.Sequential(*first)(h[:1]).shape[1]
    norm = nn.BatchNorm1d(width, track_running_stats=False)  # it is never asked in eval mode
    return nn.Sequential(*first, nn.Linear(features, width), norm, nn.ReLU(), nn.Linear(width, classes))
