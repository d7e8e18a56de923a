"""`DirectFeedback`: train any classifier by direct feedback instead of backpropagation."""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from feedback import checks
from feedback.calls import arguments, logits_in, tensors_in, with_logits
from feedback.checks import feedback_name, version
from feedback.forward_mode import perturbed_point
from feedback.functional import broadcast_error, feedback_point
from feedback.heads import MakeHead, default_head, head_point
from feedback.labels import Labels, Loss, labels_of
from feedback.layerwise import check_no_new_modules, fed_back, init_of, modules_with_parameters
from feedback.layout import is_channels_last
from feedback.positions import feature_dims, features_last
from feedback.rules import RULES
from feedback.rules.las import readout_error
from feedback.skips import check_other_outputs, check_skips
from feedback.state import materialize, untouched
from feedback.transport import feedback_layers

LOGITS = "the logits"


class _Pass(NamedTuple):
    """State of a forward pass."""

    cut: bool
    taps: dict[str, tuple[Tensor, int]]  # each point's output and its version counter
    empties: list[Tensor] | None = None  # of the points, so far
    labels: Labels | None = None
    derivative: list[Tensor] | None = None  # of the logits along the perturbations of FDFA, when it is known
    exact: bool = False  # by FA and KP: each layer's B is its weight, which is backpropagation
    copies: bool = False  # what flows on from a point is a copy, so that nothing changes its output in place

    def again(self) -> "_Pass":
        """One like this, that has not begun."""
        return self._replace(taps={}, empties=None if self.empties is None else [])


def in_backward() -> bool:
    """Whether autograd runs a backward pass, in which a checkpointed block runs again."""
    return torch._C._current_graph_task_id() >= 0


