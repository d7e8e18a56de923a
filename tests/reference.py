"""Direct feedback worked out by hand, without autograd: what the tests hold the package against.

Shapes: N batch, K classes, D features of one block.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy_error(logits: Tensor, target: Tensor) -> Tensor:
    """e = dL/dlogits of the mean cross-entropy, (N, K)."""
    return (logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(target)


def batch_norm(a: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Normalise feature maps by their batch's own mean and variance; return them and the standard deviation."""
    mean, var = a.mean((0, 2, 3), keepdim=True), a.var((0, 2, 3), unbiased=False, keepdim=True)
    std = (var + eps).sqrt()
    return (a - mean) / std, std


def conv_block(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Convolution as a matrix product over unfolded patches, then batch norm and ReLU.

    Returns h, and a function from grad_h to the gradients of the block's four parameters.
    """
    patches = F.unfold(x, weight.shape[2:])  # (N, C*3*3, places)
    side = x.shape[2] - weight.shape[2] + 1
    a = (weight.flatten(1) @ patches + bias[:, None]).view(len(x), -1, side, side)
    normal, std = batch_norm(a)
    h = (gamma.view(1, -1, 1, 1) * normal + beta.view(1, -1, 1, 1)).relu()

    def gradients(grad_h: Tensor) -> dict[str, Tensor]:
        delta = grad_h * (h > 0)
        grad_normal = delta * gamma.view(1, -1, 1, 1)
        mean = grad_normal.mean((0, 2, 3), keepdim=True)
        along = (grad_normal * normal).mean((0, 2, 3), keepdim=True)
        grad_a = (grad_normal - mean - normal * along) / std
        return {
            "conv.weight": torch.einsum("ncp,nkp->ck", grad_a.flatten(2), patches).view_as(weight),
            "conv.bias": grad_a.sum((0, 2, 3)),
            "norm.weight": (delta * normal).sum((0, 2, 3)),
            "norm.bias": delta.sum((0, 2, 3)),
        }

    return h, gradients


def convnet_gradients(
    parameters: dict[str, Tensor], matrices: list[Tensor], x: Tensor, target: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients by direct feedback of every parameter of `models.ConvNet`, and e^T @ h of every point."""
    p = parameters
    names = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
    h1, gradients1 = conv_block(x, *(p[f"conv1.{name}"] for name in names))
    h2, gradients2 = conv_block(h1, *(p[f"conv2.{name}"] for name in names))
    pooled = h2.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)).flatten(1)
    h3 = (pooled @ p["fc1.linear.weight"].T + p["fc1.linear.bias"]).relu()
    error = cross_entropy_error(h3 @ p["fc2.weight"].T + p["fc2.bias"], target)
    signals = [torch.einsum("nk,k...->n...", error, B) for B in matrices]
    delta3 = signals[2] * (h3 > 0)
    gradients = {f"conv1.{name}": value for name, value in gradients1(signals[0]).items()}
    gradients |= {f"conv2.{name}": value for name, value in gradients2(signals[1]).items()}
    gradients |= {"fc1.linear.weight": delta3.T @ pooled, "fc1.linear.bias": delta3.sum(0)}
    gradients |= {"fc2.weight": error.T @ h3, "fc2.bias": error.sum(0)}
    return gradients, [torch.einsum("nk,n...->k...", error, h) for h in (h1, h2, h3)]


