"""Stages of a net in several processes: which block is where, and the net brought together again.

Every process has the whole net, and trains its own stage of it; so what is tested, saved and resumed is the whole net.
"""

import copy
from argparse import Namespace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from feedback import DirectFeedback
from feedback.checks import feedback_name
from feedback.pipeline import Pipeline, balanced_cuts, costs_of, parts_of
from training.distributed import rank, share_among, world_size
from training.optim import autocast, head_of


class Stages:
    """This process's stage of `net`, and the others that make a replica of the net with it; called as `net` is.

    All stages go backward in the call, each as soon as e comes: not when the loss that the caller makes of the logits
    does.

    The processes are replicas x stages, those of a replica one after the other; replicas take shares of each batch.

    Args:
        args: with `pipeline_stages`, `micro_batches`, and what `training.optim.wrap` reads.
        net: the whole net, the same in every process.
        optimizers: over the whole net; a process has gradients, and so steps, of its own stage alone.
        example: a batch of a micro-batch's size.

    Raises:
        ValueError: the processes do not make whole replicas, or the net cannot be cut into as many stages.
    """

    def __init__(
        self, args: Namespace, net: DirectFeedback, optimizers: list[torch.optim.Optimizer], example: Tensor
    ) -> None:
        stages, world = args.pipeline_stages, dist.get_world_size()
        mesh = init_device_mesh(example.device.type, (world // stages, stages), mesh_dim_names=("replica", "stage"))
        for name in ("replica", "stage"):
            _set_pg_timeout(timedelta(seconds=args.dist_timeout), mesh[name].get_group())
        self.net, self.optimizers, self.micro_batches = net, optimizers, args.micro_batches
        self.weight = 1.0
        with autocast(args, example.device):
            bare = copy.deepcopy(net.model) if dist.get_rank() == 0 else None  # a model in training without its wrapper
            costs = [{} if bare is None else costs_of(bare, example)]
        dist.broadcast_object_list(costs, device=example.device)
        parts = parts_of(net.model, balanced_cuts(costs[0], net.points, stages))
        replicas = mesh["replica"].get_group() if world > stages else None
        inplace = {}
        if net.update == "inplace":
            inplace = {"update": "inplace", "feedback_lr": net.feedback_lr, "feedback_weight_decay": args.b_wd}
        self.pipeline = Pipeline(
            parts,
            net.points,
            net.rule,
            example,
            group=mesh["stage"].get_group(),
            replicas=replicas,
            autocast=torch.bfloat16 if args.precision == "bf16" else None,
            head=head_of(args),
            **inplace,
        )
        owners = {name: number for number, part in enumerate(parts) for name, _ in part.named_children()}
        self.owner = {f"model.{name}.": number for name, number in owners.items()}
        self.owner |= {f"feedback.{feedback_name(point)}.": owners[point.partition(".")[0]] for point in net.points}
        for name in dict.fromkeys(key.partition(".")[0] for key in self.pipeline.net.feedback.state_dict()):
            # its B, or head, is the whole net's
            setattr(self.pipeline.net.feedback, name, getattr(net.feedback, name))
        blocks = [[name for name, _ in part.named_children()] for part in parts]
        shares = [sum(costs[0][name] for name in names) / sum(costs[0].values()) for names in blocks]
        self.description = "; ".join(
            f"stage {number}: {', '.join(names)} ({100 * share:.0f} % of the time)"
            for number, (names, share) in enumerate(zip(blocks, shares, strict=True))
        )

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """The logits (N, K) of a batch on the last stage, zeros on others; the gradients are in `.grad` by then.

        The loss is the mean cross-entropy times `weight`. A short last batch goes in fewer pieces, of 2 images each.
        """
        if self.net.update == "inplace" and self.net.feedback_lr is not None:
            self.pipeline.net.feedback_lr = self.net.feedback_lr
        pieces = min(self.micro_batches, max(1, len(target) // 2))
        with torch.autocast(x.device.type, enabled=False):  # the pipeline's own is for its forward passes alone
            result = self.pipeline.step(x, target, lambda *given: F.cross_entropy(*given) * self.weight, pieces)
        if result is None:
            return self.pipeline.logits.new_zeros(len(target), self.pipeline.logits.shape[1]).requires_grad_()
        return result[0].requires_grad_()

    def owner_of(self, key: str) -> int:
        """The stage that trains what has this key in the net's state dict."""
        return next(number for start, number in self.owner.items() if f"{key}.".startswith(start))

    def bring_together(self) -> None:
        """Let every process of this replica have what each stage has made of its part of the net."""
        for key, tensor in self.net.state_dict().items():
            dist.broadcast(tensor, self.pipeline.ranks[self.owner_of(key)], self.pipeline.group)

    def optimizer_states(self) -> list[dict]:
        """On rank 0, the state dicts of the optimisers over the whole net; from each stage what it has stepped."""
        keys = {parameter: key for key, parameter in self.net.named_parameters()}
        states = []
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            mine = {
                index: {
                    key: value.cpu() if isinstance(value, Tensor) else value
                    for key, value in own["state"][index].items()
                }
                for index, parameter in enumerate(parameters)
                if index in own["state"] and self.owner_of(keys[parameter]) == self.pipeline.stage
            }
            first = self.pipeline.ranks[0]
            everyone: list[dict] = [{}] * self.pipeline.stages
            dist.gather_object(mine, everyone if dist.get_rank() == first else None, first, self.pipeline.group)
            merged = {index: state for theirs in everyone for index, state in theirs.items()}
            states.append({"state": dict(sorted(merged.items())), "param_groups": own["param_groups"]})
        return states


def share_among_replicas(stages: int) -> None:
    """Let the processes of a replica of the net take the same images.

    Raises:
        ValueError: the processes do not make whole replicas.
    """
    if world_size() % stages:
        raise ValueError(f"--pipeline-stages: got {stages}, expected a divisor of the {world_size()} processes")
    share_among(rank() // stages, world_size() // stages)
