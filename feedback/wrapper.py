"""`DirectFeedback`: train any classifier by direct feedback instead of backpropagation."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedback import checks
from feedback.checks import feedback_name, version
from feedback.functional import broadcast_error, feedback_point
from feedback.layerwise import check_no_new_modules, fed_back, init_of, modules_with_parameters
from feedback.layout import is_channels_last
from feedback.rules import RULES
from feedback.skips import check_skips
from feedback.state import untouched
from feedback.transport import feedback_layers

LOGITS = "the logits"


class _Pass(NamedTuple):
    """State of a forward pass."""

    cut: bool
    taps: dict[str, tuple[Tensor, int]]  # each point's output and its version counter
    zeros: list[Tensor] | None = None  # of `feedback_point`, so far
    target: Tensor | None = None


class _Handles(list[RemovableHandle]):
    """Of the hooks on a model, which go with the last wrapper that has these handles."""

    def take_off(self) -> None:
        for handle in self:
            handle.remove()

    __del__ = take_off


class _Hooks:
    """The hooks on a model, and what they need: not the wrapper, so that it is freed when it is dropped."""

    def __init__(self, rule: str, lr: float | None, weight_decay: float | None, group: Any) -> None:
        self.rule, self.feedback, self.group = rule, nn.Module(), group
        self.lr = None if lr is None else torch.tensor(lr, dtype=torch.float64)
        self.weight_decay = torch.tensor(weight_decay or 0.0, dtype=torch.float64)
        self.found_inf: Tensor | None = None
        self.under_way: _Pass | None = None
        self.last: _Pass | None = None  # without its tensors but the target

    def current_pass(self) -> _Pass | None:
        """The pass under way. Where a checkpointed block runs again in the backward pass: one like the last."""
        if self.under_way is not None or torch.compiler.is_compiling():
            return self.under_way
        if torch._C._current_graph_task_id() < 0:  # not in a backward pass: the bare model is called
            self.last = None if torch.is_grad_enabled() else self.last
            return None
        return self.last and self.last._replace(taps={}, zeros=None if self.last.zeros is None else [])

    def tap(self, point: str, module: nn.Module, inputs: tuple, h: Tensor) -> Tensor | None:
        under_way = self.current_pass()
        if under_way is None:
            return None
        cut = under_way.cut and not RULES[self.rule].chained
        if self.lr is not None and h.is_cuda and not self.lr.is_cuda and not torch.compiler.is_compiling():
            self.lr = self.lr.to(h.device, torch.float32)
        checks.check_tap(point, h, point in under_way.taps, cut)
        under_way.taps[point] = h, version(h)
        if cut and under_way.zeros is not None:
            under_way.zeros.append(
                feedback_point(
                    h,
                    getattr(self.feedback, feedback_name(point)),
                    rule=self.rule,
                    name=f" {point!r}",
                    target=under_way.target,
                    inplace_lr=self.lr,
                    inplace_weight_decay=self.weight_decay,
                    group=self.group,
                    found_inf=self.found_inf,
                )
            )
        return h.detach() if cut else None

    def replace_backward(self, name: str, layer: nn.Module, inputs: tuple, named: dict, out: Any) -> Any:
        under_way = self.current_pass()
        if under_way is None or not under_way.cut:
            return None
        return fed_back(layer, name, inputs, named, out, self.feedback)


class DirectFeedback(nn.Module):
    """A model whose blocks learn from the output error alone; in eval mode or under `no_grad`, the bare model.

    Each feedback point ends a block: its output h_l flows on detached, and its gradient is e @ B_l, with
    e = dL/dlogits. So every block's backward needs only e, and no gradient with respect to a block's input is
    ever computed. The loss is called, and `backward()` with it, as on any other module.

    The rules are in feedback/rules, a file each. A fixed B is a buffer, one that learns a Parameter. BP is plain
    autograd. FA and KP go backward layer by layer as BP does, but every convolution, Linear and
    MultiheadAttention whose input needs a gradient has a B of each weight's shape and sends it the error through B;
    there the points only say where angles are measured, and KP's B gets W's gradient, to be stepped as W is.
    A rule that needs the labels is called as `net(x, target=y)`.

    DKP and LAS learn B_l in one of two ways. `update="optimizer"` leaves grad_B_l in `.grad` for an optimiser
    over `net.feedback.parameters()`; `update="inplace"` steps B_l inside the backward pass by plain SGD with
    `feedback_lr` and `feedback_weight_decay`, and needs no memory beyond B but, on a GPU, for one point's product at a
    time. In place, each backward pass is a step of B: with gradient accumulation B steps once per micro-batch. A loss
    scaled by a factor scales DKP's step too.

    Args:
        model: maps one Tensor (N, ...) to logits (N, K). The wrapper adds forward hooks to it; they go when the wrapper
            is dropped or taken off.
        points: names of submodules, each called once a forward pass, each returning one Tensor h_l (N, ...).
        rule: a key of `feedback.RULES`.
        example: an input batch (of one or more), in the shape, dtype and memory format of the real ones. It runs
            once through the model, without effect on BatchNorm statistics or random numbers, to learn the shapes.
        update: "optimizer" or "inplace" (DKP and LAS only).
        feedback_lr: learning rate of B in place; an attribute, free to be changed between steps, compiled, captured or
            not. On a GPU it is a float32 there.
        feedback_weight_decay: weight decay of B in place, as in `torch.optim.SGD`.
        init: fills B in place. It gets B_l as a (K, D_l) float matrix, or for FA and KP as (O, D). The default is
            kaiming-uniform with fan-in D_l, as the original's; for FA and KP, PyTorch's own for weights.
        group: the process group over which B in place is averaged; by default all ranks, if there are several.
        classes: K, where the model is a stage of a net and returns no logits: see `feedback.pipeline`.
        allow_skips: take points that a path leads around, in eval mode, in which the wrapper looks: what lies below
            them then learns by backpropagation as well. And points from which nothing learns.

    Attributes:
        feedback: the module that holds every B_l, of shape (K, *h_l.shape[1:]), under its point's name with "_"
            for "."; for FA and KP, of the weight's shape under its layer's name, or a MultiheadAttention's under the
            weight's.

    Raises:
        ValueError: an unknown rule or update; no points, a point twice, one that does not exist, is not reached,
            is reached twice, returns no Tensor (N, ...), returns the logits, or whose output is changed in place
            further up (DKP and LAS need it as it was); logits that are not (N, K); options that the rule does not use;
            unless `allow_skips`, points that a path leads around or from which nothing would learn, and a weight on
            both sides of a point; for FA and KP, what `feedback.transport.feedback_layers` refuses.
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
        init: Callable[[Tensor], Any] | None = None,
        group: Any = None,
        classes: int | None = None,
        allow_skips: bool = False,
    ) -> None:
        super().__init__()
        checks.check_options(model, points, rule, update, feedback_lr, feedback_weight_decay)
        self.model = model
        self.points = tuple(points)
        self.rule = rule
        self.update = update
        self.allow_skips = allow_skips
        self._feedback_lr = feedback_lr
        self._known = modules_with_parameters(model)
        self._hooks = hooks = _Hooks(rule, feedback_lr, feedback_weight_decay, group)
        self.feedback = hooks.feedback
        # partial of a bound method: a deep copy's hooks then belong to the copy
        taps = {point: functools.partial(hooks.tap, point) for point in self.points}
        self._handles = _Handles(model.get_submodule(point).register_forward_hook(tap) for point, tap in taps.items())
        try:
            with untouched(model), torch.no_grad(), torch.autocast(example.device.type, enabled=False):
                model.eval()
                logits, activations = self.tapped_forward(example, cut=False)
            if classes is None:
                checks.check_below(self.points, activations, logits)
            else:
                logits = logits.new_empty(len(example), classes)
            checks.check_logits(logits)
            checks.check_shapes(self.points, activations, logits)
            if not (allow_skips or RULES[rule].chained):
                self._check_paths(example)
            run = functools.partial(model, example)
            layers = feedback_layers(model, run, RULES[rule].as_weight) if RULES[rule].layerwise else {}
            for name, weights in layers.items():
                layer: Any = model.get_submodule(name)
                replace = functools.partial(hooks.replace_backward, name)
                self._handles.append(layer.register_forward_hook(replace, prepend=True, with_kwargs=True))
                for matrix, weight in weights.items():
                    self._add_feedback(matrix, len(weight), weight.detach(), init_of(layer, init))
        except BaseException:
            self.unwrap()
            raise
        if not RULES[rule].chained:
            for point, h in zip(self.points, activations, strict=True):
                self._add_feedback(point, logits.shape[1], h, init or nn.init.kaiming_uniform_)

    def _check_paths(self, example: Tensor) -> None:
        eager = torch.compiler.set_stance("force_eager")  # a compiled model's parameters all hang on one node
        with untouched(self.model), torch.enable_grad(), torch.autocast(example.device.type, enabled=False), eager:
            self.model.eval()
            out, activations = self.tapped_forward(example, cut=True)
            checks.check_signals(self.model, self.points, activations)
            check_skips(self.model, example, dict(zip((*self.points, LOGITS), (*activations, out), strict=True)))

    def _add_feedback(self, point: str, classes: int, h: Tensor, init: Callable[[Tensor], Any]) -> None:
        matrix_KD = torch.empty(classes, math.prod(h.shape[1:]))  # on the CPU: a seed gives one B on every device
        init(matrix_KD)
        matrix = matrix_KD.view(classes, *h.shape[1:]).to(device=h.device, dtype=h.dtype)
        if is_channels_last(h):
            matrix = matrix.to(memory_format=torch.channels_last)
        name = feedback_name(point)
        if hasattr(self.feedback, name):
            raise ValueError(f"layer {point!r} has the name of another but for '.' and '_': rename the module")
        if RULES[self.rule].as_weight or RULES[self.rule].learns:
            parameter = nn.Parameter(matrix, requires_grad=self.update == "optimizer")
            self.feedback.register_parameter(name, parameter)
        else:
            self.feedback.register_buffer(name, matrix)

    def matrices(self) -> list[Tensor]:
        """Every feedback matrix: (K, *h_l.shape[1:]) in the order of `points`; for FA and KP as each layer's weight.

        Their names are those of `net.feedback.named_parameters()` or `.named_buffers()`. Empty for BP.
        """
        return [*self.feedback.parameters(), *self.feedback.buffers()]

    def unwrap(self) -> nn.Module:
        """Take the wrapper off: remove its hooks and return the bare model. The wrapper is of no use afterwards."""
        self._handles.take_off()
        return self.model

    @property
    def feedback_lr(self) -> float | None:
        """Learning rate of B in place, or None where an optimiser has it; a captured graph obeys a new one."""
        return self._feedback_lr

    @feedback_lr.setter
    def feedback_lr(self, value: float) -> None:
        if self.update != "inplace":
            raise ValueError(f'feedback_lr goes with update="inplace", got {value} with update={self.update!r}')
        if self._hooks.lr is not None and value != self._feedback_lr:
            self._hooks.lr.fill_(value)
        self._feedback_lr = value

    @property
    def feedback_weight_decay(self) -> float:
        """Weight decay of B in place."""
        return self._hooks.weight_decay.item()

    @property
    def found_inf(self) -> Tensor | None:
        """A 0-d float Tensor beside B, if set: while it is 1, B in place stays as it is (as in fused optimisers)."""
        return self._hooks.found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self._hooks.found_inf = value

    def forward(self, x: Tensor, *, target: Tensor | None = None) -> Tensor:
        """Return the model's logits (N, K).

        Args:
            x: (N, ...), as the example.
            target: (N,) class ids, or -100 to ignore an image. LAS and DRTP need it to train; other rules ignore it.

        Raises:
            ValueError: as the class does, and in training without a target that the rule needs.
        """
        rule = RULES[self.rule]
        if self.model.training and not self.training and torch.is_grad_enabled():
            raise ValueError(
                "the wrapper is in eval mode and its model in training mode: call net.train() or net.eval()"
            )
        if not rule.has_feedback or not (self.training and torch.is_grad_enabled()):
            return self.model(x)
        if rule.layerwise:
            check_no_new_modules(self.model, self._known)
            return self.tapped_forward(x, cut=True)[0]
        routed = broadcast_error(*self.forward_with_zeros(x, target))
        if self.update == "inplace":
            checks.refuse_float16(routed)
        return routed

    def forward_with_zeros(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the model's output by a direct rule, and the zeros (N, K) whose gradient is to be e."""
        if RULES[self.rule].needs_target:
            if target is None:
                raise ValueError(f"{self.rule} reads the labels: call net(x, target=y) in training, with y (N,) int64")
            checks.check_target(target, len(x), len(self.matrices()[0]))
        zeros: list[Tensor] = []
        return self._run(x, _Pass(cut=True, taps={}, zeros=zeros, target=target))[0], zeros

    def tapped_forward(self, x: Tensor, cut: bool) -> tuple[Tensor, list[Tensor]]:
        """Run the model; return its logits and each point's h_l.

        With `cut`, build the graph that the rule trains with: h_l is detached; by FA and KP the gradient passes through
        B; by BP nothing changes.
        """
        return self._run(x, _Pass(cut=cut, taps={}))

    def _run(self, x: Tensor, under_way: _Pass) -> tuple[Tensor, list[Tensor]]:
        self._hooks.under_way = under_way
        if not torch.compiler.is_compiling():
            self._hooks.last = under_way._replace(taps={}, zeros=None if under_way.zeros is None else [])
        try:
            logits = self.model(x)
        finally:
            self._hooks.under_way = None
        checks.check_taps(self.points, under_way.taps, unchanged=RULES[self.rule].learns)
        return logits, [under_way.taps[point][0] for point in self.points]

    def extra_repr(self) -> str:
        update = f", update={self.update}" if RULES[self.rule].learns else ""
        skips = ", allow_skips=True" if self.allow_skips else ""
        return f"rule={self.rule}, points={self.points}{update}{skips}"
