"""What a learning rule is made of.

Shapes: N images, or positions of all images; K classes, D features of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from feedback.labels import Labels

ErrorOf = Callable[..., Tensor]  # (e (N, K), h (N, D), B (K, D), `Labels`) to (N, K); h is None for `sent`


def output_error(error_NK: Tensor, h_ND: Tensor | None, feedback_KD: Tensor, labels: Labels | None) -> Tensor:
    """e itself, dL/dlogits (N, K)."""
    return error_NK


@dataclass(frozen=True)
class Rule:
    """How a rule brings the error to the blocks, and whether B learns.

    Attributes:
        name: of `--train-mode` and of `DirectFeedback`.
        sent: function that returns the error (N, K) in grad_h = sent @ B. None where the error goes backward layer by
            layer, so that a block waits for the blocks above it.
        correlated: function that returns the error (N, K) in grad_B = correlated^T @ h. None if B is fixed, or belongs
            to a layer.
        layerwise: B has the shape of each layer's weight, and carries the error through that layer.
        as_weight: B gets the gradient of the weight and belongs into its optimiser (layerwise rules only).
        needs_target: `sent` or `correlated` reads the labels.
        perturbs: B learns from a random perturbation of the points' outputs in the forward pass.
        head: a small net at each point stands in for B; `sent` and `correlated` say which errors it takes.
    """

    name: str
    sent: ErrorOf | None = None
    correlated: ErrorOf | None = None
    layerwise: bool = False
    as_weight: bool = False
    needs_target: bool = False
    perturbs: bool = False
    head: bool = False

    @property
    def chained(self) -> bool:
        """Whether a block's backward waits for the block above."""
        return self.sent is None

    @property
    def learns(self) -> bool:
        """Whether B, or a head, is learned at the points, by an optimiser of its own or in place."""
        return self.correlated is not None or self.perturbs

    @property
    def in_place(self) -> bool:
        """Whether B may be stepped in the backward pass."""
        return self.correlated is not None and not self.head

    @property
    def has_feedback(self) -> bool:
        """Whether there is a B at all."""
        return self.layerwise or not self.chained
