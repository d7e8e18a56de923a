"""Layer-by-layer feedback (FA, KP): each layer's backward pass reads B where backpropagation reads W.

Shapes: N images, I and O features in and out of a layer; B has the shape of the layer's weight W, (O, I, ...).
"""

import functools
import math
from collections.abc import Callable, Mapping, Set
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from feedback.attention import attention
from feedback.checks import feedback_name

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)


class LayerFeedbackFunction(torch.autograd.Function):
    """Identity on a layer's output a = W x + bias (x * W for a convolution). With g = dL/da, its backward pass is

        grad_x    = B^T g                           FA, Lillicrap et al. 2016; backpropagation has W^T g
        grad_W    = g x^T,  grad_bias = sum of g    as in backpropagation
        grad_B    = grad_W                          KP, Kolen, Pollack 1994; Akrout et al. 2019

    Not computed: anything that reads W. `convolution` is (stride, padding, dilation, groups), or None for a Linear.
    """

    @staticmethod
    def forward(
        ctx: Any, convolution: tuple | None, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor
    ) -> Tensor:
        ctx.convolution, ctx.weight_dtype = convolution, weight.dtype
        ctx.save_for_backward(x, B)
        return out.detach()  # a tensor of its own, not a view: what follows may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, B = ctx.saved_tensors
        *_, needs_x, needs_weight, needs_bias, needs_B = ctx.needs_input_grad
        x, B = saved_x.to(grad_out.dtype), B.to(grad_out.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.convolution is None:
            grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
            if needs_x:
                grad_x = grad_out @ B
            if needs_weight:
                grad_weight = grad_rows.T @ x.reshape(-1, x.shape[-1])
            if needs_bias:
                grad_bias = grad_rows.sum(0)
        else:  # it uses the values of its weight for grad_x alone, so it gets B
            stride, padding, dilation, groups = ctx.convolution
            mask = [needs_x, needs_weight, needs_bias]
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_out, x, B, [len(B)], stride, padding, dilation, False, [0] * len(stride), groups, mask
            )
        grad_x = None if grad_x is None else grad_x.to(saved_x.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.weight_dtype)
        return None, None, grad_x, grad_weight, grad_bias, grad_weight if needs_B else None


def layer_feedback(layer: nn.Module, x: Tensor, out: Tensor, feedback: Tensor) -> Tensor:
    """Return `out`, with a backward pass that sends its gradient on to `x` through `feedback` instead of the weight.

    Feedback alignment (Lillicrap et al. 2016) where `feedback` is fixed. One that requires a gradient gets that of the
    weight, so under the weight's own update and decay it follows it: Kolen-Pollack (Akrout et al. 2019).

    Args:
        layer: a Conv1d, Conv2d, Conv3d or Linear, or a Conv1D of transformers, whose weight and bias get their
            gradients as in backpropagation.
        x: its input, (N, I, ...) or (..., I).
        out: its output, of which the values alone count.
        feedback: B, of the weight's shape.

    Raises:
        ValueError: `feedback` has another shape, or `layer` pads in a way that has no feedback.
    """
    weight: Any = layer.weight
    if feedback.shape != weight.shape:
        got, expected = tuple(feedback.shape), tuple(weight.shape)
        raise ValueError(f"feedback matrix has shape {got}, expected {expected}: that of the layer's weight")
    if is_transposed(layer):
        weight, feedback = weight.T, feedback.T
    convolution = convolution_of(layer) if isinstance(layer, CONVOLUTIONS) else None
    return LayerFeedbackFunction.apply(convolution, out.detach(), x, weight, layer.bias, feedback)


