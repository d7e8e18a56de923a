"""Direct feedback as a function of logits, activations and matrices: the wrapper without a wrapper.

Shapes: N batch, K classes.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from feedback.checks import FLOAT16_IN_PLACE, check_labels, check_logits, check_point, refuse_float16
from feedback.functional import broadcast_error, feedback_point
from feedback.labels import Loss, labels_of
from feedback.positions import features_last
from feedback.rules import RULES


def direct_feedback(
    logits: Tensor,
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    *,
    rule: str = "DKP",
    target: Tensor | None = None,
    class_dim: int = -1,
    feature_dims: Sequence[int] = (),
    positions: str | None = None,
    loss: Loss | None = None,
    inplace_lr: float | Tensor | None = None,
    inplace_weight_decay: float | Tensor = 0.0,
    group: Any = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Return `logits` unchanged; in the backward pass, route the error at them straight to each activation.

    Direct Feedback Alignment (Nokland 2016) where the matrices are fixed; Direct Kolen-Pollack (Webster, Choi,
    Ahn 2020) where they learn. The caller detaches what flows on from each activation to the next block;
    `feedback.DirectFeedback` does that for any module.

    Args:
        logits: (N, K) or with positions, the network's output before the loss.
        activations: h_l, each (N, ...), still attached to its own block's graph.
        matrices: B_l, each (K, *h_l.shape[1:]), or with `positions` (K, D). One that requires a gradient learns.
        rule: a direct rule of `feedback.RULES`: it defines which error is multiplied by B for the signal, and which by
            h for B's gradient.
        target: (N, ...) int64 class ids, 0 to K - 1, for a rule that needs them; what has -100, the `ignore_index` of
            `F.cross_entropy`, is left out. Or a probability for each logit.
        class_dim, positions, loss: as in `DirectFeedback`, but that here None stands for no positions.
        feature_dims: of each activation, with `positions`.
        inplace_lr: if given, the backward pass itself steps each B, B <- B - lr (e^T @ h + wd B), after e @ B has
            been computed from the old B, and no gradient of B exists. Every backward pass is one such step. A number;
            pass a 0-d Tensor, on a GPU beside B, to change it without recompiling, or in a captured graph.
        inplace_weight_decay: wd of that step, per step and unit of learning rate as in torch.optim.SGD.
        group: the process group over which that step first averages e^T @ h; by default all ranks there are.
        found_inf: a 0-d float Tensor beside B; while it is 1, that step leaves B as it is, as in torch's optimisers.

    Raises:
        ValueError: logits that are not a Tensor (N, K); an activation or a matrix of another shape; not as many
            matrices as activations; a rule that is not direct; a matrix that is to learn by a rule whose B is fixed; a
            target for other logits; a B that the update in place cannot write to; that update in float16.
    """
    check_logits(logits, class_dim)
    if len(activations) != len(matrices):
        raise ValueError(f"got {len(activations)} activations and {len(matrices)} feedback matrices, expected as many")
    dims = feature_dims or [class_dim] * len(activations)
    seen = [features_last(h, dim, positions) for h, dim in zip(activations, dims, strict=True)]
    for i, (h, feedback) in enumerate(zip(seen, matrices, strict=True)):
        check_point(h, feedback, len(logits), logits.shape[class_dim], f" {i}", own=positions is not None)
    labels = None
    if rule in RULES and RULES[rule].needs_target:
        dtype, shape = torch.promote_types(logits.dtype, torch.float32), logits.movedim(class_dim, -1).shape
        labels = labels_of(cast(Tensor, target), shape[-1], dtype, class_dim, loss)
        check_labels(labels, shape)
        labels.positions.extend(shape[1:-1])
    lr = inplace_lr if isinstance(inplace_lr, Tensor) else None
    decay = None
    if inplace_lr is not None:
        if lr is None:
            dtype = torch.float32 if logits.is_cuda else torch.float64
            lr = torch.full((), float(inplace_lr), dtype=dtype, device=logits.device)
        decay = torch.as_tensor(inplace_weight_decay, dtype=torch.float64)
        refuse_float16(logits, FLOAT16_IN_PLACE)
    options: dict[str, Any] = {"rule": rule, "labels": labels, "group": group, "found_inf": found_inf}
    empties = [
        empty
        for h, feedback in zip(seen, matrices, strict=True)
        for empty in feedback_point(h, feedback, inplace_lr=lr, inplace_weight_decay=decay, **options)
    ]
    return broadcast_error(logits, empties, class_dim, labels)
