"""The direct-feedback star: one autograd Function that sends the error at the logits to every feedback point.

Shapes: N batch, K classes, D features of one block (feature maps are flattened to D).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


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


class DirectFeedbackFunction(torch.autograd.Function):
    """Identity on the logits. In the backward pass e = dL/dlogits goes straight to every feedback point l:

        grad_logits = e                                 (N, K)
        grad_h_l    = e @ B_l                           (N, D_l)  DFA, Nokland 2016
        grad_B_l    = e^T @ h_l                         (K, D_l)  DKP, Webster, Choi, Ahn 2020
        B_l        <- B_l - lr (e^T @ h_l + wd B_l)     where `inplace_lr` is given, instead of returning grad_B_l

    Not computed: anything with respect to a block's input. The activations come in cut from one another, so no
    block waits for the blocks above it. B is read in its own memory order, and h is brought to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inplace_lr: Tensor | None,
        inplace_weight_decay: float,
        logits_NK: Tensor,
        *activations_and_matrices: Tensor,
    ) -> Tensor:
        points = len(activations_and_matrices) // 2
        activations, matrices = activations_and_matrices[:points], activations_and_matrices[points:]
        inplace = inplace_lr is not None
        ctx.inplace, ctx.inplace_weight_decay = inplace, inplace_weight_decay
        ctx.dtypes = [h.dtype for h in activations]
        # `.data`: another forward's backward may change B before ours runs, and autograd need not object.
        ctx.save_for_backward(
            *(B.data if inplace else B for B in matrices),
            *([inplace_lr] if inplace else []),
            *(h for h, B in zip(activations, matrices, strict=True) if inplace or B.requires_grad),
        )
        return logits_NK.view_as(logits_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error_NK: Tensor) -> tuple[Tensor | None, ...]:
        points = len(ctx.dtypes)
        matrices, saved = ctx.saved_tensors[:points], iter(ctx.saved_tensors[points:])
        lr = next(saved) if ctx.inplace else None
        grads_h: list[Tensor | None] = [None] * points
        grads_feedback: list[Tensor | None] = [None] * points
        for i, (feedback, dtype) in enumerate(zip(matrices, ctx.dtypes, strict=True)):
            channels_last = is_channels_last(feedback)
            feedback_KD = as_rows(feedback, channels_last)
            error = error_NK.to(dtype)
            if ctx.needs_input_grad[3 + i]:
                grad_h_ND = error @ feedback_KD.to(dtype)
                grads_h[i] = from_rows(grad_h_ND, feedback.shape[1:], channels_last)
            if ctx.inplace:
                h_ND = as_rows(next(saved), channels_last).to(feedback.dtype)
                step_in_place(feedback_KD, error_NK.to(feedback.dtype), h_ND, lr, ctx.inplace_weight_decay)
            elif ctx.needs_input_grad[3 + points + i]:
                grad_feedback_KD = (error.T @ as_rows(next(saved), channels_last)).to(feedback.dtype)
                grads_feedback[i] = from_rows(grad_feedback_KD, feedback.shape[1:], channels_last)
        return None, None, error_NK, *grads_h, *grads_feedback


def step_in_place(feedback_KD: Tensor, error_NK: Tensor, h_ND: Tensor, lr: Tensor, weight_decay: float) -> None:
    """B <- B - lr (e^T @ h + wd B) where B lies; with several ranks, e^T @ h is averaged over them first."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        grad_feedback_KD = error_NK.T @ h_ND
        dist.all_reduce(grad_feedback_KD)
        feedback_KD.mul_(1 - lr * weight_decay).sub_(grad_feedback_KD.mul_(lr / ranks))
    elif torch.compiler.is_compiling():  # lr stays a tensor: a new value must not compile the net anew
        feedback_KD.mul_(1 - lr * weight_decay).sub_((lr * error_NK).T @ h_ND)
    else:
        step = lr.item()
        feedback_KD.addmm_(error_NK.T, h_ND, beta=1 - step * weight_decay, alpha=-step)


def direct_feedback(
    logits: Tensor,
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    *,
    inplace_lr: float | Tensor | None = None,
    inplace_weight_decay: float = 0.0,
) -> Tensor:
    """Return `logits` unchanged; in the backward pass, route the error at them straight to each activation.

    Direct Feedback Alignment (Nokland 2016) where the matrices are fixed; Direct Kolen-Pollack (Webster, Choi,
    Ahn 2020) where they learn. The caller detaches what flows on from each activation to the next block;
    `feedback.DirectFeedback` does that for any module.

    Args:
        logits: (N, K), the network's output before the loss.
        activations: h_l, each (N, ...), still attached to its own block's graph.
        matrices: B_l, each (K, *h_l.shape[1:]). One that requires a gradient gets e^T @ h_l.
        inplace_lr: if given, the backward pass itself steps each B, B <- B - lr (e^T @ h + wd B), after e @ B has
            been computed from the old B, and no gradient of B exists. Every backward pass is one such step. Where
            torch.distributed has a process group, e^T @ h is first averaged over its ranks. A number, or a Tensor of
            no dimensions on the CPU.
        inplace_weight_decay: wd of that step, per step and unit of learning rate as in torch.optim.SGD.

    Raises:
        ValueError: logits that are not a Tensor (N, K), an activation or a matrix of another shape, as many matrices
            as activations not given, a B that the update in place cannot write to, or that update in float16.
    """
    check_logits(logits)
    if len(activations) != len(matrices):
        raise ValueError(f"got {len(activations)} activations and {len(matrices)} feedback matrices, expected as many")
    batch, classes = logits.shape
    for i, (h, B) in enumerate(zip(activations, matrices, strict=True)):
        if h.dim() < 2 or h.shape[0] != batch:
            raise ValueError(f"activation {i} has shape {shape_of(h)}, expected ({batch}, D, ...): as many as logits")
        if B.shape != (classes, *h.shape[1:]):
            expected = (classes, *h.shape[1:])
            raise ValueError(f"feedback matrix {i} has shape {shape_of(B)}, expected {expected}: (K, *h.shape[1:])")
    if inplace_lr is not None:
        device = logits.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if torch.float16 in (autocast, logits.dtype, *(h.dtype for h in activations)):
            raise ValueError(
                "the update of B in place got float16, expected float32 or bfloat16: a GradScaler's factor would enter"
                ' B. Use bfloat16, or update="optimizer"'
            )
        for i, B in enumerate(matrices):
            if B.requires_grad or not (B.is_contiguous() or is_channels_last(B)):
                raise ValueError(
                    f"feedback matrix {i} is to be updated in place: expected requires_grad=False and contiguous or"
                    f" channels_last memory, got requires_grad={B.requires_grad} and strides {B.stride()}"
                )
        inplace_lr = torch.as_tensor(inplace_lr, dtype=torch.float64)
    return DirectFeedbackFunction.apply(inplace_lr, inplace_weight_decay, logits, *activations, *matrices)


def check_logits(logits: Any) -> None:
    """Raise ValueError unless `logits` is a Tensor (N, K)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"direct feedback needs logits of shape (N, K), got {shape_of(logits)}")


def shape_of(x: Any) -> str:
    """For messages: a Tensor's shape, or another object's type."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"
