"""Plain networks; each names its feedback points in the class attribute `points`. Needs torch only."""

from models.alexnet import AlexNet
from models.convnet import ConvNet

Net = ConvNet | AlexNet

__all__ = ["AlexNet", "ConvNet", "Net"]
