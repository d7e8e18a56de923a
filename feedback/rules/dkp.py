"""Direct Kolen-Pollack (Webster, Choi, Ahn 2020): DFA whose B gets a gradient as if it were the output's weight on h.

grad_h_l = e @ B_l
grad_B_l = e^T @ h_l
"""

from feedback.rules.rule import Rule, output_error

DKP = Rule("DKP", sent=output_error, correlated=output_error)