def is_capturing(x: Tensor) -> bool:
    """Whether `x` is part of a CUDA graph that is being captured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Handles(list[RemovableHandle]):
    """Of the hooks on a model, which go with the last wrapper that has these handles."""

    def take_off(self) -> None:
        for handle in self:
            handle.remove()

    __del__ = take_off


class _Hooks:
    """The hooks on a model, and what they need: not the wrapper, so that it is freed when it is dropped."""

    running = 0  # passes of any wrapper

    def __init__(self, rule: str, lr: float | None, weight_decay: float | None, group: Any) -> None:
        self.rule, self.feedback, self.group = rule, nn.Module(), group
        self.positions: str | None = None
        self.feature_dims: dict[str, int] = {}  # by point, where there are positions
        self.lr = None if lr is None else torch.tensor(lr, dtype=torch.float64)
        self.weight_decay = torch.tensor(weight_decay or 0.0, dtype=torch.float64)
        self.found_inf: Tensor | None = None
        self.under_way: _Pass | None = None
        self.last: _Pass | None = None  # without its tensors but the labels
        self.backwards = 0  # passes in which e was seen
        self.owner: weakref.ref[DirectFeedback] | None = None

    def current_pass(self) -> _Pass | None:
        """The pass under way. Where a checkpointed block runs again in the backward pass: one like the last."""
        if self.under_way is not None or torch.compiler.is_compiling():
            return self.under_way
        if not in_backward():  # the bare model is called
            self.last = None if torch.is_grad_enabled() else self.last
            return None
        return self.last and self.last.again()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"under_way": None, "last": None, "owner": None}

    def refuse_bare_training(self) -> None:
        """Raise ValueError if the wrapper's model is in training; a copy of the model alone has no wrapper."""
        net = None if self.owner is None else self.owner()
        if net is not None and net.model.training and torch.is_grad_enabled() and RULES[self.rule].has_feedback:
            raise ValueError(checks.BARE)

    def tap(self, point: str, module: nn.Module, inputs: tuple, h: Tensor) -> Tensor | None:
        under_way = self.current_pass()
        if under_way is None:
            if not (_Hooks.running or torch.compiler.is_compiling() or in_backward()):
                self.refuse_bare_training()
            return None
        cut = under_way.cut and not RULES[self.rule].chained
        if self.lr is not None and h.is_cuda and not self.lr.is_cuda and not torch.compiler.is_compiling():
            self.lr = self.lr.to(h.device, torch.float32)
        checks.check_tap(point, h, point in under_way.taps, cut)
        under_way.taps[point] = h, version(h)
        if under_way.copies:
            return h.detach().clone() if cut else h.clone()
        if not cut or under_way.empties is None:
            return h.detach() if cut else None
        if under_way.derivative is not None:
            if torch.compiler.is_compiling():
                raise ValueError(checks.FORWARD_MODE)
            B = getattr(self.feedback, feedback_name(point))
            empties, flow = perturbed_point(h, B, under_way.derivative, f" {point!r}")
            under_way.empties.extend(empties)
            return flow
        under_way.empties.extend(self.empties_of(point, h, under_way.labels))
        return h.detach()

    def empties_of(self, point: str, h: Tensor, labels: Labels | None) -> tuple[Tensor, ...]:
        """What takes the error to the point's h_l in the backward pass."""
        feedback = getattr(self.feedback, feedback_name(point))
        if RULES[self.rule].head:
            return head_point(h, feedback, cast(Labels, labels), RULES[self.rule].sent is readout_error)
        return feedback_point(
            features_last(h, self.feature_dims.get(point, -1), self.positions),
            feedback,
            rule=self.rule,
            name=f" {point!r}",
            labels=labels,
            inplace_lr=self.lr,
            inplace_weight_decay=self.weight_decay,
            group=self.group,
            found_inf=self.found_inf,
        )

    def replace_backward(self, name: str, layer: nn.Module, inputs: tuple, named: dict, out: Any) -> Any:
        under_way = self.current_pass()
        if under_way is None or not under_way.cut:
            return None
        return fed_back(layer, name, inputs, named, out, None if under_way.exact else self.feedback)

    def look_at_error(
        self, logits: Tensor, class_dim: int, labels: Labels | None, first_in_place: bool, error: Tensor
    ) -> None:
        """Check e in the 1st, 10th, 100th ... backward pass: on a GPU, to read it back is a synchronisation."""
        self.backwards += 1
        if str(self.backwards).strip("0") != "1":
            return
        if first_in_place:
            checks.refuse_large(error)
        if labels is not None:
            checks.warn_of_other_loss(error, logits, class_dim, labels)


