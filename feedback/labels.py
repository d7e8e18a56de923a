"""What LAS and DRTP make of the labels.

Shapes: N batch, *P positions of the logits and *Q of what reads the labels, if any; K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback.positions import from_positions, to_positions

IGNORED = -100  # a label: what has it has no error, as by `F.cross_entropy`

Loss = Callable[[Tensor, Tensor], Tensor]


class Labels(NamedTuple):
    """The labels of a batch, as one point or the logits see them.

    Attributes:
        target: as the loss takes it: class ids (N, *P), or by default also probabilities in the logits' shape.
        classes: K.
        loss: maps logits and target to the mean loss, cross-entropy if None.
        class_dim: of the logits.
        shape: (N, *Q) of what sees them, without the classes.
        positions: the logits' P, filled in when they are there. Only `loss` needs it.
        scale: 0-d, the factor by which the training loss is scaled.
    """

    target: Tensor
    classes: int
    loss: Loss | None = None
    class_dim: int = -1
    shape: tuple[int, ...] = ()
    positions: list[int] | None = None
    scale: Tensor | None = None

    def shares(self, dtype: torch.dtype) -> Tensor:
        """(N, *P, K): the one-hot labels or probabilities, divided by their sum over the batch, and scaled."""
        if self.target.is_floating_point():
            target = self.target.movedim(self.class_dim, -1).to(dtype)
        else:
            hot = F.one_hot(self.target.clamp(min=0), self.classes)
            target = (hot * (self.target != IGNORED)[..., None]).to(dtype)
        shares = target / target.sum().clamp(min=1)
        return shares if self.scale is None else shares * self.scale

    def seen(self, at_logits: Tensor) -> Tensor:
        """(N, *P, K) at the logits' positions as rows (N, K) of what sees the labels."""
        return from_positions(at_logits, self.shape[1:]).flatten(0, -2)

    def error_of(self, readout_NK: Tensor) -> Tensor:
        """The gradient (N, K) of the loss at a readout: (softmax(readout) - one-hot) / N for cross-entropy."""
        dtype = torch.promote_types(readout_NK.dtype, torch.float32)
        readout = readout_NK.to(dtype).view(*self.shape, self.classes)
        if self.loss is None:
            shares = self.shares(dtype)
            guess = to_positions(readout, shares.shape[1:-1]).softmax(-1)
            return self.seen(guess * shares.sum(-1, keepdim=True) - shares)
        with torch.enable_grad():
            logits = to_positions(readout.detach(), self.positions or ()).movedim(-1, self.class_dim).requires_grad_()
            (error,) = torch.autograd.grad(self.loss(logits, self.target), logits)
        error = error.movedim(self.class_dim, -1)
        return self.seen(error if self.scale is None else error * self.scale)

    def scale_of(self, error_NK: Tensor, logits_NK: Tensor) -> Tensor:
        """0-d: the factor by which the error at the logits is the loss's own, 1 where that is zero.

        A loss divided for gradient accumulation has one, and whatever is computed from the labels gets it too.
        """
        expected = self.error_of(logits_NK)
        squares = expected.square().sum()
        factor = (error_NK.to(expected.dtype) * expected).sum() / squares
        return torch.where(squares > 0, factor, 1.0)
