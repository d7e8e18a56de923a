"""Local alignment support, the linear form of Yang, Lee, Park 2024: DFA whose B is learned as a readout of its block.

grad_h_l = e @ B_l
grad_B_l = e_l^T @ h_l    with e_l = (softmax(h_l @ B_l^T) - one-hot target) / N
"""

import torch
from torch import Tensor

from feedback.rules.rule import Rule, mean_over_labelled, one_hot, output_error


def readout_error(error_NK: Tensor, h_ND: Tensor, feedback_KD: Tensor, target_N: Tensor) -> Tensor:
    """e_l (N, K): with B as a linear classifier on h, the gradient of its cross-entropy at its logits h @ B^T."""
    guess_NK = (h_ND @ feedback_KD.T).softmax(1, dtype=torch.promote_types(h_ND.dtype, torch.float32))
    return mean_over_labelled(guess_NK - one_hot(target_N, len(feedback_KD)), target_N)


LAS = Rule("LAS", sent=output_error, correlated=readout_error, needs_target=True)
