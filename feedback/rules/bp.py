"""Backpropagation, through the same wrapper: plain autograd, no B.

grad_h_l = W_{l+1}^T delta_{l+1}
"""

from feedback.rules.rule import Rule

BP = Rule("BP")
