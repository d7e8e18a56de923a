"""AlexNet with batch norm, as Webster, Choi, Ahn 2020 train it on CIFAR-100."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


def conv_block(in_channels: int, out_channels: int, pool: bool = False, **shape: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU and, where asked for, a 3x3 max-pool of stride 2."""
    block = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, **shape), norm=nn.BatchNorm2d(out_channels), relu=nn.ReLU()
        )
    )
    if pool:
        block.add_module("pool", nn.MaxPool2d(3, stride=2))
    return block


def fc_block(in_features: int, norm: bool) -> nn.Sequential:
    """Linear layer to 4096 features, batch norm where asked for, and ReLU."""
    norms = {"norm": nn.BatchNorm1d(4096)} if norm else {}
    return nn.Sequential(OrderedDict(linear=nn.Linear(in_features, 4096), **norms, relu=nn.ReLU()))


class AveragePool(nn.AdaptiveAvgPool2d):
    """The same, but for maps that have the output's size already: they pass.

    On CUDA the backward pass of torch's is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, S, S)."""
        return x if x.shape[2:] == (self.output_size, self.output_size) else super().forward(x)


class AlexNet(nn.Module):
    """Five convolutions with batch norm and three linear layers, for images of 63x63 pixels or more.

    `points` names the blocks that get feedback, each ending where the original injects it.

    Args:
        num_classes: K, the width of the output.
        fc_norm: put a batch norm between linear layer and ReLU of fc1 and fc2; the original has none.
    """

    points = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2")
    smallest_image = 63  # pixels a side: below, nothing is left for the last pool
    exact_images = range(223, 255)  # pixels a side from which conv5's maps are 6x6 before the last pool already

    def __init__(self, num_classes: int = 100, fc_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = conv_block(3, 64, pool=True, kernel_size=11, stride=4, padding=2)
        self.conv2 = conv_block(64, 192, pool=True, kernel_size=5, padding=2)
        self.conv3 = conv_block(192, 384, kernel_size=3, padding=1)
        self.conv4 = conv_block(384, 256, kernel_size=3, padding=1)
        self.conv5 = conv_block(256, 256, pool=True, kernel_size=3, padding=1)
        self.conv5.append(AveragePool(6)).append(nn.Flatten()).append(nn.Dropout())
        self.fc1 = fc_block(256 * 6 * 6, fc_norm)
        self.fc1.add_module("dropout", nn.Dropout())
        self.fc2 = fc_block(4096, fc_norm)
        self.fc3 = nn.Linear(4096, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, K)."""
        h = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))
        return self.fc3(self.fc2(self.fc1(h)))
