"""Checkpoints: plain data, written whole or not at all, loaded with `weights_only=True`."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts) to a temporary name, then rename it to `path`.

    Raises:
        OSError: the file cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        ValueError: there is no such file, or it is not a whole checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read checkpoint {path}: {str(error) or type(error).__name__}") from error
    if not isinstance(state, dict) or "args" not in state:
        raise ValueError(f"{path} is not a checkpoint of a training run")
    return state


def rng_state() -> dict[str, Any]:
    """The state of torch's random number generators, of the CPU and of every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA devices that this machine lacks are passed over."""
    torch.set_rng_state(state["cpu"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
