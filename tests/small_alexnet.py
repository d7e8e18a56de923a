"""alexnet/main.py with a net of a few thousand weights, whose checkpoints are small; as a script, it trains that."""

import os
import sys
import time
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import module_of

from training.console import run_script


class SmallNet(nn.Module):
    """A stand-in for AlexNet on 64x64 pixels."""

    points = ("conv", "hidden")
    smallest_image = 63

    def __init__(self, num_classes, fc_norm=False):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 2, 8, stride=8), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
        norm = [nn.BatchNorm1d(16)] if fc_norm else []
        self.hidden = nn.Sequential(nn.Linear(2 * 8 * 8, 16), *norm, nn.ReLU())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.hidden(self.conv(x)))


if __name__ == "__main__":
    time.sleep(float(os.environ.get("LATE_S", "0")))
    alexnet = module_of("alexnet/main.py")
    alexnet.AlexNet = SmallNet
    run_script(alexnet.main)