class DirectFeedback(nn.Module):
    """A model whose blocks learn from the output error alone; in eval mode or under `no_grad`, the bare model.

    Each feedback point ends a block: its output h_l flows on detached, and its gradient is e @ B_l, with
    e = dL/dlogits. So every block's backward needs only e, and no gradient with respect to a block's input is
    ever computed. The loss is called, and `backward()` with it, as on any other module.

    The rules are in feedback/rules, a file each. A fixed B is a buffer, one that learns a Parameter. BP is plain
    autograd. FA and KP go backward layer by layer as BP does, but every convolution, Linear and
    MultiheadAttention whose input needs a gradient has a B of each weight's shape and sends it the error through B;
    there the points only say where angles are measured, and KP's B gets W's gradient, to be stepped as W is.
    A rule that needs the labels is called as `net(x, target=y)`. HEAD and LOCAL have a small net at each point in B's
    place, and FDFA runs its training pass under `forward_ad.dual_level`, so the model's operations need a forward mode.

    DKP and LAS learn B_l in one of two ways. `update="optimizer"` leaves grad_B_l in `.grad` for an optimiser
    over `net.feedback.parameters()`; `update="inplace"` steps B_l inside the backward pass by plain SGD with
    `feedback_lr` and `feedback_weight_decay`, and needs no memory beyond B but, on a GPU, for one point's product at a
    time. In place, each backward pass is a step of B: with gradient accumulation B steps once per micro-batch. A loss
    scaled by a factor scales the step too, and so would a GradScaler: the first backward pass refuses an error above 4,
    as one makes it with less than some 16,000 images or positions. FDFA and heads learn by `.grad` alone. FDFA's does
    not depend on the loss: each backward pass adds a whole one.

    Logits may have positions, as tokens (N, T, K) or pixels (N, K, H, W). B_l is (K, D) then, for all positions of
    h_l, (N, T, D) or (N, D, H, W), and the error at a position goes to h_l at that position. Where h_l has others, it
    goes the way back of adaptive average pooling: to several places in equal parts, or as a sum. Sizes may change
    from pass to pass.

    Args:
        model: any that returns logits (N, K) or (N, ..., K). The wrapper adds forward hooks to it; they go when the
            wrapper is dropped or taken off. Lazy modules get their shapes from the example.
        points: names of submodules, each called once a forward pass, each returning one Tensor h_l (N, ...).
        rule: a key of `feedback.RULES`.
        example: an input batch (of one or more), in the shape, dtype and memory format of the real ones: a Tensor, a
            tuple of positional arguments, or a dict of keyword arguments. It runs through the model a few times,
            without effect on BatchNorm statistics or random numbers. On the meta device B is there, too.
        logits: where the model's output has them, if it is more than they: a key, an attribute or an index.
        class_dim: the dimension of the classes in the logits: by default the last, but of four or more it must be said.
        feature_dim: the dimension of the features in h_l, where B has no positions, or a dict of it by point; by
            default `class_dim`, or the last of (N, T, D).
        positions: None, "own" or "pooled". By default a B for each position where the logits are (N, K), else "own", as
            above. With "pooled" a sample's errors are summed, and go to all positions of h_l in equal parts; B_l is
            (K, D) then, however large h_l is.
        update: "optimizer" or "inplace" (DKP and LAS only).
        feedback_lr: learning rate of B in place; an attribute, free to be changed between steps, compiled, captured or
            not. On a GPU it is a float32 there.
        feedback_weight_decay: weight decay of B in place, as in `torch.optim.SGD`.
        loss: by which LAS's readouts and heads learn, of logits and target, a mean; by default cross-entropy. The
            factor by which the training loss is scaled, as when it is divided for gradient accumulation, is found in
            each backward pass and need not be in it; a warning says where there is none. Not for torch.compile.
        head: for HEAD and LOCAL, makes a point's head from an h_l and K: a module that maps h_l to logits, the classes
            last; by default `feedback.heads.default_head`.
        init: fills B in place. It gets B_l as a (K, D_l) float matrix, or for FA and KP as (O, D). The default is
            kaiming-uniform with fan-in D_l, as the original's; for FA and KP, PyTorch's own for weights.
        group: the process group over which B in place is averaged; by default all ranks, if there are several.
        classes: K, where the model is a stage of a net and returns no logits: see `feedback.pipeline`.
        missing: "skip" where a training pass may leave points out, as with LayerDrop: their B learns nothing then.
        allow_skips: take points that a path leads around, in eval mode, in which the wrapper looks: what lies below
            them then learns by backpropagation as well. And points from which nothing learns.

    Attributes:
        feedback: the module that holds every B_l, of shape (K, *h_l.shape[1:]) or (K, D), under its point's name with
            "_" for "."; for FA and KP, of the weight's shape under its layer's name, or a MultiheadAttention's under
            the weight's. For HEAD and LOCAL the head, under the point's name.

    Raises:
        ValueError: an unknown rule or update; no points, a point twice, one that does not exist, is not reached,
            is reached twice, returns no Tensor (N, ...), returns the logits, or whose output is changed in place
            further up (DKP, LAS and heads need it as it was); logits that are not there; options that the rule does not
            use; unless `allow_skips`, points that a path leads around or from which nothing would learn, and a weight
            on both sides of a point; for FA and KP, what `feedback.transport.feedback_layers` refuses. In training, a
            model that computes a loss of its logits itself, or is called without its wrapper.
    """

    loss: Loss | None

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[str],
        rule: str,
        example: Any,
        *,
        logits: str | int | None = None,
        class_dim: int | None = None,
        feature_dim: int | Mapping[str, int] | None = None,
        positions: str | None = None,
        update: str = "optimizer",
        feedback_lr: float | None = None,
        feedback_weight_decay: float | None = None,
        loss: Loss | None = None,
        init: Callable[[Tensor], Any] | None = None,
        head: MakeHead | None = None,
        group: Any = None,
        classes: int | None = None,
        missing: str = "refuse",
        allow_skips: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(example, Mapping) and "target" in example:
            raise ValueError(
                "the example has a 'target', which is the wrapper's own keyword: pass the model's by position"
            )
        rates = feedback_lr, feedback_weight_decay
        checks.check_options(model, points, rule, update, *rates, positions, missing, loss, head, init, feature_dim)
        self.model = model
        self.points = tuple(points)
        self.rule = rule
        self.update = update
        object.__setattr__(self, "loss", loss)  # a Module is no part of the wrapper, nor of its state dict
        self.missing = missing
        self.allow_skips = allow_skips
        self._feedback_lr = feedback_lr
        self._logits = logits
        self._known = modules_with_parameters(model)
        self._hooks = hooks = _Hooks(rule, *rates, group)
        self.feedback = hooks.feedback
        hooks.owner = weakref.ref(self)
        first = next(tensors_in(example), None)
        self._device_type = "cpu" if first is None or first.is_meta else first.device.type
        materialize(model, lambda: self._call(example))
        # partial of a bound method: a deep copy's hooks then belong to the copy
        taps = {point: functools.partial(hooks.tap, point) for point in self.points}
        self._handles = _Handles(model.get_submodule(point).register_forward_hook(tap) for point, tap in taps.items())
        try:
            with self._looking(torch.no_grad()):
                out, by_point = self.tapped_forward(example, cut=False)
            if classes is None:
                checks.check_below(by_point, out)
            else:
                out = out.new_empty(len(out), classes)
            checks.check_logits(out, class_dim)
            self.class_dim = -1 if class_dim is None else class_dim
            whole = out.dim() == 2 or RULES[rule].head  # a head sees all of h_l
            self.positions = hooks.positions = positions or (None if whole else "own")
            self._classes = out.shape[self.class_dim]
            if positions == "own" and out.dim() == 2:
                raise ValueError('positions is "own", expected "pooled" or None: the logits (N, K) have no positions')
            checks.check_shapes(by_point, len(out))
            if out.dim() > 2 and (RULES[rule].perturbs or (RULES[rule].head and head is None)):
                own = ", or a head of your own" if RULES[rule].head else ""
                raise ValueError(f"the logits {tuple(out.shape)} have positions, expected (N, K) for rule {rule}{own}")
            if self.positions is not None:
                hooks.feature_dims = feature_dims(by_point, out, self.positions, class_dim, feature_dim)
            if not (allow_skips or RULES[rule].chained):
                self._check_paths(example)
            layers: dict[str, dict[str, Tensor]] = {}
            if RULES[rule].layerwise:
                with self._looking(torch.enable_grad()):
                    layers = feedback_layers(model, lambda: self._call(example), RULES[rule].as_weight)
            for name, weights in layers.items():
                layer: Any = model.get_submodule(name)
                replace = functools.partial(hooks.replace_backward, name)
                self._handles.append(layer.register_forward_hook(replace, prepend=True, with_kwargs=True))
                for matrix, weight in weights.items():
                    self._add_feedback(matrix, len(weight), weight.detach(), init_of(layer, init))
            if RULES[rule].head:
                for point, h in by_point.items():
                    made = (head or default_head)(h, self._classes)
                    if not isinstance(made, nn.Module):
                        raise ValueError(f"head makes {checks.shape_of(made)}, expected a Module for point {point!r}")
                    made.to(device=h.device, dtype=h.dtype if h.is_floating_point() else None)
                    if is_channels_last(h):
                        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    self.feedback.add_module(feedback_name(point), made)
            elif not RULES[rule].chained:
                for point, h in by_point.items():
                    seen = h if self.positions is None else h.movedim(hooks.feature_dims[point], -1).flatten(0, -2)
                    self._add_feedback(point, self._classes, seen, init or nn.init.kaiming_uniform_)
        except BaseException:
            self.unwrap()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hooks.owner = weakref.ref(self)

    @contextlib.contextmanager
    def _looking(self, grad_mode: Any) -> Iterator[None]:
        """Run the model in eval mode and full precision, uncompiled, without a trace."""
        eager = torch.compiler.set_stance("force_eager")  # a compiled model's parameters all hang on one node
        with untouched(self.model), grad_mode, torch.autocast(self._device_type, enabled=False), eager:
            self.model.eval()
            yield

    def _check_paths(self, example: Any) -> None:
        with self._looking(torch.enable_grad()):
            out, activations = self.tapped_forward(example, cut=True)
            checks.check_signals(self.model, activations)
            ends = activations | {LOGITS: out}
            check_skips(self.model, lambda: logits_in(self._call(example), self._logits), ends)

    def _call(self, example: Any) -> Any:
        inputs, named = arguments(example)
        return self.model(*inputs, **named)

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

        Where heads stand in for them, the heads' parameters. Their names are those of `net.feedback.named_parameters()`
        or `.named_buffers()`. Empty for BP.
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
    def feature_dims(self) -> list[int]:
        """The dimension of the features in each point's h_l, as far as there are positions."""
        return [self._hooks.feature_dims.get(point, -1) for point in self.points]

    @property
    def found_inf(self) -> Tensor | None:
        """A 0-d float Tensor beside B, if set: while it is 1, B in place stays as it is (as in fused optimisers)."""
        return self._hooks.found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        self._hooks.found_inf = value

    def forward(self, *inputs: Any, target: Any = None, **named: Any) -> Any:
        """Return what the model returns for these inputs.

        Args:
            inputs, named: the model's, all but `target`.
            target: what the loss takes beside the logits: class ids (N, ...), or -100 to ignore one; or a probability
                for each logit; with `loss` anything. LAS, DRTP, HEAD and LOCAL need it to train; other rules ignore it.

        Raises:
            ValueError: as the class does, and in training without a target that the rule needs.
        """
        rule = RULES[self.rule]
        if self.model.training and not self.training and torch.is_grad_enabled():
            raise ValueError(checks.MODES)
        if not (self.training and torch.is_grad_enabled()):
            return self.model(*inputs, **named)
        if rule.chained:
            check_no_new_modules(self.model, self._known)
            return self._run(_Pass(cut=True, taps={}), inputs, named)
        if self.missing == "skip":
            check_no_new_modules(self.model, self._known)
        if not torch.compiler.is_compiling():
            self._hooks.last = None  # with its labels
        labels = self.labels_of(target)
        derivative: list[Tensor] | None = [] if rule.perturbs else None
        with contextlib.nullcontext() if derivative is None else forward_ad.dual_level():
            out, empties = self.forward_with_empties(labels, derivative, *inputs, **named)
            logits = logits_in(out, self._logits)
            if derivative is not None:
                tangent = forward_ad.unpack_dual(logits).tangent  # None if no point was reached
                derivative.append(torch.zeros_like(logits) if tangent is None else tangent.detach())
        routed = self.route(logits, empties, labels)
        if out is not logits:
            check_other_outputs(out, logits)
        if rule.perturbs:
            checks.refuse_float16(routed, checks.FLOAT16_FDFA)
        if self.update == "inplace":
            checks.refuse_float16(routed, checks.FLOAT16_IN_PLACE)
        first_in_place = self.update == "inplace" and self._hooks.backwards == 0
        eager = not (torch.compiler.is_compiling() or is_capturing(routed))
        if (first_in_place or labels is not None) and eager and routed.requires_grad:
            look = functools.partial(self._hooks.look_at_error, routed.detach(), self.class_dim, labels, first_in_place)
            routed.register_hook(look)
        return with_logits(out, self._logits, routed)

    def route(self, logits: Tensor, empties: Sequence[Tensor], labels: Labels | None) -> Tensor:
        """The logits, whose error goes to the points' empties in the backward pass."""
        checks.check_logits(logits, self.class_dim)
        if labels is not None:
            shape = logits.movedim(self.class_dim, -1).shape
            checks.check_labels(labels, shape)
            labels.positions[:] = shape[1:-1]
        return broadcast_error(logits, empties, self.class_dim, labels)

    def head_empties(self, activations: Mapping[str, Tensor], labels: Labels) -> list[Tensor]:
        """The empties of each point's h_l that its head makes."""
        made = (self._hooks.empties_of(point, h, labels) for point, h in activations.items())
        return [empty for empties in made for empty in empties]

    def labels_of(self, target: Any) -> Labels | None:
        """The labels of a batch, for a rule that reads them.

        Raises:
            ValueError: there are none.
        """
        if not RULES[self.rule].needs_target:
            return None
        if target is None:
            raise ValueError(
                f"{self.rule} reads the labels: call net(x, target=y) in training, with y as the loss takes it"
            )
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return labels_of(target, self._classes, dtype, self.class_dim, self.loss)

    def forward_with_empties(
        self, labels: Labels | None, derivative: list[Tensor] | None, /, *inputs: Any, **named: Any
    ) -> tuple[Any, list[Tensor]]:
        """Return the model's output by a direct rule, and the points' empties, whose gradient is to be e.

        FDFA's perturbations need a `dual_level`, and `derivative`, a list, gets that of the logits from the caller.
        """
        empties: list[Tensor] = []
        under_way = _Pass(cut=True, taps={}, empties=empties, labels=labels, derivative=derivative)
        return self._run(under_way, inputs, named), empties

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run passes of which a checkpointed block, when it runs again in a later backward pass, is to know nothing."""
        last = self._hooks.last
        try:
            yield
        finally:
            self._hooks.last = last

    def tapped_forward(
        self, example: Any, cut: bool, exact: bool = False, measured: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on an input as the example; return its logits and the h_l of each point that it reached.

        With `cut`, build the graph that the rule trains with: h_l is detached; by FA and KP the gradient passes through
        B, or if `exact` through the weights, by the same operations; by BP nothing changes. If `measured`, h_l stays as
        it was where an operation further up is in place, and points may be left out as in training.
        """
        under_way = _Pass(cut=cut, taps={}, exact=exact, copies=measured)
        out = self._run(under_way, *arguments(example), missing=self.missing if measured else "refuse")
        reached = {point: under_way.taps[point][0] for point in self.points if point in under_way.taps}
        return logits_in(out, self._logits), reached

    def _run(self, under_way: _Pass, inputs: tuple, named: dict[str, Any], missing: str | None = None) -> Any:
        self._hooks.under_way = under_way
        eager = not torch.compiler.is_compiling()
        if eager:
            self._hooks.last = under_way.again()
            _Hooks.running += 1
        try:
            out = self.model(*inputs, **named)
        finally:
            self._hooks.under_way = None
            if eager:
                _Hooks.running -= 1
        unchanged = RULES[self.rule].correlated is not None
        checks.check_taps(self.points, under_way.taps, unchanged=unchanged, missing=missing or self.missing)
        return out

    def extra_repr(self) -> str:
        update = f", update={self.update}" if RULES[self.rule].learns else ""
        positions = f", positions={self.positions}" if RULES[self.rule].sent and self.positions else ""
        skips = ", allow_skips=True" if self.allow_skips else ""
        return f"rule={self.rule}, points={self.points}{positions}{update}{skips}"
