"""What a trained net sees in image files.

Shapes: S pixels a side, K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.checkpoint import load_trained
from training.data import normalise
from training.image_files import read_rgb

SHOWN = 3  # classes per image


def read_image(path: str, resized: int, size: int) -> Tensor:
    """Read an image file as the nets are tested: shorter side to `resized`, the centre cut out, scaled to -1..1.

    Returns:
        (3, size, size) float32.

    Raises:
        ImageFileError: the file cannot be read, or is no image, or not a whole one.
    """
    pixels = np.array(read_rgb(path, upright=True))
    x = normalise(torch.from_numpy(pixels).permute(2, 0, 1))
    height, width = (round(side * resized / min(x.shape[1:])) for side in x.shape[1:])
    x = F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return x[:, top : top + size, left : left + size]


@torch.no_grad()
def classify(model: nn.Module, checkpoint: dict[str, Any], paths: Sequence[str], *, resized: int, size: int) -> int:
    """Print for each image file the most probable classes, in percent.

    Args:
        model: the bare net of `checkpoint`, on the device to use; its weights are loaded here.
        checkpoint: of `load_checkpoint`, of a run or of a trained net.
        paths: image files of any size.
        resized, size: pixels, as in `read_image`.

    Returns:
        The exit status, 0.

    Raises:
        ImageFileError: as `read_image`.
        ValueError: the checkpoint does not fit the net.
    """
    load_trained(model, checkpoint)
    device = next(model.parameters()).device
    for path in paths:
        logits = model.eval()(read_image(path, resized, size)[None].to(device))
        values, classes = logits.softmax(1)[0].topk(min(SHOWN, logits.shape[1]))
        seen = (f"{checkpoint['classes'][k]} {100 * p:.1f} %" for p, k in zip(values, classes.tolist(), strict=True))
        print(f"{path}: {', '.join(seen)}")
    return 0
