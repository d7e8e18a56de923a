"""How well a rule's learning signals agree with backpropagation's.

Shapes: N batch, K classes, D features of one block.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback.direct import direct_feedback
from feedback.labels import Labels
from feedback.layout import as_rows
from feedback.positions import features_last, to_positions
from feedback.rules import RULES
from feedback.state import untouched
from feedback.wrapper import DirectFeedback


def angle_deg(u_ND: Tensor, v_ND: Tensor) -> Tensor:
    """Angle in degrees between the rows of `u_ND` and `v_ND`, shape (N,); exact near 0 and 180. NaN for a zero row."""
    u = u_ND / u_ND.norm(dim=1, keepdim=True)
    v = v_ND / v_ND.norm(dim=1, keepdim=True)
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)))


def alignment(
    net: DirectFeedback, x: Any, target: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> dict[str, dict[str, float]]:
    """Compare `net`'s gradients with backpropagation's, same weights, same batch, in the net's current mode.

    A forward and a backward pass by the rule, and both by backpropagation; parameters, `.grad`, B, BatchNorm statistics
    and random numbers are left as they were. The result has a key for each feedback point, with

    - `alignment_deg`: degrees between the rule's signal (e @ B_l, or what FA, KP or a head send down) and dL/dh_l, per
      sample, averaged over the samples whose two signals are not zero (Lillicrap et al. 2016 use this angle; 90 is
      chance, 0 is backpropagation). NaN where all are zero, and at a point whose block has nothing to train.
    - `logit_cosine`: the mean cosine between the logits and h_l @ B_l^T, which the original code of DKP logs as
      "cos_alignment"; not an angle between gradients. NaN for BP, FA, KP, HEAD and LOCAL, which have no such B. With
      positions, the readout is taken to those of the logits.

    and then a key for each trained parameter, by its name in the model, with

    - `parameter_deg`: degrees between the rule's and backpropagation's gradient of it over the whole batch, each as one
      vector. NaN where one is zero. Where it is zero but for rounding, as for a bias in front of BatchNorm, the angle
      says nothing.

    Args:
        net: the wrapped model.
        x: (N, ...) a probe batch on the net's device, or a tuple or dict of inputs as in `DirectFeedback`.
        target: what `loss_fn` takes beside the logits, (N,) class ids for the default.
        loss_fn: the training loss, of logits and target, a scalar.

    Raises:
        ValueError: as `DirectFeedback` does in its forward pass.
    """
    parameters = {name: p for name, p in net.model.named_parameters() if p.requires_grad}
    has_matrices = not (RULES[net.rule].chained or RULES[net.rule].head)
    matrices = [B.detach() for B in net.matrices()] if has_matrices else []

    def gradients(by_rule: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, activations, and the gradients of activations and parameters; zeros for one that gets none."""
        with untouched(net if RULES[net.rule].head else net.model), torch.enable_grad():
            logits, activations = net.tapped_forward(x, cut=by_rule)
            routed = logits
            if by_rule and RULES[net.rule].head:
                labels = cast(Labels, net.labels_of(target))
                routed = net.route(logits, net.head_empties(activations, labels), labels)
            if by_rule and matrices:
                options: dict[str, Any] = {"class_dim": net.class_dim, "positions": net.positions, "loss": net.loss}
                options["feature_dims"] = net.feature_dims
                routed = direct_feedback(logits, activations, matrices, rule=net.rule, target=target, **options)
            tensors = [*activations, *parameters.values()]
            learning = [tensor for tensor in tensors if tensor.requires_grad]
            loss = loss_fn(routed, target)
            grads = iter(torch.autograd.grad(loss, learning, allow_unused=True, materialize_grads=True))
        return logits.detach(), activations, [next(grads) if t.requires_grad else torch.zeros_like(t) for t in tensors]

    _, _, rule_grads = gradients(by_rule=True)
    logits, activations, bp_grads = gradients(by_rule=False)
    logits_NPK = logits.movedim(net.class_dim, -1)
    result = {}
    for i, (point, h) in enumerate(zip(net.points, activations, strict=True)):
        rule_ND, bp_ND = (as_rows(grads[i], channels_last=False).float() for grads in (rule_grads, bp_grads))
        cosine = float("nan")
        if matrices:
            feedback_KD = as_rows(matrices[i], channels_last=False).float()
            seen = features_last(h.detach(), net.feature_dims[i], net.positions)
            seen = as_rows(seen, channels_last=False) if net.positions is None else seen
            readout = to_positions(seen.float() @ feedback_KD.T, logits_NPK.shape[1:-1])
            cosine = F.cosine_similarity(logits_NPK.float(), readout, dim=-1).mean().item()
        result[point] = {"alignment_deg": angle_deg(rule_ND, bp_ND).nanmean().item(), "logit_cosine": cosine}
    of_parameters = (grads[len(activations) :] for grads in (rule_grads, bp_grads))
    for name, rule, bp in zip(parameters, *of_parameters, strict=True):
        result[name] = {"parameter_deg": angle_deg(rule.reshape(1, -1).float(), bp.reshape(1, -1).float()).item()}
    return result
