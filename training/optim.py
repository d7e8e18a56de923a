"""From a script's arguments to a wrapped net, its optimisers and their learning rates."""

import math
from argparse import Namespace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from feedback import RULES, DirectFeedback
from feedback.heads import MakeHead, default_head
from models import Net
from training.distributed import world_size

WARM_UP = 0.3  # share of one-cycle's steps over which the learning rate rises


def wrap(args: Namespace, model: Net, example: Tensor) -> DirectFeedback:
    """Wrap `model` at its own points, in the memory format, by the rule, and with the B that the arguments ask for."""
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = example.to(memory_format=torch.channels_last)
    inplace: dict[str, Any] = {}
    if args.b_update == "inplace":
        inplace = {"update": "inplace", "feedback_lr": args.b_lr, "feedback_weight_decay": args.b_wd}
        if world_size() > 1 and args.pipeline_stages is None:  # its sums do not stand in line with W's gradients
            inplace["group"] = dist.new_group(timeout=timedelta(seconds=args.dist_timeout))
    net = DirectFeedback(model, model.points, args.train_mode, example, head=head_of(args), **inplace)
    if not RULES[args.train_mode].head:
        for matrix in net.feedback.state_dict().values():
            matrix.mul_(args.b_scale)
    return net


def head_of(args: Namespace) -> MakeHead | None:
    """What makes a point's head by the arguments, for a rule that has heads."""
    if not RULES[args.train_mode].head:
        return None
    return partial(default_head, width=args.head_width, pool=args.head_pool, scale=args.b_scale)


def autocast(args: Namespace, device: torch.device) -> torch.autocast:
    """The context of forward passes: bfloat16 with --precision bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def make_optimizers(args: Namespace, net: DirectFeedback, nesterov: bool) -> list[torch.optim.Optimizer]:
    """SGD with momentum for the weights and KP's B; with --b-update optimizer, also Adam for B."""
    weights = net.parameters() if RULES[args.train_mode].as_weight else net.model.parameters()
    momentum: dict[str, Any] = {"momentum": args.momentum, "nesterov": nesterov}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(weights, args.lr, weight_decay=args.wd, fused=True, **momentum)
    ]
    if args.b_update == "optimizer":
        options: dict[str, Any] = {"weight_decay": args.b_wd, "fused": True, "capturable": args.cuda_graph}
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), args.b_lr, **options))
    if args.cuda_graph:  # which reads the learning rates anew where they are tensors
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return optimizers


def one_cycle(done: float) -> float:
    """The factor on a learning rate after the share `done`, 0 to 1, of all steps (Smith, Topin 2018).

    Linearly from 0 to 1 over the share WARM_UP, then along half a cosine to 0.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def learning_rates(args: Namespace, epoch: int, step: int, steps: int) -> dict[str, float | None]:
    """The learning rates of W, `lr`, and B, `feedback_lr`, at `step` of the `steps` of `epoch`, both 1 for the first.

    KP's B follows W; a B or head of its own has a schedule of its own, and its learning rate decays by gamma an epoch.
    None for a B that does not learn.
    """
    cycle = one_cycle(((epoch - 1) * steps + step - 0.5) / (args.epochs * steps))  # a step is at its middle
    lr = args.lr * (cycle if args.schedule == "one-cycle" else 1)
    if RULES[args.train_mode].as_weight:
        return {"lr": lr, "feedback_lr": lr}
    if not RULES[args.train_mode].learns:
        return {"lr": lr, "feedback_lr": None}
    b_lr = args.b_lr * args.gamma ** (epoch - 1) * (cycle if args.b_schedule == "one-cycle" else 1)
    return {"lr": lr, "feedback_lr": b_lr}


def set_learning_rates(
    rates: dict[str, float | None], optimizers: list[torch.optim.Optimizer], net: DirectFeedback
) -> None:
    """Set `learning_rates`' rates in W's optimiser and in B's, if there is one; for a B in place, `net.feedback_lr`."""
    for optimizer, key in zip(optimizers, ("lr", "feedback_lr"), strict=False):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rates[key] or 0.0)
            else:
                group["lr"] = rates[key]
    if net.update == "inplace" and rates["feedback_lr"] is not None:
        net.feedback_lr = rates["feedback_lr"]
