"""What is refused, with a message that says what was got and what is expected."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedback.labels import Labels
from feedback.rules import RULES

UPDATES = ("optimizer", "inplace")
POSITIONS = (None, "own", "pooled")
MISSING = ("refuse", "skip")
LARGE_ERROR = 4.0  # at a logit
MODES = "the wrapper is in eval mode and its model in training mode: call net.train() or net.eval()"
FORWARD_MODE = "FDFA differentiates in forward mode, which torch.compile does not take: run it eagerly"
FLOAT16_IN_PLACE = (
    "the update of B in place got float16, expected float32 or bfloat16: a GradScaler would scale the step. Use"
    ' bfloat16, or update="optimizer"'
)
FLOAT16_FDFA = (
    "FDFA got float16, expected float32 or bfloat16: its gradient of B does not grow with the loss, so a GradScaler"
    " would shrink it"
)
BARE = (
    "the model is called without its wrapper, in training and with gradients, and would learn by backpropagation: call"
    " the wrapper. To have the bare model, take net.unwrap(), net.eval() or torch.no_grad()"
)


def check_point(h: Tensor, feedback: Tensor, batch: int, classes: int, name: str, own: bool = False) -> None:
    """Raise ValueError, which calls the point `name`, unless h is (N, ...) and B (K, *h.shape[1:]).

    With `own` positions h is (N, *P, D) and B (K, D).
    """
    if h.dim() < 2 or h.shape[0] != batch:
        raise ValueError(f"activation{name} has shape {shape_of(h)}, expected ({batch}, D, ...): as many as logits")
    expected = (classes, h.shape[-1]) if own else (classes, *h.shape[1:])
    if feedback.shape != expected:
        got = shape_of(feedback)
        raise ValueError(
            f"feedback matrix{name} has shape {got}, expected {expected}: (K, *h.shape[1:]). An h whose size changes"
            " needs a B that has no positions: see `positions`"
        )


def refuse_float16(x: Tensor, message: str) -> None:
    """Raise ValueError with `message` if `x`, or autocast on its device, is float16, as with a GradScaler."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.float16 in (autocast, x.dtype):
        raise ValueError(message)


def refuse_large(error: Tensor) -> None:
    """Raise ValueError if e is larger than a loss of probabilities has it: a GradScaler would scale B's step, too."""
    largest = error.detach().abs().amax().item() if error.numel() else 0.0
    if largest > LARGE_ERROR:
        raise ValueError(
            f"the update of B in place got an error of {largest:.3g} at a logit, expected 1 at most (cross-entropy):"
            ' a GradScaler would scale the step. In bfloat16 leave it out; divide the loss, or take update="optimizer"'
        )


def warn_of_other_loss(error: Tensor, logits: Tensor, class_dim: int, labels: Labels) -> None:
    """Warn if e (N, *P, K) is clearly no multiple of the gradient of the loss by which the labels are read."""
    error_NPK, logits_NPK = error.movedim(class_dim, -1), logits.movedim(class_dim, -1)
    labels = labels.seen_in(error_NPK.shape[:-1])
    if labels.is_other_loss(error_NPK.flatten(0, -2), logits_NPK.flatten(0, -2)):
        known = "cross-entropy" if labels.loss is None else "`loss`"
        warnings.warn(
            f"the error at the logits is no multiple of the gradient of {known}: where the training loss is scaled, as"
            " by a GradScaler, what is computed from the labels is not. Pass it as loss= (DRTP takes none), or do not"
            " scale it",
            stacklevel=2,
        )


def check_logits(logits: Any, class_dim: int | None) -> None:
    """Raise ValueError unless `logits` is a Tensor (N, ...) with classes in dimension `class_dim`, not the first."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(
            f"direct feedback needs logits (N, K), or (N, ..., K), got {shape_of(logits)}: where the model returns"
            " more, name them with logits="
        )
    if class_dim is None and logits.dim() > 3:
        raise ValueError(
            f"class_dim is not given, expected the dimension of the classes in the logits {shape_of(logits)}"
        )
    if class_dim is not None and class_dim not in [*range(1, logits.dim()), *range(1 - logits.dim(), 0)]:
        raise ValueError(
            f"class_dim is {class_dim}, expected a dimension of the logits {shape_of(logits)}, not the first"
        )


def check_labels(labels: Labels, shape: Sequence[int]) -> None:
    """Raise ValueError unless the labels are for logits of `shape`, (N, *P, K)."""
    if shape[-1] != labels.classes:
        raise ValueError(f"the logits have {shape[-1]} classes, expected {labels.classes} as at construction")
    if labels.shares is not None and labels.shares.shape != tuple(shape):
        got, expected = tuple(labels.target.shape), tuple(shape)
        raise ValueError(f"target has shape {got}, expected a label or probabilities for logits (N, ..., K) {expected}")


def check_tap(point: str, h: Any, reached: bool, cut: bool) -> None:
    """Raise ValueError unless a point's output is one Tensor, reached once, and has gradients where it is to be cut."""
    if not isinstance(h, Tensor):
        raise ValueError(
            f"feedback point {point!r} returned a {type(h).__name__}, expected one Tensor: take a module in it"
            " that returns one, or put an nn.Identity behind what is to be the point"
        )
    if reached:
        raise ValueError(
            f"feedback point {point!r} was reached twice in one forward pass, expected once: give each"
            " call a module of its own"
        )
    if cut and not torch.is_grad_enabled():
        raise ValueError(
            f"feedback point {point!r} runs without gradients, expected them: no torch.no_grad() around it, and"
            " checkpoint it with use_reentrant=False"
        )


