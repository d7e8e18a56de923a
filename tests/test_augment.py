"""The crops of a whole batch are torchvision's, one by one."""

import importlib.util

import pytest
import torch

from training.augment import centre_crops, random_crops, resize_crops
from training.torchvision_import import import_torchvision

needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture
def transforms():
    import_torchvision()
    from torchvision.transforms import v2

    return v2


@needs_torchvision
@pytest.mark.parametrize("size", [224, 64, 32])
def test_random_crops_equal_torchvisions_on_the_same_boxes(transforms, size):
    boxes, flips = random_crops(48, 32, torch.Generator().manual_seed(1))
    got = resize_crops(IMAGES.float() / 255, boxes, flips, size)
    for image, box, flip, crop in zip(IMAGES, boxes.tolist(), flips, got, strict=True):
        for exact, allowed in ((image.float() / 255, 1e-5), (image, 1.01)):
            expected = transforms.functional.resized_crop(exact, *box, size=[size, size], antialias=True)
            expected = transforms.functional.horizontal_flip(expected) if flip else expected
            scale = 1 if exact.is_floating_point() else 255
            assert (crop * scale - expected).abs().max() <= allowed


@needs_torchvision
@pytest.mark.parametrize("size", [224, 64])
def test_centre_crops_equal_torchvisions(transforms, size):
    transform = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])
    got = centre_crops(IMAGES.float(), size)
    for image, crop in zip(IMAGES, got, strict=True):
        assert (crop - transform(image.float())).abs().max() <= 0.01
        assert (crop - transform(image)).abs().max() <= 1.01


@needs_torchvision
def test_random_crops_have_torchvisions_distribution(transforms):
    n = 4000
    boxes, flips = random_crops(n, 32, torch.Generator().manual_seed(2))
    theirs = transforms.RandomResizedCrop(224)
    torch.manual_seed(0)
    drawn = [theirs.make_params([IMAGES[0]]) for _ in range(n)]
    drawn = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn])
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert (height > 0).all() and (width > 0).all()
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for mine, other in zip(boxes.float().unbind(1), drawn.float().unbind(1), strict=True):
        assert (mine.quantile(quantiles) - other.quantile(quantiles)).abs().max() <= 1
        error = (mine.var() / n + other.var() / n).sqrt()
        assert (mine.mean() - other.mean()).abs() <= 4 * error
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / n**0.5


def test_output_memory_is_used_again():
    boxes, flips = random_crops(4, 32, torch.Generator().manual_seed(1))
    out = torch.empty(4, 3, 64, 64)
    got = resize_crops(IMAGES[:4].float(), boxes, flips, 64, out=out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got, resize_crops(IMAGES[:4].float(), boxes, flips, 64))
