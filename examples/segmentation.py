"""A small U-Net that finds shapes in images made here, trained by several rules.

Run:    python examples/segmentation.py
Prints for each rule the mean intersection over union on other images, and the angles to backpropagation's signals.

The points are the ends of the stages, on the way down and up. What skips from a stage to the other side of the U is
taken from the stage's output, so the point cuts it, too; a point within a stage would leave it to backpropagation.
The error at a pixel goes to the feature vector at its place. A coarser map has one vector for several pixels, and gets
the sum of their errors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedback import RULES, DirectFeedback, alignment

SIDE, CLASSES = 32, 3  # background, disc, square


def shapes(images: int) -> tuple[Tensor, Tensor]:
    """Noisy images (N, 1, SIDE, SIDE) with a disc and a square, equally bright, and each pixel's class."""
    places = torch.arange(SIDE).view(1, SIDE, 1), torch.arange(SIDE).view(1, 1, SIDE)
    target = torch.zeros(images, SIDE, SIDE, dtype=torch.int64)
    for shape in (1, 2):
        size = torch.randint(4, 8, (images, 1, 1))
        down, right = ((place - torch.randint(8, SIDE - 8, (images, 1, 1))).abs() for place in places)
        inside = down**2 + right**2 <= size**2 if shape == 1 else torch.maximum(down, right) <= size - 1
        target[inside] = shape
    return (target > 0).float().unsqueeze(1) + 0.3 * torch.randn(images, 1, SIDE, SIDE), target


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three stages down, two up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = stage(1, 16), stage(16, 32), stage(32, 64)
        self.up2, self.up1, self.head = stage(64 + 32, 32), stage(32 + 16, 16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, H, W) to logits (N, CLASSES, H, W)."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        h = self.bottom(F.max_pool2d(second, 2))
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2), second], 1))
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2), first], 1))
        return self.head(h)


def main() -> None:
    """Train by each rule and print the table."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = shapes(256), shapes(256)
    points = ["down1", "down2", "bottom", "up2", "up1"]
    print(f"| rule | mean IoU, % | angles at {', '.join(points)} |\n|---|---|---|")
    for rule in ("BP", "DFA", "DKP", "LAS"):
        torch.manual_seed(1)
        net = DirectFeedback(UNet(), points, rule, example=x[:2], class_dim=1)
        optimizers = [torch.optim.Adam(net.model.parameters(), lr=3e-3)]
        if RULES[rule].learns:
            optimizers.append(torch.optim.Adam(net.feedback.parameters(), lr=1e-3))
        for _ in range(4):
            for batch in torch.randperm(len(x)).split(16):
                F.cross_entropy(net(x[batch], target=y[batch]), y[batch]).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        angles = alignment(net, x[:16], y[:16])
        with torch.no_grad():
            guess = net.eval()(x_test).argmax(1)
        both = [((guess == k) & (y_test == k)).sum() / ((guess == k) | (y_test == k)).sum() for k in range(CLASSES)]
        degrees = " ".join(f"{angles[point]['alignment_deg']:.0f}" for point in points)
        print(f"| {rule} | {100 * torch.stack(both).mean().item():.1f} | {degrees} |")


if __name__ == "__main__":
    main()
