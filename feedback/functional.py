"""The direct-feedback star: the error at the logits goes straight to every feedback point.

Two autograd Functions make it. `FeedbackPoint` stands at a block's output and holds the products with B; `Broadcast`
stands at the logits and hands e = dL/dlogits to all of them. Autograd runs nodes in reverse order of creation. A point
is created when its block ends, so it runs just before that block's backward: only one learning signal is in memory at a
time.

Shapes: N batch, K classes, D features of one block (feature maps are flattened to D). Where the logits have positions,
e and h have them too, in front of K and D, and N counts the positions of the whole batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from feedback import inplace
from feedback.checks import FLOAT16_IN_PLACE, check_logits, check_point, refuse_float16, shape_of
from feedback.labels import Labels
from feedback.layout import as_rows, from_rows, images_at_a_time, is_channels_last
from feedback.positions import from_positions
from feedback.rules import RULES


class FeedbackPoint(torch.autograd.Function):
    """The forward pass returns an empty (N, K). In the backward pass its gradient is e = dL/dlogits; from e it computes

        grad_h = sent @ B                (N, D)  sent is e but for rules that say otherwise: DFA, Nokland 2016
        grad_B = correlated^T @ h        (K, D)  where B learns: e for DKP, Webster, Choi, Ahn 2020
        B     <- B - lr (grad_B + wd B)          where `inplace_lr` is given, instead of returning grad_B

    with the (N, K) errors `sent` and `correlated` of feedback/rules. Not computed: anything with respect to a block's
    input. The activations come in cut from one another, so no block waits for the blocks above it. B is read in its
    own memory order, and h is brought to it. For rules that read the labels a second empty, 0-d, has the factor
    by which the loss is scaled as its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rule: str,
        inplace_lr: Tensor | None,
        inplace_weight_decay: Tensor | None,
        group: Any,
        found_inf: Tensor | None,
        labels: Labels | None,
        h: Tensor,
        feedback: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # as attributes: a checkpointed block runs again in the backward pass, and would save what is newest
        ctx.rule, ctx.dtype, ctx.labels = rule, h.dtype, labels
        ctx.step = inplace_lr, inplace_weight_decay, group, found_inf
        learns = feedback.requires_grad or inplace_lr is not None
        # a B in place is itself stepped, and maybe by another backward pass before this one: no saved copy, no version
        ctx.feedback = None if inplace_lr is None else feedback.data
        ctx.save_for_backward(feedback if inplace_lr is None else None, h if learns else None)
        zero = h.new_empty(*h.shape[: h.dim() - feedback.dim() + 1], len(feedback))
        return zero if labels is None else (zero, h.new_empty((), dtype=torch.promote_types(h.dtype, torch.float32)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor, scale: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved, h = ctx.saved_tensors
        feedback = saved if ctx.feedback is None else ctx.feedback
        rule, labels, inplace_lr = RULES[ctx.rule], ctx.labels, ctx.step[0]
        if labels is not None:
            labels = labels.seen_in(error.shape[:-1], scale)
        channels_last = is_channels_last(feedback)
        feedback_KD = as_rows(feedback, channels_last)
        error_NK = error.to(ctx.dtype).flatten(0, -2)
        grad_h = grad_feedback = None
        if rule.sent is not None and ctx.needs_input_grad[6]:
            sent_NK = rule.sent(error_NK, None, feedback_KD, labels)
            grad_h_ND = learning_signal(sent_NK.to(ctx.dtype), feedback_KD.to(ctx.dtype))
            grad_h = from_rows(grad_h_ND, feedback.shape[1:], channels_last)
            grad_h = grad_h if error.dim() == 2 else grad_h.view(*error.shape[:-1], *feedback.shape[1:])
        if rule.correlated is not None and h is not None:
            h_ND = as_rows(h if error.dim() == 2 else h.flatten(0, -2), channels_last)
            correlated_NK = rule.correlated(error_NK, h_ND, feedback_KD.to(ctx.dtype), labels)
            if inplace_lr is not None:  # after the signal, which the old B gives
                inplace.step(feedback_KD, correlated_NK.to(ctx.dtype), h_ND, *ctx.step)
            elif ctx.needs_input_grad[7]:
                new_KD = feedback_KD.new_empty(feedback_KD.shape, dtype=ctx.dtype)
                grad_feedback_KD = add_correlation(new_KD, correlated_NK.to(ctx.dtype), h_ND).to(feedback.dtype)
                grad_feedback = from_rows(grad_feedback_KD, feedback.shape[1:], channels_last)
        return None, None, None, None, None, None, grad_h, grad_feedback


class Broadcast(torch.autograd.Function):
    """Identity on the logits. In the backward pass e = dL/dlogits goes to them and to every point's zero.

    There its positions are the point's own, if it has any. Where there are labels, each zero is followed by the 0-d
    empty of its point, which gets the loss's factor.
    """

    @staticmethod
    def forward(ctx: Any, class_dim: int, labels: Labels | None, logits: Tensor, *empties: Tensor) -> Tensor:
        ctx.class_dim, ctx.labels = class_dim, labels
        ctx.shapes = [empty.shape for empty in empties]
        out = logits.detach()  # a tensor of its own, not a view: what follows may change it in place
        ctx.logits = None if labels is None else out.detach()  # so changed, as an attribute: as the loss sees them
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        _, _, needs_logits, *needed = ctx.needs_input_grad
        error_NPK = error.movedim(ctx.class_dim, -1)
        scale = None
        if ctx.labels is not None:
            rows_NK = ctx.logits.movedim(ctx.class_dim, -1).flatten(0, -2)
            labels = ctx.labels.seen_in(error_NPK.shape[:-1])
            scale = labels.scale_of(error_NPK.flatten(0, -2), rows_NK)
        sent = {shape: from_positions(error_NPK, shape[1:-1]) for shape in set(ctx.shapes) if len(shape)}
        grads = (sent.get(shape, scale) if need else None for shape, need in zip(ctx.shapes, needed, strict=True))
        return None, None, error if needs_logits else None, *grads


def learning_signal(error_NK: Tensor, feedback_KD: Tensor) -> Tensor:
    """grad_h = e @ B, (N, D)."""
    batch, classes = error_NK.shape
    rows = images_at_a_time(feedback_KD, batch)
    if rows == batch:
        return error_NK @ feedback_KD
    errors = error_NK.reshape(batch // rows, rows, classes)
    return torch.bmm(errors, feedback_KD.expand(batch // rows, -1, -1)).flatten(0, 1)


def add_correlation(out_KD: Tensor, error_NK: Tensor, h_ND: Tensor, beta: float = 0, alpha: float = 1) -> Tensor:
    """Update `out_KD` in place: out <- beta * out + alpha * e^T @ h. With beta 0 its old values are ignored."""
    rows = images_at_a_time(out_KD, len(error_NK))
    for error_KN, h in zip(error_NK.T.split(rows, 1), h_ND.split(rows), strict=True):
        out_KD.addmm_(error_KN, h, beta=beta, alpha=alpha)
        beta = 1
    return out_KD


def feedback_point(
    h: Tensor,
    feedback: Tensor,
    *,
    rule: str = "DKP",
    name: str = "",
    labels: Labels | None = None,
    inplace_lr: Tensor | None = None,
    inplace_weight_decay: Tensor | None = None,
    group: Any = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return an empty (N, K) for `broadcast_error`: in the backward pass it takes e to `h` and to B.

    For a rule that reads the labels there is a second, 0-d: its gradient is to be the factor that scales the loss.

    Args:
        h: (N, ...), still attached to its own block's graph; what flows on from it is to be detached.
        feedback: B, (K, *h.shape[1:]), or (K, D) for an h with positions, (N, *P, D); the empty is (N, *P, K) then.
        name: of the point, for messages.
        rule, inplace_lr, inplace_weight_decay, group: as in `direct_feedback`; the second and third 0-d Tensors, on a
            GPU the second beside B.
        found_inf: as in `DirectFeedback`.
        labels: what a rule that needs them reads, checked before.

    Raises:
        ValueError: as `direct_feedback` does.
    """
    check_point(h, feedback, len(h), len(feedback), name, own=feedback.dim() == 2)
    if rule not in RULES or RULES[rule].chained or RULES[rule].head:
        direct = [key for key, r in RULES.items() if not (r.chained or r.head)]
        raise ValueError(f"rule is {rule!r}, expected one of {direct}")
    if (feedback.requires_grad or inplace_lr is not None) and RULES[rule].correlated is None:
        alone = ": `DirectFeedback` alone runs the forward pass by which it learns" if RULES[rule].perturbs else ""
        raise ValueError(f"feedback matrix{name} is to learn, expected it fixed by {rule}{alone}")
    if inplace_lr is not None:
        refuse_float16(h, FLOAT16_IN_PLACE)
        if feedback.requires_grad or not (feedback.is_contiguous() or is_channels_last(feedback)):
            raise ValueError(
                "a feedback matrix is to be updated in place: expected requires_grad=False and contiguous or"
                f" channels_last memory, got requires_grad={feedback.requires_grad} and strides {feedback.stride()}"
            )
        if not h.requires_grad:  # of a frozen block: B learns all the same
            h = h.detach().requires_grad_()
    labels = labels if RULES[rule].needs_target else None
    empties = FeedbackPoint.apply(rule, inplace_lr, inplace_weight_decay, group, found_inf, labels, h, feedback)
    return (empties,) if labels is None else empties


def broadcast_error(
    logits: Tensor, empties: Sequence[Tensor], class_dim: int = -1, labels: Labels | None = None
) -> Tensor:
    """Return `logits` unchanged; in the backward pass, e = dL/dlogits also goes to each point.

    Args:
        logits: (N, K) or with positions, the network's output before the loss.
        empties: those of each point, from `feedback_point`; only their gradients matter.
        class_dim: of the logits.
        labels: those of the points.

    Raises:
        ValueError: logits that are not a Tensor (N, ..., K), or empties for another batch or other classes.
    """
    check_logits(logits, class_dim)
    shape = logits.movedim(class_dim, -1).shape
    for empty in empties:
        if empty.dim() and (empty.shape[0], empty.shape[-1]) != (shape[0], shape[-1]):
            raise ValueError(f"feedback is for logits {shape_of(empty)}, got logits {shape_of(logits)}")
        if empty.dim() > 2 and empty.dim() != len(shape):
            raise ValueError(
                f"a point has positions {tuple(empty.shape[1:-1])}, the logits {tuple(shape[1:-1])}: expected as many"
                ' dimensions; with positions="pooled" each sample has one error'
            )
    return Broadcast.apply(class_dim, labels, logits, *empties)
