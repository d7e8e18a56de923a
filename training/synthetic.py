"""The built-in synthetic image set: hard enough that how the hidden blocks learn makes a difference."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES, COARSE, SHIFT, DISTRACTOR, NOISE = 4, 8, 4, 0.3, 0.4


def synthetic_images(num_classes: int, train: int, test: int, seed: int = 0) -> dict[str, Tensor]:
    """Make a labelled image set, the same for the same arguments, in a few seconds and without files.

    A class is four smooth random colour fields. An image is one field of its class, flipped or not and shifted by up
    to four pixels each way, with a fainter field of any class over it and pixel noise.

    Returns:
        x_train, x_test: uint8 (N, 32, 32, 3) RGB; y_train, y_test: int64 (N,), the classes in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes * TEMPLATES, 3, COARSE, COARSE, generator=generator)
    templates = F.interpolate(coarse, size=32, mode="bilinear").permute(0, 2, 3, 1).contiguous()
    templates /= templates.std((1, 2, 3), keepdim=True)
    total = train + test
    labels = torch.arange(total) % num_classes

    def view_of(template: Tensor) -> Tensor:
        """Each image's own view of its template, (total,) indices to (total, 32, 32, 3)."""
        shift = torch.randint(-SHIFT, SHIFT + 1, (2, total, 1), generator=generator)
        rows, columns = (torch.arange(32) + shift) % 32
        flipped = torch.rand(total, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        return templates[template[:, None, None], rows[:, :, None], columns[:, None, :]]

    x = view_of(labels * TEMPLATES + torch.randint(TEMPLATES, (total,), generator=generator))
    x += DISTRACTOR * view_of(torch.randint(len(templates), (total,), generator=generator))
    x += NOISE * torch.randn(x.shape, generator=generator)
    images = (127.5 + 50 * x).clamp_(0, 255).to(torch.uint8)
    return {"x_train": images[:train], "y_train": labels[:train], "x_test": images[train:], "y_test": labels[train:]}