def mlp_gradients(
    weights: list[Tensor], biases: list[Tensor], matrices: list[Tensor], x: Tensor, target: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients by direct feedback of a tanh MLP's weights and biases, and e^T @ h of every hidden layer."""
    inputs = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inputs.append((inputs[-1] @ weight.T + bias).tanh())
    error = cross_entropy_error(inputs[-1] @ weights[-1].T + biases[-1], target)
    deltas = [error @ B * (1 - h**2) for B, h in zip(matrices, inputs[1:], strict=True)] + [error]
    return (
        [delta.T @ h for delta, h in zip(deltas, inputs, strict=True)],
        [delta.sum(0) for delta in deltas],
        [error.T @ h for h in inputs[1:]],
    )


def unfolding(layer: nn.Conv2d) -> dict[str, tuple[int, int]]:
    """The windows of a convolution, as `F.unfold` and `F.fold` take them."""
    same = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    padding = {"same": same, "valid": (0, 0)}.get(layer.padding, layer.padding)
    return {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "padding": padding, "stride": layer.stride}


def layerwise_gradients(
    layers: dict[str, nn.Module], matrices: dict[str, Tensor], x: Tensor, target: Tensor
) -> dict[str, Tensor]:
    """FA's gradients of a chain of Conv2d and Linear layers with tanh between them, by parameter name.

    A convolution is a matrix product over unfolded patches, (N, groups, inputs of a group's patch, places).
    `matrices` has B for every layer but the first; under KP each B gets the gradient of its weight.
    """
    inputs, a = [], None
    for layer in layers.values():
        inputs.append(x if a is None else a.tanh())
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(inputs[-1], **unfolding(layer)).unflatten(1, (layer.groups, -1))
            a = torch.einsum("goi,ngip->ngop", layer.weight.reshape(layer.groups, -1, patches.shape[2]), patches)
            a = a.reshape(layer(inputs[-1]).shape) + (0 if layer.bias is None else layer.bias.view(-1, 1, 1))
        else:
            a = inputs[-1].flatten(1) @ layer.weight.T + layer.bias
    grad_a, gradients = cross_entropy_error(a, target), {}
    for (name, layer), h in zip(reversed(layers.items()), reversed(inputs), strict=True):
        B = matrices.get(name, torch.zeros_like(layer.weight))
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(h, **unfolding(layer)).unflatten(1, (layer.groups, -1))
            grads = grad_a.flatten(2).unflatten(1, (layer.groups, -1))
            gradients[f"{name}.weight"] = torch.einsum("ngop,ngip->goi", grads, patches).reshape(layer.weight.shape)
            gradients[f"{name}.bias"] = grad_a.sum((0, 2, 3))
            grad_patches = torch.einsum("goi,ngop->ngip", B.reshape(layer.groups, -1, patches.shape[2]), grads)
            grad_h = F.fold(grad_patches.flatten(1, 2), h.shape[2:], **unfolding(layer))
        else:
            gradients[f"{name}.weight"], gradients[f"{name}.bias"] = grad_a.T @ h.flatten(1), grad_a.sum(0)
            grad_h = (grad_a @ B).view_as(h)
        grad_a = grad_h * (1 - h**2)
    return gradients


def attention_gradients(
    p: dict[str, Tensor], B: dict[str, Tensor], x: Tensor, target: Tensor, queries: int, heads: int
) -> dict[str, Tensor]:
    """FA's gradients of first(x) -> attention -> mean over the queries -> head, by parameter name.

    The first `queries` of the L tokens ask all L. Shapes: N sequences, L tokens, Q queries, H heads, d features a head.
    """

    def split(y: Tensor) -> Tensor:
        return y.unflatten(2, (heads, -1)).transpose(1, 2)  # (N, H, tokens, d)

    def merge(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def outer(grad: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("nto,nti->oi", grad, y)

    h = x @ p["first.weight"].T + p["first.bias"]
    asking = h[:, :queries]
    weights, biases = p["attn.in_proj_weight"].chunk(3), p["attn.in_proj_bias"].chunk(3)
    q, k, v = (split(y @ w.T + b) for y, w, b in zip((asking, h, h), weights, biases, strict=True))
    scale = q.shape[-1] ** -0.5
    attn = (q @ k.mT * scale).softmax(-1)
    mixed = merge(attn @ v)
    out = mixed @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    pooled = out.mean(1)
    error = cross_entropy_error(pooled @ p["head.weight"].T + p["head.bias"], target)

    grad_out = (error @ B["head"] / queries)[:, None].expand_as(out)
    grad_mixed = split(grad_out @ B["attn_out_proj_weight"])
    grad_attn = grad_mixed @ v.mT
    grad_scores = attn * (grad_attn - (grad_attn * attn).sum(-1, keepdim=True)) * scale
    grads = [merge(y) for y in (grad_scores @ k, grad_scores.mT @ q, attn.mT @ grad_mixed)]
    B_q, B_k, B_v = B["attn_in_proj_weight"].chunk(3)
    grad_h = grads[1] @ B_k + grads[2] @ B_v
    grad_h[:, :queries] += grads[0] @ B_q
    return {
        "first.weight": outer(grad_h, x),
        "first.bias": grad_h.sum((0, 1)),
        "attn.in_proj_weight": torch.cat([outer(g, y) for g, y in zip(grads, (asking, h, h), strict=True)]),
        "attn.in_proj_bias": torch.cat([g.sum((0, 1)) for g in grads]),
        "attn.out_proj.weight": outer(grad_out, mixed),
        "attn.out_proj.bias": grad_out.sum((0, 1)),
        "head.weight": error.T @ pooled,
        "head.bias": error.sum(0),
    }
