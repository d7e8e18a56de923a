"""torch.distributed, so that one process needs no special case: without a process group, the world is one rank."""

from typing import Any, TextIO

import torch
import torch.distributed as dist

_share: list[tuple[int, int]] = []  # what `share_among` has said last, if anything


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_among(replica: int, replicas: int) -> None:
    """Let this process take the share `replica` of `replicas` of each batch, instead of its rank's of the world's.

    For processes that train stages of a net: those of one replica take the same images.
    """
    _share[:] = [(replica, replicas)]


def replica() -> tuple[int, int]:
    """Which share of each batch this process takes, and how many shares there are."""
    return _share[0] if _share and world_size() > 1 else (rank(), world_size())


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value, summed over the ranks; every rank must call this with as many values."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Every rank's plain-data `value`, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def average_buffers(module: torch.nn.Module) -> None:
    """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the ranks."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(world_size())


def print_once(message: object, file: TextIO | None = None) -> None:
    """Print from rank 0, at once."""
    if rank() == 0:
        print(message, file=file, flush=True)
