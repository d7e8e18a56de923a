"""What a net is worth after an epoch: accuracy on the test images, and angles to backpropagation.

Shapes: N images of a rank's batch, K classes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback import DirectFeedback, alignment
from training.distributed import average_buffers, rank, sum_over_ranks


@torch.no_grad()
def evaluate(
    net: DirectFeedback, batches: Iterable[tuple[Tensor, Tensor, int]], precision: torch.autocast
) -> dict[str, float]:
    """Return mean `loss`, `accuracy` and `top5_accuracy` in percent over the images of all ranks, each counted once.

    BatchNorm's running statistics are averaged over the ranks first, and `net` is left in eval mode.
    """
    average_buffers(net.model)
    net.eval()
    device, images = next(net.parameters()).device, 0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of loss, and of labels among the best 1 and 5
    for x, y, _ in batches:
        with precision:
            logits_NK = net(x)
            loss = F.cross_entropy(logits_NK, y, reduction="sum")
        top5 = logits_NK.topk(min(5, logits_NK.shape[1])).indices == y[:, None]
        sums += torch.stack((loss, top5[:, 0].sum(), top5.sum()))
        images += len(y)
    total, best, best5, count = sum_over_ranks([*sums.tolist(), images], device)
    return {"loss": total / count, "accuracy": 100 * best / count, "top5_accuracy": 100 * best5 / count}


def in_a_line(tested: dict[str, float], split: str) -> str:
    """What `evaluate` returned, on images of `split`."""
    top1, top5 = tested["accuracy"], tested["top5_accuracy"]
    return f"{split} accuracy {top1:.2f} % top-1, {top5:.2f} % top-5; loss {tested['loss']:.4f}"


def measure_angles(
    net: DirectFeedback, probe: tuple[Tensor, Tensor], precision: torch.autocast
) -> dict[str, dict[str, float]]:
    """Run `feedback.alignment` on the probe images, in training mode, on rank 0; other ranks return {}.

    Biases and batch norms are left out: they are many, and a bias before a batch norm has a gradient of rounding noise.
    """
    if rank() != 0:
        return {}
    with precision:
        angles = alignment(net.train(), *probe)
    vectors = {name for name, parameter in net.model.named_parameters() if parameter.dim() == 1}
    return {name: values for name, values in angles.items() if name not in vectors}
