"""Forward-mode differentiation at the points: how the logits change with a random perturbation of every h_l.

In the training forward pass each h_l flows on as a dual number, and u_l ~ N(0, 1) is added to its tangent. The tangent
of the logits is then jvp = sum over l of dlogits/dh_l u_l. The mean of its product with u_l is dlogits/dh_l (Bacho, Chu
2024).

    grad_B_l = B_l - mean over the images of jvp^T u_l      (K, D_l); B_l follows the mean Jacobian

Shapes: N batch, K classes, D features of one block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from feedback.functional import add_correlation, feedback_point
from feedback.layout import as_rows, from_rows, is_channels_last


class FollowDerivative(torch.autograd.Function):
    """Return an empty (N, K) for `broadcast_error`. In the backward pass, grad_B = B - mean(jvp^T u), whatever e is.

    `derivative` is a list that has jvp (N, K) as its only element by then.
    """

    @staticmethod
    def forward(ctx: Any, feedback: Tensor, u: Tensor, derivative: list[Tensor]) -> Tensor:
        ctx.derivative = derivative
        ctx.save_for_backward(feedback, u)
        return u.new_empty(len(u), len(feedback))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None]:
        feedback, u = ctx.saved_tensors
        (jvp_NK,) = ctx.derivative
        channels_last = is_channels_last(feedback)
        feedback_KD, u_ND = as_rows(feedback, channels_last), as_rows(u, channels_last)
        mean_KD = add_correlation(u_ND.new_empty(feedback_KD.shape), jvp_NK.to(u.dtype) / max(1, len(u)), u_ND)
        grad_feedback_KD = feedback_KD - mean_KD if len(u) else torch.zeros_like(feedback_KD)
        return from_rows(grad_feedback_KD, feedback.shape[1:], channels_last), None, None


def perturbed_point(
    h: Tensor, feedback: Tensor, derivative: list[Tensor], name: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the empties for `broadcast_error`, and what flows on from `h`: detached, with a perturbed tangent.

    Args:
        h: (N, ...), in a `forward_ad.dual_level`, still attached to its own block's graph.
        feedback: B, (K, *h.shape[1:]).
        derivative: gets the logits' tangent (N, K) before the backward pass.
        name: of the point, for messages.
    """
    primal, tangent = forward_ad.unpack_dual(h)
    channels_last = is_channels_last(primal)
    rows_ND = torch.randn_like(as_rows(primal.detach(), channels_last), memory_format=torch.contiguous_format)
    u = from_rows(rows_ND, primal.shape[1:], channels_last)  # so drawn: torch draws in another order of memory slowly
    empties = feedback_point(primal, feedback.detach(), rule="FDFA", name=name)
    if feedback.requires_grad:
        empties = *empties, FollowDerivative.apply(feedback, u, derivative)
    # what flows on may be changed in place, and u is kept; a batch norm's tangent is float32 in bfloat16
    moved = u.clone() if tangent is None else u + tangent.detach().to(u.dtype)
    return empties, forward_ad.make_dual(primal.detach(), moved)
