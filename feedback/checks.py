"""What is refused, with a message that says what was got and what is expected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedback.rules import RULES, learned_rules

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


def check_target(target: Any, batch: int) -> None:
    """Raise ValueError unless `target` is int64 class ids (N,)."""
    if not isinstance(target, Tensor) or target.shape != (batch,) or target.dtype != torch.int64:
        kind = f"{target.dtype} {shape_of(target)}" if isinstance(target, Tensor) else shape_of(target)
        raise ValueError(f"target is {kind}, expected class ids torch.int64 ({batch},)")


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
