"""nn.MultiheadAttention with its projections handed over, for layer-by-layer feedback (FA, KP).

Shapes: N sequences, L queries, S keys and values, H heads, E features.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Project = Callable[[Tensor, str, int | None, Tensor | None], Tensor]


def attention(
    layer: nn.MultiheadAttention,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `layer` returns for these arguments, every product with a weight being taken by `project`.

    `project(x, name, third, bias)` is x times the weight of that name, or the first, second or last third of its rows,
    plus bias. What lies between, softmax(q k^T) v, multiplies activations alone and is left to autograd.
    """
    batched, same = query.dim() == 3, query is key and key is value
    inputs = [to_batch_first(layer, x) for x in (query, key, value)]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    if layer.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        projected = [project(x, name, None, bias) for x, name, bias in zip(inputs, names, biases, strict=True)]
    elif same:
        projected = list(project(inputs[0], "in_proj_weight", None, layer.in_proj_bias).chunk(3, -1))
    else:
        projected = [project(inputs[i], "in_proj_weight", i, biases[i]) for i in range(3)]
    q_NHLD, k_NHSD, v_NHSD = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in projected)

    dropout = layer.dropout if layer.training else 0.0
    causal = is_causal and key_padding_mask is None and not need_weights  # where the mask itself is not read
    mask = None if causal else score_mask(q_NHLD, attn_mask, key_padding_mask)
    weights = None
    if need_weights:
        scores_NHLS = (q_NHLD / math.sqrt(q_NHLD.shape[-1])) @ k_NHSD.transpose(-2, -1)
        weights = F.dropout((scores_NHLS if mask is None else scores_NHLS + mask).softmax(-1), dropout)
        h_NHLD = weights @ v_NHSD
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        h_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHSD, v_NHSD, mask, dropout, causal)
    out = project(h_NHLD.transpose(1, 2).flatten(2), "out_proj.weight", None, layer.out_proj.bias)
    return to_batch_first(layer, out) if batched else out.squeeze(0), weights


def to_batch_first(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return `x` as (N, L, E), N = 1 if it has no batch; and (N, L, E) as the layer has it."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if layer.batch_first else x.transpose(0, 1)


def score_mask(q_NHLD: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """The sum of both masks, to be added to the scores (N, H, L, S): -inf where a boolean one is True."""
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1])
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, q_NHLD.shape[:2])
    masks = []
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and mask.dtype == torch.bool:
            mask = q_NHLD.new_zeros(()).masked_fill(mask, -math.inf)
        if mask is not None:
            masks.append(mask.to(q_NHLD.dtype))
    return sum(masks[1:], masks[0]) if masks else None
