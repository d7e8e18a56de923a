"""What is refused, with a message that says what was got and what is expected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedback.rules import RULES, learned_rules
from feedback.rules.rule import IGNORED

UPDATES = ("optimizer", "inplace")


def check_point(h: Tensor, feedback: Tensor, batch: int, classes: int, name: str) -> None:
    """Raise ValueError, which calls the point `name`, unless h is (N, ...) and B (K, *h.shape[1:])."""
    if h.dim() < 2 or h.shape[0] != batch:
        raise ValueError(f"activation{name} has shape {shape_of(h)}, expected ({batch}, D, ...): as many as logits")
    expected = (classes, *h.shape[1:])
    if feedback.shape != expected:
        got = shape_of(feedback)
        raise ValueError(f"feedback matrix{name} has shape {got}, expected {expected}: (K, *h.shape[1:])")


def refuse_float16(x: Tensor) -> None:
    """Raise ValueError if `x`, or autocast on its device, is float16: a GradScaler would scale B's step, or miss it."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.float16 in (autocast, x.dtype):
        raise ValueError(
            "the update of B in place, and rules that read the labels, got float16, expected float32 or bfloat16: a"
            ' GradScaler scales the loss alone. Use bfloat16, or DKP with update="optimizer"'
        )


def check_logits(logits: Any) -> None:
    """Raise ValueError unless `logits` is a Tensor (N, K)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"direct feedback needs logits of shape (N, K), got {shape_of(logits)}")


def check_target(target: Any, batch: int, classes: int) -> None:
    """Raise ValueError unless `target` is int64 class ids (N,), each below K or ignored.

    Their values are looked at on a CPU alone: on CUDA that would be a synchronisation, and the loss checks them there.
    """
    if not isinstance(target, Tensor) or target.shape != (batch,) or target.dtype != torch.int64:
        kind = f"{target.dtype} {shape_of(target)}" if isinstance(target, Tensor) else shape_of(target)
        raise ValueError(f"target is {kind}, expected class ids torch.int64 ({batch},)")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target[((target < 0) & (target != IGNORED)) | (target >= classes)]
        if len(wrong):
            raise ValueError(
                f"target has label {wrong[0]}, expected 0 to {classes - 1}, or {IGNORED} to ignore an image"
            )


def check_tap(point: str, h: Any, reached: bool, cut: bool) -> None:
    """Raise ValueError unless a point's output is one Tensor, reached once, and has gradients where it is to be cut."""
    if not isinstance(h, Tensor):
        raise ValueError(f"feedback point {point!r} returned a {type(h).__name__}, expected one Tensor")
    if reached:
        raise ValueError(f"feedback point {point!r} was reached twice in one forward pass, expected once")
    if cut and not torch.is_grad_enabled():
        raise ValueError(f"feedback point {point!r} runs without gradients: checkpoint it with use_reentrant=False")


def check_taps(points: Sequence[str], taps: dict[str, tuple[Tensor, int]], unchanged: bool) -> None:
    """Raise ValueError unless each point was reached, and, where that matters, its output is as it was then."""
    for point in points:
        if point not in taps:
            raise ValueError(f"feedback point {point!r} was never reached in the forward pass, expected once")
        h, then = taps[point]
        if unchanged and then != version(h):
            raise ValueError(
                f"the output of feedback point {point!r} was changed in place further up, expected it as it was:"
                " make that operation not in place, or move the point behind it"
            )


def check_below(points: Sequence[str], activations: Sequence[Tensor], logits: Tensor) -> None:
    """Raise ValueError where a point returns the logits."""
    for point, h in zip(points, activations, strict=True):
        if h is logits:
            raise ValueError(f"feedback point {point!r} returns the logits: expected a point below the last layer")


def check_signals(model: nn.Module, points: Sequence[str], activations: Sequence[Tensor]) -> None:
    """Raise ValueError where nothing below a point, down to the next, learns; frozen parameters may be why, and may."""
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return
    for point, h in zip(points, activations, strict=True):
        if not h.requires_grad:
            raise ValueError(
                f"nothing learns from feedback point {point!r}: expected parameters under it, down to the next"
                " one, or allow_skips=True"
            )


def check_shapes(points: Sequence[str], activations: Sequence[Tensor], logits: Tensor) -> None:
    """Raise ValueError unless the activation at each point is (N, ...), N as of the logits (N, K)."""
    batch, classes = logits.shape
    for point, h in zip(points, activations, strict=True):
        check_point(h, h.new_empty(classes, *h.shape[1:]), batch, classes, f" {point!r}")


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
) -> None:
    """Raise ValueError for arguments of `DirectFeedback` that cannot be, before anything is run."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}, expected one of {UPDATES}")
    if update == "inplace" and not RULES[rule].learns:
        raise ValueError(f'update="inplace" needs a rule of {learned_rules()}, got {rule!r}')
    if (update == "inplace") != (feedback_lr is not None):
        raise ValueError(f'feedback_lr goes with update="inplace": got feedback_lr={feedback_lr}, update={update!r}')
    if feedback_weight_decay is not None and update != "inplace":
        raise ValueError(f'feedback_weight_decay goes with update="inplace", got update={update!r}')
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
