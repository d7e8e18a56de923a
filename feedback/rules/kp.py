"""Kolen-Pollack (Kolen, Pollack 1994; Akrout et al. 2019): feedback alignment whose B gets the gradient of W.

grad_x = B^T g
grad_B = grad_W = g x^T    so that under equal steps and decay B and W converge
"""

from feedback.rules.rule import Rule

KP = Rule("KP", layerwise=True, as_weight=True)
