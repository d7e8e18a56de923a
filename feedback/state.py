"""Look at a network without leaving a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back `model`'s buffers (BatchNorm statistics), its train and eval modes, and the random numbers."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices), same_modes(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    if not buffer.is_meta and not torch.equal(
                        buffer, saved
                    ):  # one that is a view may not be written to
                        buffer.copy_(saved)
                    setattr(module, name, buffer)


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Put back the train and eval modes of `model`'s modules."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def materialize(model: nn.Module, run: Callable[[], object]) -> None:
    """Give the parameters of lazy modules their shapes and first values, by running the model once in eval mode."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        with same_modes(model), torch.no_grad():
            model.eval()
            run()
