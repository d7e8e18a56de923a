"""Checkpoints: plain data, written whole or not at all, loaded with `weights_only=True`."""

import os
from pathlib import Path
from typing import Any

import torch

# what a run's checkpoint holds, beside what else the script adds
CONTENT = {"model": str, "args": dict, "epoch": int, "rows": list, "ranks": list, "net": dict, "optimizers": list}


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
    """Read a checkpoint onto the CPU; its tensors stay in the file until they are used.

    Raises:
        ValueError: there is no such file, or it is not a whole checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file leads the unpickler to
        raise ValueError(f"cannot read checkpoint {path}: {str(error) or type(error).__name__}") from error
    fits = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in CONTENT.items())
    if not fits:
        raise ValueError(f"{path} is not a checkpoint of a training run: expected {', '.join(CONTENT)} in it")
    return state


def rng_state() -> dict[str, Any]:
    """The state of torch's random number generators, of the CPU and of every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA devices that this machine lacks are passed over."""
    torch.set_rng_state(state["cpu"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
