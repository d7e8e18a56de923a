"""Direct feedback over several processes: each trains a stage of the net, and all go backward at once.

Activations go down from stage to stage. Only the error e goes back, (N, K) numbers, from the last stage to all at once.
The engine is torch.distributed: point-to-point calls for activations, a broadcast for e.

Shapes: N images of a micro-batch, K classes.
"""

import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from feedback.heads import MakeHead
from feedback.layout import is_channels_last
from feedback.rules import RULES
from feedback.state import untouched
from feedback.wrapper import DirectFeedback

COST_TRIES = 3  # the cheapest counts


def parts_of(model: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """Cut a model that calls its submodules one after the other behind each of `cuts`.

    For any other model there is `torch.distributed.pipelining.pipeline`, whose stage modules `Pipeline` takes as well.

    Args:
        model: the result of each child is the input of the next, and nothing happens between them.
        cuts: names of children, in their order.

    Returns:
        len(cuts) + 1 modules, with the model's own children under their names.

    Raises:
        ValueError: a cut that is no child, or is out of order, or behind which nothing is left.
    """
    children = list(model.named_children())
    names = [name for name, _ in children]
    for cut in cuts:
        if cut not in names[:-1]:
            raise ValueError(f"cut {cut!r} is not one of {names[:-1]}, behind which a model can be cut")
    ends = [names.index(cut) + 1 for cut in cuts]
    if sorted(set(ends)) != ends:
        raise ValueError(f"cuts are {list(cuts)}, expected them in order: {names[:-1]}")
    return [nn.Sequential(OrderedDict(children[a:b])) for a, b in itertools.pairwise([0, *ends, len(names)])]


def costs_of(model: nn.Module, example: Tensor, chained: bool = False) -> dict[str, float]:
    """Time each child of a model that calls them one after the other: seconds of forward and backward pass.

    Args:
        model: as in `parts_of`.
        example: a batch of the size of the real ones. The model's state is left as it was.
        chained: whether the gradient of a child's input is counted, as in backpropagation.
    """
    costs: dict[str, float] = {}
    with untouched(model):
        for name, child in model.train().named_children():
            times = []
            for _ in range(COST_TRIES):
                x = example.detach().requires_grad_(chained and bool(costs))
                start = now(x.device)
                out = child(x)
                if out.requires_grad:
                    learned = [p for p in child.parameters() if p.requires_grad]
                    torch.autograd.grad(out, [*learned, *([x] if x.requires_grad else [])], torch.ones_like(out))
                times.append(now(x.device) - start)
            costs[name], example = min(times), out
    return costs


def balanced_cuts(costs: dict[str, float], points: Sequence[str], stages: int) -> list[str]:
    """Choose the cuts for `parts_of` with which the dearest stage is cheapest, and each stage has a point.

    Args:
        costs: of each child in order, from `costs_of` or stated.
        points: names of children, or of submodules in them.
        stages: how many parts there are to be.

    Raises:
        ValueError: more stages than children with points.
    """
    names = list(costs)
    tops = {point.partition(".")[0] for point in points}

    def dearest(cuts: tuple[str, ...]) -> float:
        bounds = [0, *(names.index(cut) + 1 for cut in cuts), len(names)]
        stretches = [names[a:b] for a, b in itertools.pairwise(bounds)]
        if not all(tops & set(stretch) for stretch in stretches):
            return float("inf")
        return max(sum(costs[name] for name in stretch) for stretch in stretches)

    best = min(itertools.combinations(names[:-1], stages - 1), key=dearest, default=())
    if len(best) != stages - 1 or dearest(best) == float("inf"):
        raise ValueError(f"cannot cut {len(tops)} blocks with a feedback point into {stages} stages")
    return list(best)


class Pipeline:
    """This process's stage of a net, and its part in each step of the pipeline.

    A step equals one process that runs the micro-batches through `DirectFeedback` one after the other and accumulates
    their gradients: `step` leaves them in `.grad`, and each process steps its own optimisers. A stage goes on to the
    next step's forward pass as soon as it has stepped; no stage waits for one above it but for e. It keeps what the
    backward passes of all the micro-batches need until their errors come.

    Once a micro-batch's e is not finite, B in place stays as it is for the rest of the step; what optimisers step is
    the caller's to guard.

    What LAS, DRTP and heads make of the labels is a mean over a micro-batch; as with accumulation, m add up to m times
    it.

    Args:
        parts: of the whole net, one for each process, each mapping one Tensor to one; the last gives logits (N, K).
            From `parts_of`, or the stage modules of `torch.distributed.pipelining.pipeline`.
        points, rule, update, feedback_lr, feedback_weight_decay, init, head, allow_skips: as in `DirectFeedback`, for
            the whole net. Each part needs a point, and all but the last have nothing that learns behind their last one.
        example: a batch for the whole net. It runs through all the parts, so that each process learns the shapes.
        group: the processes, in the order of the stages; by default all.
        replicas: the processes that train the same stage on other images and average its gradients; by default none.
            `step` averages `.grad` over them, and in place B's steps.
        autocast: the dtype to which the forward pass autocasts, if any.

    Attributes:
        net: this stage as a `DirectFeedback`. The keys of all stages' state dicts together are those of the whole net's
            wrapper.
        stage: its number, from 0. stages: how many there are.
        trace: None, or a list to which each phase of a step adds its name and its start and end by `time.perf_counter`.

    Raises:
        ValueError: a chained rule; not as many parts as processes; a part without a point, or with a module behind its
            last point that learns; and what `DirectFeedback` refuses.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        points: Sequence[str],
        rule: str,
        example: Tensor,
        *,
        update: str = "optimizer",
        feedback_lr: float | None = None,
        feedback_weight_decay: float | None = None,
        init: Callable[[Tensor], Any] | None = None,
        head: MakeHead | None = None,
        group: Any = None,
        replicas: Any = None,
        autocast: torch.dtype | None = None,
        allow_skips: bool = False,
    ) -> None:
        if rule in RULES and RULES[rule].chained:
            raise ValueError(f"rule is {rule!r}, expected a direct one: for {rule} take torch.distributed.pipelining")
        if rule in RULES and RULES[rule].perturbs:
            raise ValueError(f"rule is {rule!r}, whose directional derivatives do not go from stage to stage")
        if autocast == torch.float16:
            raise ValueError("autocast is torch.float16, expected bfloat16: a GradScaler does not know of e")
        self.group = dist.group.WORLD if group is None else group
        if example.is_cuda and dist.get_backend(self.group) == "gloo":
            raise ValueError("gloo cannot send CUDA tensors from process to process: take nccl")
        self.stage, self.stages = dist.get_rank(self.group), dist.get_world_size(self.group)
        if len(parts) != self.stages:
            raise ValueError(f"got {len(parts)} parts of the net for {self.stages} processes, expected as many")
        self.ranks = dist.get_process_group_ranks(self.group)
        self.autocast, self.replicas = autocast, replicas
        self.trace: list[tuple[str, float, float]] | None = None
        self._sending: list[Any] = []
        own = [[point for point in points if has_submodule(part, point)] for part in parts]
        for point in points:
            if not any(point in names for names in own):
                raise ValueError(f"feedback point {point!r} is in no part of the net")
        for number, names in enumerate(own):
            if not names:
                raise ValueError(f"stage {number} has no feedback point, expected at least one of {list(points)}")

        flows = [example]  # what each stage gets, and the logits
        for part in parts:
            with untouched(part), torch.no_grad(), self._autocast(example.device):
                flows.append(part.eval()(flows[-1]))
        self.received, self.sent = flows[self.stage : self.stage + 2]  # examples
        self.logits = flows[-1]
        step_group = replicas
        if update == "inplace" and replicas is None:
            step_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        for number, part in enumerate(parts):  # each draws its B, so that a seed gives that of the whole net
            received = flows[number].to(example.dtype)
            net = DirectFeedback(
                part,
                own[number],
                rule,
                received,
                update=update,
                feedback_lr=feedback_lr,
                feedback_weight_decay=feedback_weight_decay,
                init=init,
                head=head,
                group=step_group,
                allow_skips=allow_skips,
                classes=None if number == self.stages - 1 else self.logits.shape[1],
            )
            with untouched(net), torch.enable_grad():
                out, _ = net.eval().tapped_forward(received, cut=True)
            if out.requires_grad and number < self.stages - 1:
                point = net.points[-1]
                raise ValueError(f"stage {number} has something that learns behind its last point {point!r}: cut there")
            if number == self.stage:
                self.net = net
        if update == "inplace":
            self.net.found_inf = torch.zeros((), device=example.device)
        self._connect()

    def _connect(self) -> None:
        """Use every connection once: NCCL makes one in its first call, where both sides wait for each other.

        Replicas begin with the weights and B of the first of them.
        """
        token = torch.zeros(1, device=self.received.device)
        dist.broadcast(token, self.ranks[-1], self.group)
        if self.stage > 0:
            dist.recv(token, self.ranks[self.stage - 1], self.group)
        if not self.last:
            dist.send(token, self.ranks[self.stage + 1], self.group)
        if self.replicas is not None:
            for tensor in self.net.state_dict().values():
                dist.broadcast(tensor, dist.get_process_group_ranks(self.replicas)[0], self.replicas)

    @property
    def last(self) -> bool:
        """Whether this is the stage of the logits."""
        return self.stage == self.stages - 1

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def step(
        self,
        x: Tensor | None,
        target: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        micro_batches: int = 1,
    ) -> tuple[Tensor, Tensor] | None:
        """Forward and backward pass of one batch, with the other stages. Nothing but e goes back.

        Args:
            x: the batch (N m, ...); only the first stage reads it.
            target: (N m,) class ids, on every stage.
            loss_fn: mean loss of logits (N, K) and their targets.
            micro_batches: m, pieces of the batch, of sizes that differ by one at most.

        Returns:
            On the last stage the logits (N m, K) and the batch's mean loss, both detached. None on the others.

        Raises:
            ValueError: fewer images than micro-batches.
        """
        losses = []

        def error_of(out: Tensor, piece: Tensor) -> Tensor:
            logits = out.detach().requires_grad_()
            with self._autocast(out.device):
                loss = loss_fn(logits, piece) * (len(piece) / len(target))
            losses.append(loss.detach())
            return torch.autograd.grad(loss, logits)[0]

        outputs, errors, due = self._go_forward(x, target, micro_batches, error_of)
        if self.net.found_inf is not None:
            self.net.found_inf.zero_()
        for number, (output, error, work) in enumerate(zip(outputs, errors, due, strict=True)):
            with self._phase("wait", number):
                work.wait()
            self._go_backward(number, output, error, share=len(error) / len(target))
        self._average_over_replicas()
        if self.last:
            return torch.cat([out.detach() for out, _ in outputs]), torch.stack(losses).sum()
        return None

    def _go_forward(
        self,
        x: Tensor | None,
        target: Tensor,
        micro_batches: int,
        error_of: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[list[tuple[Tensor, list[Tensor]]], list[Tensor], list[Any]]:
        """Run the micro-batches; on the last stage, send e of each to all: `error_of(logits, targets)`, (N, K).

        Returns:
            For each micro-batch: this stage's output and its points' empties; e; and when it has come.
        """
        if len(target) < micro_batches:
            raise ValueError(f"got {len(target)} images for {micro_batches} micro-batches, expected as many or more")
        targets = target.tensor_split(micro_batches)
        sizes = [len(piece) for piece in targets]
        back: list[Tensor] = []
        due: list[Any] = []
        outputs = []
        for number, (h, piece) in enumerate(zip(self._inputs(x, sizes), targets, strict=True)):
            with self._phase("forward", number):
                with self._autocast(piece.device):
                    out, empties = self.net.forward_with_empties(self.net.labels_of(piece), None, h)
                outputs.append((out, empties))
                if self.last:
                    back.append(error_of(out, piece).contiguous())
            if self.last:
                due.append(self._broadcast(back[-1]))
            else:
                self._sending.append(self._send(out, number))
        if not self.last:  # asked for now: on CUDA a broadcast that waits would stand before this stage's own work
            back = [empty_of(self.logits, size) for size in sizes]
            due = [self._broadcast(rows) for rows in back]
        return outputs, back, due

    def _go_backward(self, number: int, output: tuple[Tensor, list[Tensor]], error: Tensor, share: float) -> None:
        """The backward pass of a micro-batch, a `share` of the batch, in this stage, from e (N, K)."""
        out, empties = output
        with self._phase("backward", number):
            if self.net.found_inf is not None:  # of this micro-batch, or one before
                self.net.found_inf.copy_(~error.sum().isfinite() | (self.net.found_inf == 1))
                if self.replicas is not None:
                    dist.all_reduce(self.net.found_inf, dist.ReduceOp.MAX, self.replicas)
            roots = [root for root in ([*empties, out] if self.last else empties) if root.requires_grad]
            torch.autograd.backward(roots, [error if root.dim() else root.new_full((), share) for root in roots])
        if self._sending:  # it has arrived: something came back for it
            self._sending.pop(0).wait()

    @torch.no_grad()
    def forward(self, x: Tensor | None, images: int) -> Tensor | None:
        """The whole net's logits (images, K) on the last stage, None on the others; `x` is read by the first."""
        (h,) = self._inputs(x, [images])
        with self._autocast(self.received.device):
            out = self.net.model(h)
        if self.last:
            return out
        self._send(out, 0).wait()
        return None

    def _inputs(self, x: Tensor | None, sizes: list[int]) -> Iterator[Tensor]:
        """This stage's input of each micro-batch, of as many images; those from another stage are asked for at once."""
        if self.stage == 0:
            if x is None:
                raise ValueError("x is None, expected the batch on the first stage")
            yield from x.tensor_split(len(sizes))
            return
        buffers = [empty_of(self.received, size) for size in sizes]
        due: list[Any] = [
            dist.irecv(in_memory_order(buffer, self.received), self.ranks[self.stage - 1], self.group, number)
            for number, buffer in enumerate(buffers)
        ]
        for number, (buffer, work) in enumerate(zip(buffers, due, strict=True)):
            with self._phase("wait", number):
                work.wait()
            yield buffer

    def _send(self, out: Tensor, number: int) -> Any:
        return dist.isend(in_memory_order(out, self.sent), self.ranks[self.stage + 1], self.group, number)

    def _broadcast(self, error: Tensor) -> Any:
        return dist.broadcast(error, self.ranks[-1], self.group, async_op=True)

    def _average_over_replicas(self) -> None:
        if self.replicas is not None:
            grads = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
            if not grads:
                return
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self.replicas)
            flat /= dist.get_world_size(self.replicas)
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    @contextlib.contextmanager
    def _phase(self, name: str, number: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.trace is not None:
            self.trace.append((f"{name} {number}", start, time.perf_counter()))


def empty_of(example: Tensor, size: int) -> Tensor:
    """An empty batch of `size` in the form of `example` (N, ...)."""
    empty = example.new_empty(size, *example.shape[1:])
    return empty.to(memory_format=torch.channels_last) if is_channels_last(example) else empty


def in_memory_order(x: Tensor, example: Tensor) -> Tensor:
    """`x` as a contiguous tensor whose memory is laid out as `example`'s is; a view where it has that layout."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(example) else x).contiguous()


def now(device: torch.device) -> float:
    """Seconds by `time.perf_counter`, after all that `device` has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def has_submodule(module: nn.Module, name: str) -> bool:
    """Whether `module` has a submodule of that name."""
    return name in dict(module.named_modules())
