"""What several test files need."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import main
from training.synthetic import synthetic_images


def pytest_configure(config):
    """Hide the GPUs, if there are any, from tests of a CPU."""
    chosen = config.option.markexpr
    if "cuda" not in chosen or "not cuda" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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


def module_of(path):
    """A script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(
        path.replace("/", "_").removesuffix(".py"), Path(__file__).resolve().parent.parent / path
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def alexnet():
    """alexnet/main.py as a module."""
    return module_of("alexnet/main.py")


@pytest.fixture(scope="session")
def accuracy():
    """benchmarks/accuracy.py as a module."""
    return module_of("benchmarks/accuracy.py")


@pytest.fixture
def change_training_batches(monkeypatch):
    """Let main.py train on what a function makes of each epoch's batches."""

    def change(function):
        def changed(*args, **options):
            data = whole_images(*args, **options)
            train, load = data.train, data.load

            def changed_train(epoch, seen):
                loaded = ((*load(*held), count) for held, count in train(epoch, seen))
                return (((x, y), count) for x, y, count in function(loaded))

            data.train, data.load = changed_train, lambda x, y: (x, y)
            return data

        monkeypatch.setattr(main, "whole_images", changed)

    whole_images = main.whole_images
    return change


@pytest.fixture
def run(data_folder, tmp_path):
    """Run main.py on 40 images in batches of 12, in folder `out` of tmp_path unless it resumes.

    By the original's settings, unless `flags` say otherwise.
    """

    def run_main(*flags, out="run"):
        new = ("--data", data_folder, "--batch-size", 12, "--recipe", "original", "--out", tmp_path / out)
        where = () if "--resume" in flags else new
        return main.main([str(flag) for flag in ("--no-cuda", *where, *flags)])

    return run_main
