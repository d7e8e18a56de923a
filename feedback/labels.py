"""What LAS, DRTP and heads make of the labels.

Shapes: N batch, *P positions of the logits and *Q of what reads the labels, if any; K classes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback.positions import from_positions, to_positions

IGNORED = -100  # a label: what has it has no error, as by `F.cross_entropy`

PARALLEL = 0.9  # least cosine of what are multiples of one another, but for rounding
CLEAR = 16  # times the rounding of a probability: smaller errors tell nothing of the loss

Loss = Callable[[Tensor, Tensor], Tensor]


class Labels(NamedTuple):
    """The labels of a batch, as one point or the logits see them; from `labels_of`.

    Attributes:
        target: as the loss takes it: for cross-entropy class ids (N, *P), or probabilities in the logits' shape.
        classes: K.
        class_dim: of the logits.
        loss: maps logits and target to the mean loss; None for cross-entropy.
        shares: for cross-entropy, the one-hot labels or probabilities (N, *P, K), divided by their sum over the batch.
        positions: the logits' P, filled in when they are there. Only `loss` needs it.
        shape: (N, *Q) of what sees the labels, without the classes.
        scale: 0-d, the factor by which the training loss is scaled, 1 if None.
    """

    target: Any
    classes: int
    class_dim: int
    loss: Loss | None
    shares: Tensor | None
    positions: list[int]
    shape: tuple[int, ...] = ()
    scale: Tensor | None = None

    def seen_in(self, shape: Iterable[int], scale: Tensor | None = None) -> "Labels":
        """The same labels for what sees them in the shape (N, *Q), with this `scale`."""
        # neither _replace nor a slice of self: torch 2.6 cannot trace them
        what = self.target, self.classes, self.class_dim, self.loss, self.shares, self.positions
        return Labels(*what, tuple(shape), scale)

    def scaled(self, at_logits: Tensor) -> Tensor:
        """(N, *P, K) at the logits' positions, scaled, as rows (N, K) of what sees the labels."""
        rows_NK = from_positions(at_logits, self.shape[1:]).flatten(0, -2)
        return rows_NK if self.scale is None else rows_NK * self.scale

    def error_of(self, readout_NK: Tensor) -> Tensor:
        """The gradient (N, K) of the loss at a readout: (softmax(readout) - one-hot) / N for cross-entropy."""
        dtype = torch.promote_types(readout_NK.dtype, torch.float32)
        readout = readout_NK.to(dtype).view(*self.shape, self.classes)
        if self.loss is None:
            shares = cast(Tensor, self.shares)
            guess = to_positions(readout, shares.shape[1:-1]).softmax(-1)
            return self.scaled(guess * shares.sum(-1, keepdim=True) - shares)
        with torch.enable_grad():
            logits = to_positions(readout.detach(), self.positions).movedim(-1, self.class_dim).requires_grad_()
            (error,) = torch.autograd.grad(self.loss(logits, self.target), logits)
        return self.scaled(error.movedim(self.class_dim, -1))

    def products_of(self, error_NK: Tensor, logits_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e^T g, g^T g and e^T e, 0-d, of the error at the logits and the gradient g of the loss there."""
        expected = self.error_of(logits_NK).double().flatten()  # so that no square underflows
        error = error_NK.double().flatten()
        return error @ expected, expected @ expected, error @ error

    def scale_of(self, error_NK: Tensor, logits_NK: Tensor) -> Tensor:
        """0-d: c >= 0 where the error at the logits is c times the gradient of the loss; 1 where it is no multiple.

        A loss divided for gradient accumulation has one, and whatever is computed from the labels gets it too.
        """
        along, squares, of_error = self.products_of(error_NK, logits_NK)
        is_multiple = (along >= PARALLEL * (squares * of_error).sqrt()) & (squares > 0)
        return torch.where(is_multiple, along / squares, 1.0)

    def is_other_loss(self, error_NK: Tensor, logits_NK: Tensor) -> bool:
        """Whether the error at the logits is no multiple of the gradient of the loss, and not for rounding alone."""
        along, squares, of_error = (product.item() for product in self.products_of(error_NK, logits_NK))
        rounding = CLEAR * torch.finfo(logits_NK.dtype).eps / max(len(logits_NK), 1) ** 0.5  # of rows divided by N
        return squares**0.5 > rounding and along < PARALLEL * (squares * of_error) ** 0.5


def labels_of(target: Any, classes: int, dtype: torch.dtype, class_dim: int = -1, loss: Loss | None = None) -> Labels:
    """The labels of a batch, with what is computed of them in `dtype`, float32 or float64.

    Raises:
        ValueError: for cross-entropy, a target that is neither class ids nor probabilities.
    """
    if loss is not None:
        return Labels(target.detach() if isinstance(target, Tensor) else target, classes, class_dim, loss, None, [])
    check_target(target, classes, class_dim)
    target = target.detach()
    if target.is_floating_point():
        weights = target.movedim(class_dim, -1).to(dtype)
    else:
        hot = F.one_hot(target.clamp(min=0), classes)
        weights = (hot * (target != IGNORED)[..., None]).to(dtype)
    return Labels(target, classes, class_dim, None, weights / weights.sum().clamp(min=1), [])


def check_target(target: Any, classes: int, class_dim: int) -> None:
    """Raise ValueError unless `target` is int64 class ids, each below `classes` or ignored, or a float for each class.

    The ids are looked at on a CPU alone: on CUDA that would be a synchronisation, and the loss checks them there.
    """
    if classes == 1:
        raise ValueError("the logits have one class, expected two or more: other losses take loss=")
    is_ids = isinstance(target, Tensor) and target.dtype == torch.int64
    has_classes = isinstance(target, Tensor) and target.dim() > 1 and classes in target.shape
    has_classes = has_classes and class_dim in range(-target.dim(), target.dim()) and target.shape[class_dim] == classes
    if not is_ids and not (has_classes and target.is_floating_point()):
        kind = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else f"a {type(target).__name__}"
        raise ValueError(
            f"target is {kind}, expected class ids torch.int64, or a probability for each of {classes} classes;"
            " others take loss="
        )
    if is_ids and target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target[((target < 0) & (target != IGNORED)) | (target >= classes)]
        if len(wrong):
            raise ValueError(
                f"target has label {wrong[0]}, expected 0 to {classes - 1}, or {IGNORED} to ignore an image"
            )
