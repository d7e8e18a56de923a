"""Direct random target projection (Frenkel, Lefebvre, Bol 2021): the target goes to each block through a fixed B.

grad_h_l = -(one-hot target / N) @ B_l    the part of e that is known before the forward pass is over
"""

from torch import Tensor

from feedback.rules.rule import Rule, mean_over_labelled, one_hot


def target_error(error_NK: Tensor, h_ND: Tensor | None, feedback_KD: Tensor, target_N: Tensor) -> Tensor:
    """-y / N (N, K), y the one-hot target: e = (softmax(logits) - y) / N without its first part."""
    return -mean_over_labelled(one_hot(target_N, len(feedback_KD)).to(error_NK.dtype), target_N)


DRTP = Rule("DRTP", sent=target_error, needs_target=True)
