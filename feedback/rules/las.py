"""Local alignment support, the linear form of Yang, Lee, Park 2024: DFA whose B is learned as a readout of its block.

grad_h_l = e @ B_l
grad_B_l = e_l^T @ h_l    with e_l the gradient of the loss at the readout h_l @ B_l^T: for cross-entropy
                          (softmax(h_l @ B_l^T) - one-hot target) / N
"""

from torch import Tensor

from feedback.labels import Labels
from feedback.rules.rule import Rule, output_error


def readout_error(error_NK: Tensor, h_ND: Tensor, feedback_KD: Tensor, labels: Labels) -> Tensor:
    """e_l (N, K): with B as a linear classifier on h, the gradient of its loss at its logits h @ B^T."""
    return labels.error_of(h_ND @ feedback_KD.T)


LAS = Rule("LAS", sent=output_error, correlated=readout_error, needs_target=True)
