"""Direct random target projection (Frenkel, Lefebvre, Bol 2021): the target goes to each block through a fixed B.

grad_h_l = -(one-hot target / N) @ B_l    the part of e that is known before the forward pass is over
"""

from typing import cast

from torch import Tensor

from feedback.labels import Labels
from feedback.rules.rule import Rule


def target_error(error_NK: Tensor, h_ND: Tensor | None, feedback_KD: Tensor, labels: Labels) -> Tensor:
    """-y / N (N, K), y the one-hot target: e = (softmax(logits) - y) / N without its first part."""
    return -labels.scaled(cast(Tensor, labels.shares))


DRTP = Rule("DRTP", sent=target_error, needs_target=True)
