"""B stepped where it lies, in the backward pass: `update="inplace"`.

Shapes: N batch, K classes, D features of one block.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.sgd import sgd

from feedback import functional

MM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8 and newer


def step(
    feedback_KD: Tensor,
    error_NK: Tensor,
    h_ND: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    group: Any,
    found_inf: Tensor | None,
) -> None:
    """B <- B - lr (e^T @ h + wd B) where B lies; with several ranks, e^T @ h is averaged over them first.

    B stays as it is where `found_inf` is 1. On a GPU nothing is read back: lr and `found_inf` stay there.
    """
    ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    compiling = torch.compiler.is_compiling()
    dtype, on_host = feedback_KD.dtype, not (compiling or lr.is_cuda)
    if on_host and found_inf is not None and found_inf:
        return
    if on_host and ranks == 1:
        rate, decay = lr.item(), weight_decay.item()
        functional.add_correlation(feedback_KD, error_NK.to(dtype), h_ND.to(dtype), beta=1 - rate * decay, alpha=-rate)
        return
    grad_feedback_KD = correlation(error_NK, h_ND, dtype)
    if ranks > 1:
        dist.all_reduce(grad_feedback_KD, group=group)
        grad_feedback_KD.div_(ranks)
    if on_host:
        feedback_KD.mul_(1 - lr * weight_decay).sub_(grad_feedback_KD.mul_(lr))
    elif compiling:  # lr stays a tensor: a new value must not recompile the net
        new_KD = feedback_KD * (1 - lr * weight_decay) - lr * grad_feedback_KD
        feedback_KD.copy_(new_KD if found_inf is None else torch.where(found_inf == 1, feedback_KD, new_KD))
    else:
        options: dict[str, Any] = {"fused": True, "lr": lr, "found_inf": found_inf, "weight_decay": weight_decay.item()}
        plain: dict[str, Any] = {"momentum": 0, "dampening": 0, "nesterov": False, "maximize": False}
        sgd([feedback_KD], [grad_feedback_KD], [None], **options, **plain)


def correlation(error_NK: Tensor, h_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """e^T @ h, (K, D), in `dtype`; on a GPU, of bfloat16 factors without a copy of them, where torch can."""
    if not torch.compiler.is_compiling() and error_NK.is_cuda and error_NK.dtype != dtype and MM_HAS_OUT_DTYPE:
        return torch.mm(error_NK.T, h_ND, out_dtype=dtype)
    return error_NK.to(dtype).T @ h_ND.to(dtype)
