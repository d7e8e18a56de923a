"""The built-in synthetic image set: hard enough that how the hidden blocks learn makes a difference."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES, COARSE, SHIFT, DISTRACTOR, NOISE = 8, 8, 8, 0.6, 0.4


def synthetic_images(num_classes: int, train: int, test: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes * TEMPLATES, 3, COARSE, COARSE, generator=generator)
    templates = F.interpolate(coarse, size=32, mode="bilinear").permute(0, 2, 3, 1).contiguous()
    templates /= templates.std((1, 2, 3), keepdim=True)
    total = train + test
    labels = torch.arange(total) % num_classes

    def pick(which):
        offset = torch.randint(-SHIFT, SHIFT + 1, (2, total, 1), generator=generator)
        rows = (torch.arange(32) + offset[0]) % 32
        columns = (torch.arange(32) + offset[1]) % 32
        flip = torch.rand(total, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
        return templates[which[:, None, None], rows[:, :, None], columns[:, None, :]]

    variant = torch.randint(TEMPLATES, (total,), generator=generator)
    x = pick(labels * TEMPLATES + variant)
    x += DISTRACTOR * pick(torch.randint(len(templates), (total,), generator=generator))
    x += NOISE * torch.randn(x.shape, generator=generator)
    images = (127.5 + 50 * x).clamp_(0, 255).to(torch.uint8)
    return {"x_train": images[:train], "y_train": labels[:train], "x_test": images[train:], "y_test": labels[train:]}
