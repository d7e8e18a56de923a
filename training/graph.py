"""A training step as a CUDA graph: one launch for all its kernels.

Shapes: N images of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps that run as they are, so that what libraries allocate at first is there

Step = Callable[[Tensor, Tensor, float], Tensor]  # images (N, ...), labels (N,), factor on the loss; returns a Tensor


def as_graph(step: Step) -> Step:
    """Return `step`, to be replayed as a CUDA graph from the fourth batch on.

    A batch of another size than the first runs as it is. What the step reads beside its arguments, learning rates too,
    must be in tensors that stay. What it returns lies in memory that the next step overwrites.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    held: list[Tensor] = []  # by the graph: images, labels, result
    shape, warm = None, 0

    def run(x: Tensor, y: Tensor, weight: float) -> Tensor:
        nonlocal shape, warm
        shape = shape or x.shape
        if x.shape != shape or weight != 1:
            return step(x, y, weight)
        if warm < WARM_UP:
            warm += 1
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = step(x, y, weight)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if not held:
            inputs = x.clone(), y.clone()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                result = step(*inputs, 1.0)
            held.extend((*inputs, result))
        held[0].copy_(x)
        held[1].copy_(y)
        graph.replay()
        return held[2]

    return run
