"""`DirectFeedback`: train any classifier by direct feedback instead of backpropagation."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedback.functional import (
    broadcast_error,
    check_logits,
    check_point,
    direct_feedback,
    feedback_point,
    is_channels_last,
    refuse_float16,
)
from feedback.state import untouched

RULES = ("BP", "DFA", "DKP")
UPDATES = ("optimizer", "inplace")


class DirectFeedback(nn.Module):
    """A model whose blocks learn from the output error alone; in eval mode or under `no_grad`, the bare model.

    Each feedback point ends a block: its output h_l flows on detached, and its gradient is e @ B_l, with
    e = dL/dlogits. So every block's backward needs only e, and no gradient with respect to a block's input is
    ever computed. The loss is called, and `backward()` with it, as on any other module.

    Rules: `BP` is plain autograd and has no B. `DFA` (Nokland 2016) keeps each B_l fixed, as a buffer. `DKP`
    (Webster, Choi, Ahn 2020) learns it from grad_B_l = e^T @ h_l, as a Parameter, in one of two ways:
    `update="optimizer"` leaves grad_B_l in `.grad` for an optimiser over `net.feedback.parameters()`;
    `update="inplace"` steps B_l inside the backward pass by plain SGD with `feedback_lr` and
    `feedback_weight_decay`, and needs no memory beyond B. In place, each backward pass is a step of B: with
    gradient accumulation B steps once per micro-batch. A loss scaled by a factor scales that step too.

    Args:
        model: maps one Tensor (N, ...) to logits (N, K). It gets forward hooks, by which a deep copy of the model
            alone also copies this wrapper.
        points: names of submodules, each called once a forward pass, each returning one Tensor h_l (N, ...).
        rule: "BP", "DFA" or "DKP".
        example: an input batch (of one or more), in the shape, dtype and memory format of the real ones. It runs
            once through the model, without effect on BatchNorm statistics or random numbers, to learn the shapes.
        update: "optimizer" or "inplace" (DKP only).
        feedback_lr: learning rate of B in place; an attribute, free to be changed between steps, compiled or not.
        feedback_weight_decay: weight decay of B in place, as in `torch.optim.SGD`.
        init: fills each B_l, seen as a (K, D_l) float matrix, in place. The default has fan-in D_l, as the original.

    Attributes:
        feedback: the module that holds every B_l, of shape (K, *h_l.shape[1:]), under its point's name with "_"
            for ".".

    Raises:
        ValueError: an unknown rule or update; no points, a point twice, one that does not exist, is not reached,
            is reached twice, returns no Tensor (N, ...), returns the logits, or whose output is changed in place
            further up (DKP needs it as it was); logits that are not (N, K); options that the rule does not use.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[str],
        rule: str,
        example: Tensor,
        *,
        update: str = "optimizer",
        feedback_lr: float | None = None,
        feedback_weight_decay: float | None = None,
        init: Callable[[Tensor], Any] = nn.init.kaiming_uniform_,
    ) -> None:
        super().__init__()
        _check_options(model, points, rule, update, feedback_lr, feedback_weight_decay)
        self.model = model
        self.points = tuple(points)
        self.rule = rule
        self.update = update
        self._feedback_lr = None if feedback_lr is None else torch.tensor(feedback_lr, dtype=torch.float64)
        self.feedback_weight_decay = feedback_weight_decay or 0.0
        self.feedback = nn.Module()
        self._taps: dict[str, tuple[Tensor, int]] | None = None
        self._zeros: list[Tensor] | None = None
        # partial of a bound method: a deep copy's hooks then belong to the copy
        hooks = [
            model.get_submodule(point).register_forward_hook(functools.partial(self._tap, point))
            for point in self.points
        ]
        try:
            with untouched(model), torch.no_grad(), torch.autocast(example.device.type, enabled=False):
                model.eval()
                logits, activations = self.tapped_forward(example)
            check_logits(logits)
            for point, h in zip(self.points, activations, strict=True):
                if h is logits:
                    raise ValueError(
                        f"feedback point {point!r} returns the logits: expected a point below the last layer"
                    )
            # an empty B of the right shape for each point: the function's own checks, in one place
            direct_feedback(logits, activations, [h.new_empty(logits.shape[-1], *h.shape[1:]) for h in activations])
        except BaseException:
            for hook in hooks:
                hook.remove()
            raise
        if rule != "BP":
            for point, h in zip(self.points, activations, strict=True):
                self._add_feedback(point, logits.shape[1], h, init)

    def _add_feedback(self, point: str, classes: int, h: Tensor, init: Callable[[Tensor], Any]) -> None:
        matrix_KD = torch.empty(classes, math.prod(h.shape[1:]))  # on the CPU: a seed gives one B on every device
        init(matrix_KD)
        matrix = matrix_KD.view(classes, *h.shape[1:]).to(device=h.device, dtype=h.dtype)
        if is_channels_last(h):
            matrix = matrix.to(memory_format=torch.channels_last)
        name = _feedback_name(point)
        if self.rule == "DKP":
            parameter = nn.Parameter(matrix, requires_grad=self.update == "optimizer")
            self.feedback.register_parameter(name, parameter)
        else:
            self.feedback.register_buffer(name, matrix)

    def matrices(self) -> list[Tensor]:
        """The feedback matrices B_l, (K, *h_l.shape[1:]), in the order of `points`; empty for BP."""
        if self.rule == "BP":
            return []
        return [getattr(self.feedback, _feedback_name(point)) for point in self.points]

    @property
    def feedback_lr(self) -> float | None:
        """Learning rate of B in place, or None where an optimiser has it."""
        return None if self._feedback_lr is None else self._feedback_lr.item()

    @feedback_lr.setter
    def feedback_lr(self, value: float) -> None:
        if self.update != "inplace":
            raise ValueError(f'feedback_lr goes with update="inplace", got {value} with update={self.update!r}')
        self._feedback_lr = torch.tensor(value, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits (N, K); raises ValueError as the class does."""
        if self.rule == "BP" or not (self.training and torch.is_grad_enabled()):
            return self.model(x)
        self._zeros = zeros = []
        try:
            logits, _ = self.tapped_forward(x)
        finally:
            self._zeros = None
        if self.update == "inplace":
            refuse_float16(logits.device, logits.dtype)
        return broadcast_error(logits, zeros)

    def tapped_forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the model as it is; return its logits and each point's h_l."""
        self._taps = {}
        try:
            logits = self.model(x)
            taps = self._taps
        finally:
            self._taps = None
        for point in self.points:
            if point not in taps:
                raise ValueError(f"feedback point {point!r} was never reached in the forward pass, expected once")
            h, version = taps[point]
            if self.rule == "DKP" and version != _version(h):
                raise ValueError(
                    f"the output of feedback point {point!r} was changed in place further up, expected it as it was:"
                    " make that operation not in place, or move the point behind it"
                )
        return logits, [taps[point][0] for point in self.points]

    def _tap(self, point: str, module: nn.Module, inputs: tuple, h: Tensor) -> Tensor | None:
        if self._taps is None:
            return None
        if not isinstance(h, Tensor):
            raise ValueError(f"feedback point {point!r} returned a {type(h).__name__}, expected one Tensor")
        if point in self._taps:
            raise ValueError(f"feedback point {point!r} was reached twice in one forward pass, expected once")
        self._taps[point] = h, _version(h)
        if self._zeros is None:
            return None
        feedback = getattr(self.feedback, _feedback_name(point))
        check_point(h, feedback, len(h), len(feedback), f" {point!r}")
        options = {"inplace_lr": self._feedback_lr, "inplace_weight_decay": self.feedback_weight_decay}
        self._zeros.append(feedback_point(h, feedback, **options))
        return h.detach()

    def extra_repr(self) -> str:
        return f"rule={self.rule}, points={self.points}" + (f", update={self.update}" if self.rule == "DKP" else "")


def _feedback_name(point: str) -> str:
    return point.replace(".", "_")


def _version(h: Tensor) -> int:
    """How often `h` was written to; the compiler, which makes every operation out of place, needs no such number."""
    return 0 if torch.compiler.is_compiling() else h._version


def _check_options(
    model: nn.Module,
    points: Sequence[str],
    rule: str,
    update: str,
    feedback_lr: float | None,
    feedback_weight_decay: float | None,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {RULES}")
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}, expected one of {UPDATES}")
    if update == "inplace" and rule != "DKP":
        raise ValueError(f'update="inplace" needs rule "DKP", got {rule!r}: its B is not learned')
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
        if _feedback_name(point) in map(_feedback_name, points[:i]):
            raise ValueError(f"feedback point {point!r} has the name of another but for '.' and '_': rename the module")
