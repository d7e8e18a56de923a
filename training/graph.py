"""A training step as a CUDA graph: one launch for all its kernels.

Shapes: N images of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.batches import Held

WARM_UP = 3  # steps that run as they are, so that what libraries allocate at first is there

Step = Callable[[Held, float], Tensor]  # tensors with a row per image, and the factor on the loss; returns a Tensor


def as_graph(step: Step, batch_size: int) -> Step:
    """Return `step`, to be replayed as a CUDA graph from the fourth batch of `batch_size` on; others run as they are.

    What the step reads beside its arguments, learning rates too, must be in tensors that stay. What it returns lies in
    memory that the next step overwrites.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    inputs: Held = ()  # of the graph
    result: Tensor | None = None
    warm = 0

    def run(held: Held, weight: float) -> Tensor:
        nonlocal inputs, result, warm
        if len(held[0]) != batch_size or weight != 1:
            return step(held, weight)
        if warm < WARM_UP:
            warm += 1
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                values = step(held, weight)
            torch.cuda.current_stream().wait_stream(stream)
            return values
        if result is None:
            inputs = tuple(tensor.clone() for tensor in held)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                result = step(inputs, 1.0)
        for tensor, new in zip(inputs, held, strict=True):
            tensor.copy_(new)
        graph.replay()
        return result

    return run
