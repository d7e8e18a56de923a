"""A small residual network, with the feedback points at the ends of its stages.

Run:    python examples/resnet.py
A point must carry all that flows on: the output of a whole stage does, a convolution inside a residual block does not,
since the skip leads around it. Prints the loss of DKP on random images, and the angles at the stages' ends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedback import DirectFeedback, alignment


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, and a skip around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.skip(x))


def main() -> None:
    """Train for 30 steps and print the table."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(Residual(3, 16, 1), Residual(16, 16, 1)),
        nn.Sequential(Residual(16, 32, 2), Residual(32, 32, 1)),
        nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    )
    x, y = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    net = DirectFeedback(model, points=["0", "1", "2"], rule="DKP", example=x[:2])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        torch.optim.Adam(net.feedback.parameters(), lr=1e-4),
    ]
    print("| step | loss | angles at the stages' ends, degrees |\n|---|---|---|")
    for step in range(1, 31):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 10 == 0:
            angles = alignment(net, x, y)
            degrees = " ".join(f"{angles[point]['alignment_deg']:.1f}" for point in net.points)
            print(f"| {step} | {loss.item():.3f} | {degrees} |")


if __name__ == "__main__":
    main()
