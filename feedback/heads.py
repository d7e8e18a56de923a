"""Heads: a small net at each point, from h_l to logits of its own, that carries an error back to h_l.

LAS is the linear case. A head's parameters learn by the head's own error e_l, the gradient of the loss at its logits z.

    grad_h     = J^T e       J = dz/dh_l: by the network's error, as DFA's (HEAD)
    grad_h     = J^T e_l     by the head's own, so that a block waits for nothing (LOCAL: Nokland, Eidnes 2019;
                             Belilovsky, Eickenberg, Oyallon 2019)
    grad_theta = (dz/dtheta)^T e_l

Shapes: N batch, K classes, D features of one block.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from feedback.checks import shape_of
from feedback.labels import Labels
from feedback.layout import as_rows, is_channels_last

HEAD_WIDTH, HEAD_POOL = 128, 7
MakeHead = Callable[[Tensor, int], nn.Module]  # (an h_l, K) to its head


class OwnError(torch.autograd.Function):
    """Return an empty, 0-d, whose gradient is the factor that scales the loss. The logits (N, ..., K) get e_l."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Labels) -> Tensor:
        ctx.labels = labels
        ctx.save_for_backward(logits)
        return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        labels = ctx.labels.seen_in(logits.shape[:-1], scale)
        return labels.error_of(logits.flatten(0, -2)).view_as(logits).to(logits.dtype), None


def head_point(h: Tensor, head: nn.Module, labels: Labels, own_error: bool) -> tuple[Tensor, ...]:
    """What `feedback.functional.feedback_point` is for a matrix: return empties for `broadcast_error`.

    Args:
        h: (N, ...), still attached to its own block's graph.
        head: maps h to logits (N, ..., K), the classes last.
        labels: those of the batch.
        own_error: send the head's own error to `h` instead of the network's.
    """
    if own_error:
        return (OwnError.apply(checked(head(h), h, labels), labels),)
    first, rest = before_parameters(head)
    seen = first(h)
    fixed: dict[str, Tensor] = {}
    for prefix, module in rest.named_modules():  # once each, but with every name of a tied parameter
        of_module: dict[str, Any] = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        fixed.update((name, parameter.detach()) for name, parameter in module.named_parameters(**of_module))
        fixed.update((name, buffer.clone()) for name, buffer in module.named_buffers(**of_module))
    z = checked(functional_call(rest, fixed, seen, tie_weights=False), h, labels)
    return z, OwnError.apply(rest(seen.detach()), labels)


def checked(z: Any, h: Tensor, labels: Labels) -> Tensor:
    """Return a head's logits; raise ValueError unless they are (N, K), or (N, ..., K) as the net's are."""
    fits = isinstance(z, Tensor) and z.dim() > 1 and (z.shape[0], z.shape[-1]) == (len(h), labels.classes)
    if not fits or (labels.shares is not None and z.dim() not in (2, labels.shares.dim())):
        positions = "" if labels.shares is not None and labels.shares.dim() == 2 else "..., "
        raise ValueError(
            f"a head returns {shape_of(z)}, expected ({len(h)}, {positions}{labels.classes}): classes last"
        )
    return z


def before_parameters(head: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules that a plain `nn.Sequential` begins with and that have no parameters or buffers, and the rest."""
    if type(head) is not nn.Sequential or head._forward_hooks or head._forward_pre_hooks:
        return nn.Identity(), head
    states = [len([*module.parameters(), *module.buffers()]) > 0 for module in head]
    first = states.index(True) if any(states) else len(states)
    return head[:first], head[first:]


class AverageTo(nn.AdaptiveAvgPool2d):
    """The same, but over windows that do not overlap where such give the output its size: they cost less."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, *sides)."""
        sides = cast("tuple[int, int]", self.output_size)
        window = [-(-size // side) for size, side in zip(x.shape[2:], sides, strict=True)]
        if tuple(-(-size // step) for size, step in zip(x.shape[2:], window, strict=True)) != sides:
            return super().forward(x)
        return F.avg_pool2d(x, window, ceil_mode=True)


class WholeMap(nn.Conv2d):
    """A Linear from a whole feature map (N, C, H, W) to (N, D), in the map's own memory order."""

    def forward(self, x: Tensor) -> Tensor:
        channels_last = is_channels_last(x)
        return F.linear(as_rows(x, channels_last), as_rows(self.weight, channels_last), self.bias)


def default_head(
    h: Tensor, classes: int, width: int = HEAD_WIDTH, pool: int = HEAD_POOL, scale: float = 1.0
) -> nn.Module:
    """The head that HEAD and LOCAL have by default: of a feature map a small net, of a vector a Linear, as LAS has.

    Args:
        h: such as the point's h_l, (N, D) or (N, C, H, W). The latter goes through average pooling, a Linear, a batch
            norm and a ReLU first.
        classes: K.
        width: features between the two Linears.
        pool: the side to which a feature map is averaged, at most.
        scale: factor on the random values that the last Linear starts from; with 0 the first signals are zero.

    Raises:
        ValueError: an h_l of other dimensions.
    """
    if h.dim() not in (2, 4):
        raise ValueError(f"a point returns {tuple(h.shape)}, expected (N, D) or (N, C, H, W): give a head of your own")
    last = nn.Linear(h.shape[1] if h.dim() == 2 else width, classes)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(scale)
    if h.dim() == 2:
        return last
    sides = min(pool, h.shape[2]), min(pool, h.shape[3])
    norm = nn.BatchNorm1d(width, track_running_stats=False)
    return nn.Sequential(AverageTo(sides), WholeMap(h.shape[1], width, sides), norm, nn.ReLU(), last)
