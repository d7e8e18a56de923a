"""How well a rule's learning signals agree with backpropagation's.

Shapes: N batch, K classes, D features of one block.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback.functional import as_rows
from feedback.state import untouched
from feedback.wrapper import DirectFeedback


def angle_deg(u_ND: Tensor, v_ND: Tensor) -> Tensor:
    """Angle in degrees between the rows of `u_ND` and `v_ND`, shape (N,); exact near 0 and 180. NaN for a zero row."""
    u = u_ND / u_ND.norm(dim=1, keepdim=True)
    v = v_ND / v_ND.norm(dim=1, keepdim=True)
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)))


def alignment(
    net: DirectFeedback, x: Tensor, target: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> dict[str, dict[str, float]]:
    """Compare `net`'s learning signals with backpropagation's, same weights, same batch, in the net's current mode.

    One forward and one backward pass of plain backpropagation; parameters, `.grad`, B, BatchNorm statistics and
    random numbers are left as they were. For each feedback point:

    - `alignment_deg`: degrees between e @ B_l and dL/dh_l, per sample, averaged over the samples whose two signals
      are not zero (Lillicrap et al. 2016 use this angle; 90 is chance, 0 is backpropagation). NaN where all are, and
      at a point with nothing to train at or below it.
    - `logit_cosine`: the mean cosine between the logits and h_l @ B_l^T, which the original code of DKP logs as
      "cos_alignment"; not an angle between gradients. NaN for BP, which has no B.

    Args:
        net: the wrapped model.
        x: (N, ...) a probe batch on the net's device.
        target: what `loss_fn` takes beside the logits, (N,) class ids for the default.
        loss_fn: the training loss, (logits (N, K), target) to a scalar.

    Raises:
        ValueError: as `DirectFeedback` does in its forward pass.
    """
    with untouched(net.model), torch.enable_grad():
        logits, activations = net.tapped_forward(x)
        loss = loss_fn(logits, target)
        trained = [h for h in activations if h.requires_grad]
        error_NK, *grads = torch.autograd.grad(loss, [logits, *trained])
    bp_grads = [grads.pop(0) if h.requires_grad else torch.zeros_like(h) for h in activations]
    matrices = net.matrices()
    result = {}
    for i, (point, h, bp_grad) in enumerate(zip(net.points, activations, bp_grads, strict=True)):
        bp_ND = as_rows(bp_grad, channels_last=False).float()
        if matrices:
            feedback_KD = as_rows(matrices[i].detach(), channels_last=False).float()
            rule_ND = error_NK.float() @ feedback_KD
            readout_NK = as_rows(h.detach(), channels_last=False).float() @ feedback_KD.T
            cosine = F.cosine_similarity(logits.detach().float(), readout_NK).mean().item()
        else:
            rule_ND, cosine = bp_ND, float("nan")
        result[point] = {"alignment_deg": angle_deg(rule_ND, bp_ND).nanmean().item(), "logit_cosine": cosine}
    return result
