"""From a script's arguments to a wrapped net, its optimisers and their learning rates."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from feedback import DirectFeedback


def wrap(
    args: Namespace, model: nn.Module, example: Tensor, init: Callable[[Tensor], Any] | None = None
) -> DirectFeedback:
    """Wrap `model` at its own points, by the rule and the update of B that the arguments name."""
    inplace = {}
    if args.b_update == "inplace":
        inplace = {"update": "inplace", "feedback_lr": args.b_lr, "feedback_weight_decay": args.b_wd}
    return DirectFeedback(model, model.points, args.train_mode, example, init=init, **inplace)


def make_optimizers(args: Namespace, net: DirectFeedback, nesterov: bool) -> list[torch.optim.Optimizer]:
    """SGD with momentum for the weights, and for KP's B with them; where B has an optimiser of its own, Adam for B."""
    weights = net.parameters() if args.train_mode == "KP" else net.model.parameters()
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(weights, args.lr, momentum=args.momentum, nesterov=nesterov, weight_decay=args.wd, fused=True)
    ]
    if args.b_update == "optimizer":
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), args.b_lr, weight_decay=args.b_wd, fused=True))
    return optimizers


def set_learning_rates(
    args: Namespace, net: DirectFeedback, optimizers: list[torch.optim.Optimizer], epoch: int
) -> dict[str, float | None]:
    """Set the learning rates of `epoch`, 1 for the first: W's is constant, B's decays by gamma an epoch.

    A function of the arguments and the epoch alone, so that a resumed run finds it. Returns both, None for no B.
    """
    b_lr = args.b_lr * args.gamma ** (epoch - 1) if args.train_mode == "DKP" else None
    for optimizer, lr in zip(optimizers, (args.lr, b_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
    if args.b_update == "inplace":
        net.feedback_lr = b_lr
    return {"lr": args.lr, "feedback_lr": args.lr if args.train_mode == "KP" else b_lr}