def fed_back(
    layer: nn.Module, name: str, inputs: tuple, named: dict[str, Any], out: Any, feedback: nn.Module | None
) -> Any:
    """What a layer's forward hook returns: its output by way of B, or None where the layer has no B.

    nn.MultiheadAttention runs a second time for it: nothing it returns leads back to what its weights multiply.
    Without `feedback` each weight is its own B, which is backpropagation.

    Raises:
        ValueError: a weight has no B, and what it multiplies needs a gradient; or the layer has other weights than when
            it was wrapped, as by pruning.
    """
    weights = weights_of(name, layer)
    if not weights:
        raise ValueError(f"layer {name!r} has other weights than when it was wrapped: wrap the model again")
    matrices: dict[str, Tensor | None]
    if feedback is None:
        matrices = {key: weight.detach() for key, weight in weights.items()}
    else:
        matrices = {key: getattr(feedback, feedback_name(key), None) for key in weights}
    if isinstance(layer, nn.MultiheadAttention):
        return attention(layer, functools.partial(project, layer, name, matrices), *inputs, **named)
    x, B = input_of(inputs, named), matrices[name]
    if B is not None:
        return layer_feedback(layer, x, out, B)
    refuse_without_b(name, x)
    return None


def input_of(inputs: tuple, named: dict[str, Any]) -> Tensor:
    """A layer's one argument, given by position or by name."""
    return inputs[0] if inputs else next(iter(named.values()))


def project(
    layer: nn.MultiheadAttention,
    name: str,
    matrices: Mapping[str, Tensor | None],
    x: Tensor,
    of: str,
    third: int | None,
    bias: Tensor | None,
) -> Tensor:
    """`x` (N, L, I) times the layer's weight `of`, or a third of its rows, with the same of B in the backward pass."""
    weight: Tensor = layer.get_parameter(of)
    B = matrices[f"{name}.{of}"]
    if third is not None:
        weight, B = weight.chunk(3)[third], None if B is None else B.chunk(3)[third]
    out = F.linear(x, weight, bias)
    if B is not None:
        return LayerFeedbackFunction.apply(None, out.detach(), x, weight, bias, B)
    refuse_without_b(name, x)
    return out


def refuse_without_b(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"the input of layer {name!r} needs a gradient, expected none as at construction: it has no B")


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a `Conv1D` of Hugging Face's transformers, a linear layer whose weight is (I, O)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def weights_of(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer for which there is feedback, by the name of their B: its own, or the parameter's."""
    if type(layer) is nn.MultiheadAttention:
        into = ("in_proj_weight",) if layer._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        parameters: dict[str, Tensor] = dict(layer.named_parameters())
        found = {f"{name}.{of}": parameters[of] for of in (*into, "out_proj.weight") if of in parameters}
        return found if len(found) == len(into) + 1 else {}  # a weight made of others, as a pruned one, is none
    if (type(layer) in LAYERS or is_transposed(layer)) and "weight" in layer._parameters:
        return {name: cast(Tensor, layer._parameters["weight"])}  # functional_call puts plain tensors there
    return {}


def init_of(layer: nn.Module, init: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any]:
    """What fills the B of a layer in place: `init` on B as (O, I), by default as PyTorch draws nn.Linear's weight."""
    draw = init or functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
    return (lambda B: draw(B.T)) if is_transposed(layer) else draw


def modules_with_parameters(model: nn.Module) -> set[nn.Module]:
    return {module for module in model.modules() if any(p is not None for p in module._parameters.values())}


def check_no_new_modules(model: nn.Module, known: Set[nn.Module]) -> None:
    """Raise ValueError where a module with parameters is not among the known ones; not while torch.compile traces."""
    if torch.compiler.is_compiling() or modules_with_parameters(model) <= known:
        return
    name, module = next((n, m) for n, m in model.named_modules() if m in modules_with_parameters(model) - known)
    raise ValueError(
        f"module {name!r}, a {type(module).__name__}, was put in after wrapping, so nothing is known of it: wrap the"
        " model again"
    )


def convolution_of(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, padding, dilation and groups of a convolution, in numbers.

    Raises:
        ValueError: it does not pad with zeros, or not equally on both sides.
    """
    sides = layer._reversed_padding_repeated_twice  # last dimension first; "same" and "valid" in numbers
    if layer.padding_mode != "zeros" and any(sides):
        raise ValueError(f"{layer} has padding_mode {layer.padding_mode!r}, expected 'zeros' for FA and KP")
    if sides[::2] != sides[1::2]:
        raise ValueError(f"{layer} pads one side more than the other, expected an odd kernel for FA and KP")
    return layer.stride, tuple(sides[::2][::-1]), layer.dilation, layer.groups
