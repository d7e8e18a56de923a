"""A plain VGG of six convolutions for 32x32 images, after Simonyan, Zisserman 2015."""

from collections import OrderedDict

from torch import Tensor, nn


class VGG(nn.Sequential):
    """Three pairs of 3x3 convolutions with batch norm, a max-pool after each pair, and two linear layers.

    `points` names the blocks that get feedback.

    Args:
        num_classes: K, the width of the output.
    """

    points = ("conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "fc1")

    def __init__(self, num_classes: int = 10) -> None:
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for number, width in enumerate((64, 64, 128, 128, 256, 256), start=1):
            block = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            if number % 2 == 0:
                block.append(nn.MaxPool2d(2))
            blocks[f"conv{number}"], channels = block, width
        blocks["fc1"] = nn.Sequential(nn.Flatten(), nn.Linear(256 * 4 * 4, 512), nn.ReLU())
        blocks["fc2"] = nn.Linear(512, num_classes)
        super().__init__(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, K)."""
        return super().forward(x)
