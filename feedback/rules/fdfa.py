"""Forward direct feedback alignment (Bacho, Chu 2024): DFA whose B follows the Jacobian of the logits at h_l.

grad_h_l = e @ B_l
grad_B_l = B_l - mean over the images of jvp^T u_l    with u_l a random perturbation of h_l, and jvp (N, K) the
                                                      derivative of the logits along all perturbations
"""

from feedback.rules.rule import Rule, output_error

FDFA = Rule("FDFA", sent=output_error, perturbs=True)
