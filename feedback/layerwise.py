"""Layer-by-layer feedback (FA, KP): each layer's backward pass reads B where backpropagation reads W.

Shapes: N images, I and O features in and out of a layer; B has the shape of the layer's weight W, (O, I, ...).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from feedback.state import untouched

LAYERS = (nn.Conv2d, nn.Linear)
ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm)  # each weight scales one feature: no matrix is transported


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
                grad_out, x, B, [len(B)], stride, padding, dilation, False, [0, 0], groups, mask
            )
        grad_x = None if grad_x is None else grad_x.to(saved_x.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.weight_dtype)
        return None, None, grad_x, grad_weight, grad_bias, grad_weight if needs_B else None


def layer_feedback(layer: nn.Conv2d | nn.Linear, x: Tensor, out: Tensor, feedback: Tensor) -> Tensor:
    """Return `out`, with a backward pass that sends its gradient on to `x` through `feedback` instead of the weight.

    Feedback alignment (Lillicrap et al. 2016) where `feedback` is fixed. One that requires a gradient gets that of the
    weight, so under the weight's own update and decay it follows it: Kolen-Pollack (Akrout et al. 2019).

    Args:
        layer: a Conv2d or a Linear, whose weight and bias get their gradients as in backpropagation.
        x: its input, (N, I, H, W) or (..., I).
        out: its output, of which the values alone count.
        feedback: B, of the weight's shape.

    Raises:
        ValueError: `feedback` has another shape, or `layer` pads in a way that has no feedback.
    """
    if feedback.shape != layer.weight.shape:
        got, expected = tuple(feedback.shape), tuple(layer.weight.shape)
        raise ValueError(f"feedback matrix has shape {got}, expected {expected}: that of the layer's weight")
    convolution = convolution_of(layer) if isinstance(layer, nn.Conv2d) else None
    return LayerFeedbackFunction.apply(convolution, out.detach(), x, layer.weight, layer.bias, feedback)


def fed_back(layer: nn.Conv2d | nn.Linear, name: str, x: Tensor, out: Tensor, feedback: Tensor | None) -> Tensor | None:
    """What a layer's forward hook returns: `layer_feedback`, or None where the layer has no B.

    Raises:
        ValueError: it has no B, and its input needs a gradient.
    """
    if feedback is not None:
        return layer_feedback(layer, x, out, feedback)
    if x.requires_grad:
        raise ValueError(f"the input of layer {name!r} needs a gradient, expected none as at construction: it has no B")
    return None


def convolution_of(layer: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, padding, dilation and groups of a convolution, in numbers.

    Raises:
        ValueError: it does not pad with zeros, or not equally on both sides.
    """
    sides = layer._reversed_padding_repeated_twice  # of the width, then of the height; "same" and "valid" in numbers
    if layer.padding_mode != "zeros" and any(sides):
        raise ValueError(f"{layer} has padding_mode {layer.padding_mode!r}, expected 'zeros' for FA and KP")
    if sides[::2] != sides[1::2]:
        raise ValueError(f"{layer} pads one side more than the other, expected an odd kernel for FA and KP")
    return layer.stride, tuple(sides[::2][::-1]), layer.dilation, layer.groups


def feedback_layers(model: nn.Module, example: Tensor) -> dict[str, bool]:
    """Every Conv2d and Linear of `model` by name, and whether its input needs a gradient, so that it needs a B.

    Runs `example`, (N, ...), once through the model, without effect on BatchNorm statistics or random numbers.

    Raises:
        ValueError: a module with weights of another kind whose input needs a gradient (FA and KP would have to read
            them in the backward pass), a layer that is never reached or shares its weight or pads in a way that has
            no feedback, or no layer that needs feedback.
    """
    weighted = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, ELEMENTWISE) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    needs: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if inputs:
            needs[module] = needs.get(module, False) or any(value.requires_grad for value in inputs)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in weighted.values()]
    try:
        with untouched(model), torch.enable_grad(), torch.autocast(example.device.type, enabled=False):
            model.eval()(example.detach())
    finally:
        for hook in hooks:
            hook.remove()

    layers: dict[str, bool] = {}
    weights: dict[Tensor, str] = {}
    for name, module in weighted.items():
        if type(module) not in LAYERS or "weight" not in module._parameters:
            if needs.get(module, True) or list(module.children()):
                raise ValueError(
                    f"module {name!r} is a {type(module).__name__} with weights, expected nn.Conv2d and nn.Linear alone"
                    " above the first layer: FA and KP have no feedback for it"
                )
            continue
        if module not in needs:
            raise ValueError(f"layer {name!r} was never reached in the forward pass, expected it to be called")
        if module.weight in weights:
            raise ValueError(f"layer {name!r} shares its weight with {weights[module.weight]!r}, expected its own")
        weights[module.weight] = name
        if needs[module] and isinstance(module, nn.Conv2d):
            convolution_of(module)
        layers[name] = needs[module]
    if not any(layers.values()):
        raise ValueError("no layer needs feedback: expected an nn.Conv2d or nn.Linear whose input needs a gradient")
    return layers
