"""Feedback alignment (Lillicrap, Cownden, Tweed, Akerman 2016): a fixed B in W's place, layer by layer.

grad_x = B^T g    where g is the gradient at the layer's output; grad_W = g x^T as in backpropagation
"""

from feedback.rules.rule import Rule

FA = Rule("FA", layerwise=True)
