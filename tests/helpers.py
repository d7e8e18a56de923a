"""What test files do alike."""

import contextlib
import subprocess
import sys

import pytest
import torch


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_refused(capsys, call, *fragments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("main.py: error: ") and error.count("\n") == 1, error
    for fragment in fragments:
        assert fragment in error


def loaded(data, epoch, seen=0):
    """Images, labels and the number of images of all ranks, of each training batch as the step sees it."""
    return [(*(part.clone() for part in data.load(*held)), images) for held, images in data.train(epoch, seen)]


@contextlib.contextmanager
def held_by_another_process(path):
    """Lock `path` in another process, as `training.files.locked` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = "file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    program = f"import fcntl, sys; {lock}; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(path)], **pipes, text=True) as process:
        process.stdout.readline()
        yield
        process.communicate("\n")
