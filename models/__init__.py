"""Plain networks; each names its feedback points in the class attribute `points`. Needs torch only."""

from models.alexnet import AlexNet
from models.convnet import ConvNet
from models.vgg import VGG

Net = ConvNet | AlexNet

__all__ = ["VGG", "AlexNet", "ConvNet", "Net"]
