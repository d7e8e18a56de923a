"""The 2-conv/2-FC net of Webster, Choi, Ahn 2020, for 32x32 images."""

from collections import OrderedDict

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two 3x3 convolutions with batch norm, one max-pool, two linear layers.

    `points` names the blocks that get feedback, each ending where the original injects it.

    Args:
        num_classes: K, the width of the output.
        fc_norm: put a batch norm between fc1's linear layer and its ReLU; the original has none.
    """

    points = ("conv1", "conv2", "fc1")

    def __init__(self, num_classes: int = 10, fc_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 32, 3), norm=nn.BatchNorm2d(32), relu=nn.ReLU()))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(32, 32, 3), norm=nn.BatchNorm2d(32), relu=nn.ReLU()))
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
        norm = {"norm": nn.BatchNorm1d(128)} if fc_norm else {}
        self.fc1 = nn.Sequential(OrderedDict(linear=nn.Linear(32 * 14 * 14, 128), **norm, relu=nn.ReLU()))
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, K)."""
        return self.fc2(self.fc1(self.pool(self.conv2(self.conv1(x)))))
