"""What several test files need."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from training.synthetic import synthetic_images


@pytest.fixture
def cifar10_arrays():
    """A tiny stand-in with CIFAR-10's form: 40 training and 20 test images."""
    return {key: value.numpy() for key, value in synthetic_images(10, 40, 20).items()}


@pytest.fixture
def data_folder(tmp_path, cifar10_arrays):
    """A folder with that set as cifar10.npz."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **cifar10_arrays)
    return folder


@pytest.fixture(scope="session")
def alexnet():
    """alexnet/main.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "alexnet_main", Path(__file__).resolve().parent.parent / "alexnet" / "main.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