def check_taps(points: Sequence[str], taps: dict[str, tuple[Tensor, int]], unchanged: bool, missing: str) -> None:
    """Raise ValueError unless each point was reached, and, where that matters, its output is as it was then."""
    for point in points:
        if point not in taps:
            if missing == "skip":
                continue
            raise ValueError(
                f"feedback point {point!r} was never reached in the forward pass, expected once. A block that a pass"
                ' may leave out takes missing="skip"; one put in its place since needs a new wrapper'
            )
        h, then = taps[point]
        if unchanged and then != version(h):
            raise ValueError(
                f"the output of feedback point {point!r} was changed in place further up, or by its head, expected it"
                " as it was: make that operation not in place, or move the point behind it"
            )


def check_below(activations: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raise ValueError where a point returns the logits."""
    for point, h in activations.items():
        if h is logits:
            raise ValueError(f"feedback point {point!r} returns the logits: expected a point below the last layer")


def check_signals(model: nn.Module, activations: Mapping[str, Tensor]) -> None:
    """Raise ValueError where nothing below a point, down to the next, learns; frozen parameters may be why, and may."""
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return
    for point, h in activations.items():
        if not h.requires_grad:
            raise ValueError(
                f"nothing learns from feedback point {point!r}: expected parameters under it, down to the next"
                " one, or allow_skips=True"
            )


def check_shapes(activations: Mapping[str, Tensor], batch: int) -> None:
    """Raise ValueError unless the activation at each point is (`batch`, ...)."""
    for point, h in activations.items():
        check_point(h, h.new_empty(1, *h.shape[1:]), batch, 1, f" {point!r}")


def version(h: Tensor) -> int:
    """`h`'s version counter; under torch.compile 0, since compiled operations are never in place."""
    return 0 if torch.compiler.is_compiling() else h._version


def shape_of(x: Any) -> str:
    """For messages: a Tensor's shape, or another object's type."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def feedback_name(point: str) -> str:
    return point.replace(".", "_")


def check_options(
    model: nn.Module,
    points: Sequence[str],
    rule: str,
    update: str,
    feedback_lr: float | None,
    feedback_weight_decay: float | None,
    positions: str | None,
    missing: str,
    loss: Any,
    head: Any,
    init: Any,
    feature_dim: Any,
) -> None:
    """Raise ValueError for arguments of `DirectFeedback` that cannot be, before anything is run."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}, expected one of {UPDATES}")
    if update == "inplace" and not RULES[rule].in_place:
        in_place = [name for name, r in RULES.items() if r.in_place]
        raise ValueError(f'update="inplace" needs a rule of {in_place}, got {rule!r}')
    if (update == "inplace") != (feedback_lr is not None):
        raise ValueError(f'feedback_lr goes with update="inplace": got feedback_lr={feedback_lr}, update={update!r}')
    if feedback_weight_decay is not None and update != "inplace":
        raise ValueError(f'feedback_weight_decay goes with update="inplace", got update={update!r}')
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}, expected one of {POSITIONS}")
    if missing not in MISSING:
        raise ValueError(f"missing is {missing!r}, expected one of {MISSING}")
    readouts = [name for name, r in RULES.items() if r.learns and r.needs_target]
    if loss is not None and rule not in readouts:
        raise ValueError(f"loss goes with {readouts}, whose readouts learn by it: got rule {rule!r}")
    has_heads = RULES[rule].head
    if head is not None and not has_heads:
        raise ValueError(f"head goes with {[name for name, r in RULES.items() if r.head]}, got rule {rule!r}")
    if has_heads and not (positions is None and init is None and feature_dim is None):
        raise ValueError(f"rule {rule} has heads, which take no positions, feature_dim or init")
    if RULES[rule].perturbs and not (positions is None and feature_dim is None):
        raise ValueError(f"rule {rule} takes no positions and no feature_dim")
    if isinstance(points, str) or not points:
        raise ValueError(f"points is {points!r}, expected a sequence of one or more submodule names")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = sorted(filter(None, modules))
    for i, point in enumerate(points):
        if point not in names:
            raise ValueError(f"feedback point {point!r} does not exist, expected one of {names}")
        if modules[point] in [modules[earlier] for earlier in points[:i]]:
            raise ValueError(f"feedback point {point!r} is given twice, expected each block once")
        if feedback_name(point) in map(feedback_name, points[:i]):
            raise ValueError(f"feedback point {point!r} has the name of another but for '.' and '_': rename the module")
