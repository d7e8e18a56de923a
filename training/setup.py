"""From a script's arguments to a wrapped net, its optimisers and their learning rates."""

import math
from argparse import Namespace

import torch
from torch import Tensor, nn

from feedback import RULES, DirectFeedback

SCHEDULES = ("constant", "one-cycle")
WARM_UP = 0.3  # share of one-cycle's steps over which the learning rate rises


def wrap(args: Namespace, model: nn.Module, example: Tensor) -> DirectFeedback:
    """Wrap `model` at its own points, by the rule, the update of B and the factor on B's start in the arguments."""
    inplace = {}
    if args.b_update == "inplace":
        inplace = {"update": "inplace", "feedback_lr": args.b_lr, "feedback_weight_decay": args.b_wd}
    net = DirectFeedback(model, model.points, args.train_mode, example, **inplace)
    for matrix in net.feedback.state_dict().values():
        matrix.mul_(args.b_scale)
    return net


def make_optimizers(args: Namespace, net: DirectFeedback, nesterov: bool) -> list[torch.optim.Optimizer]:
    """SGD with momentum for the weights, and for KP's B with them; where B has an optimiser of its own, Adam for B."""
    weights = net.parameters() if RULES[args.train_mode].as_weight else net.model.parameters()
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(weights, args.lr, momentum=args.momentum, nesterov=nesterov, weight_decay=args.wd, fused=True)
    ]
    if args.b_update == "optimizer":
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), args.b_lr, weight_decay=args.b_wd, fused=True))
    return optimizers


def one_cycle(done: float) -> float:
    """The factor on a learning rate after the share `done`, 0 to 1, of all steps (Smith, Topin 2018).

    Linearly from 0 to 1 over the share WARM_UP, then along half a cosine to 0.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def set_learning_rates(
    args: Namespace, net: DirectFeedback, optimizers: list[torch.optim.Optimizer], steps: int, epoch: int, step: int
) -> dict[str, float | None]:
    """Set the learning rates of `step` of the `steps` of `epoch`, both 1 for the first.

    The schedule is W's, and KP's B follows W; the learning rate of DKP's and LAS's B decays by gamma an epoch. A
    function of the arguments and of the step alone, so that a resumed run finds it. Returns both, None for a B that
    does not learn.
    """
    lr = args.lr
    if args.schedule == "one-cycle":
        lr *= one_cycle(((epoch - 1) * steps + step - 0.5) / (args.epochs * steps))  # a step is at its middle
    b_lr = args.b_lr * args.gamma ** (epoch - 1) if RULES[args.train_mode].learns else None
    for optimizer, value in zip(optimizers, (lr, b_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = value
    if args.b_update == "inplace":
        net.feedback_lr = b_lr
    return {"lr": lr, "feedback_lr": lr if RULES[args.train_mode].as_weight else b_lr}
