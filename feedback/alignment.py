"""How well a rule's learning signals agree with backpropagation's.

Shapes: N batch, K classes, D features of one block.
"""

import math
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
      chance, 0 is backpropagation). NaN where all are zero, at a point whose block has nothing to train, and at a point
      that the pass left out.
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
        ValueError: as `DirectFeedback` does in its forward pass; or the passes leave out different points, by other
            random numbers than torch's.
    """
    parameters = {name: p for name, p in net.model.named_parameters() if p.requires_grad}
    has_matrices = not (RULES[net.rule].chained or RULES[net.rule].head)
    matrices = dict(zip(net.points, (B.detach() for B in net.matrices()), strict=True)) if has_matrices else {}
    dims = dict(zip(net.points, net.feature_dims, strict=True))

    def gradients(by_rule: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, activations, and the gradients of activations and parameters; zeros for one that gets none."""
        layerwise = RULES[net.rule].layerwise  # backpropagation by the rule's own operations: the dropout is the same
        with untouched(net if RULES[net.rule].head else net.model), net.aside(), torch.enable_grad():
            logits, activations = net.tapped_forward(x, by_rule or layerwise, exact=not by_rule, measured=True)
            routed = logits
            if by_rule and RULES[net.rule].head:
                labels = cast(Labels, net.labels_of(target))
                routed = net.route(logits, net.head_empties(activations, labels), labels)
            if by_rule and matrices:
                options: dict[str, Any] = {"class_dim": net.class_dim, "positions": net.positions, "loss": net.loss}
                options["feature_dims"] = [dims[point] for point in activations]
                reached = [matrices[point] for point in activations]
                h = list(activations.values())
                routed = direct_feedback(logits, h, reached, rule=net.rule, target=target, **options)
            tensors = activations | parameters
            learning = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
            loss = loss_fn(routed, target)
            grads = torch.autograd.grad(loss, list(learning.values()), allow_unused=True, materialize_grads=True)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if not tensor.requires_grad}
        return logits.detach(), activations, zeros | dict(zip(learning, grads, strict=True))

    _, reached, rule_grads = gradients(by_rule=True)
    logits, activations, bp_grads = gradients(by_rule=False)
    if reached.keys() != activations.keys():
        other = ", ".join(sorted(reached.keys() ^ activations.keys()))
        raise ValueError(f"one of two passes left out {other}, expected the same of both: call net.eval() to compare")
    logits_NPK = logits.movedim(net.class_dim, -1)
    result = {point: {"alignment_deg": math.nan, "logit_cosine": math.nan} for point in net.points}
    for point, h in activations.items():
        rule_ND, bp_ND = (as_rows(grads[point], channels_last=False).float() for grads in (rule_grads, bp_grads))
        result[point]["alignment_deg"] = angle_deg(rule_ND, bp_ND).nanmean().item()
        if matrices:
            feedback_KD = as_rows(matrices[point], channels_last=False).float()
            seen = features_last(h.detach(), dims[point], net.positions)
            seen = as_rows(seen, channels_last=False) if net.positions is None else seen
            readout = to_positions(seen.float() @ feedback_KD.T, logits_NPK.shape[1:-1])
            result[point]["logit_cosine"] = F.cosine_similarity(logits_NPK.float(), readout, dim=-1).mean().item()
    for name in parameters:
        rule, bp = (grads[name].reshape(1, -1).float() for grads in (rule_grads, bp_grads))
        result[name] = {"parameter_deg": angle_deg(rule, bp).item()}
    return result
