"""Checkpoints: plain data, written whole or not at all, loaded with `weights_only=True`."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.files import replaced

NAMES = {"ConvNet": "checkpoint.pt", "AlexNet": "checkpoint.pth.tar"}  # of the checkpoint in a run's folder, by net
SCRIPTS = {"ConvNet": "main.py", "AlexNet": "alexnet/main.py"}
TRAINED = {"model": str, "args": dict, "classes": list, "epoch": int, "net": dict}  # what a trained net is
CONTENT = TRAINED | {
    "rows": list,
    "ranks": list,
    "optimizers": list,
    "recent": list,
    "steps": int,
    "shares": int,
}  # and what its run needs


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts) to a temporary name, then rename it to `path`.

    Raises:
        OSError: the file cannot be written; what was at `path` is still there.
    """
    try:
        with replaced(path) as partial, open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # what torch makes of a write that fails, as on a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def find_checkpoint(path: Path, model: str) -> Path:
    """The checkpoint that `--resume path` means where `model` is trained: that file, or the one in that folder.

    Raises:
        ValueError: there is none; where the folder is a run of the other script, the message says so.
    """
    if path.is_file():
        return path
    if (path / NAMES[model]).exists():
        return path / NAMES[model]
    for other, name in NAMES.items():
        if (path / name).exists():
            raise ValueError(f"{path} is a run of {SCRIPTS[other]}, which trains {other}: resume it with that script")
    if not path.exists():
        raise ValueError(f"there is no {path}")
    raise ValueError(f"{path} holds no {NAMES[model]}, expected the folder of a run")


def load_checkpoint(path: Path, model: str, content: dict[str, type] = CONTENT) -> dict[str, Any]:
    """Read a checkpoint of `model` onto the CPU; its tensors stay in the file until they are used.

    Raises:
        ValueError: there is no such file, it is not a whole checkpoint, it is of another net, or it lacks one of
            `content`; or its bytes are not those that were written (a zip file has the CRC-32 of each part).

    Returns:
        What is in it, and as "file" the file's `identity`.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a checkpoint, or not a whole one")
    try:
        with zipfile.ZipFile(path) as archive:
            file, damaged = identity(path), archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged: its CRC-32 is another than when it was written")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file leads the unpickler to
        raise ValueError(f"cannot read checkpoint {path}: {str(error) or type(error).__name__}") from error
    kept = {key for key, kind in CONTENT.items() if isinstance(state, dict) and isinstance(state.get(key), kind)}
    if not kept >= TRAINED.keys():
        raise ValueError(f"{path} is not a checkpoint of a training run: expected {', '.join(TRAINED)} in it")
    if not kept >= content.keys():
        raise ValueError(f"{path} holds a trained net alone: name its run's folder to go on with the training")
    if state["model"] != model:
        raise ValueError(f"{path} is of {state['model']}, expected {model}: take {SCRIPTS.get(state['model'])}")
    return state | {"file": file}


def identity(path: Path) -> tuple[int, int]:
    """Another for each checkpoint that was ever written to `path`."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def load_trained(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give the bare model the weights in a checkpoint; BatchNorm's statistics are averaged over the run's ranks.

    Raises:
        ValueError: they do not fit.
    """
    prefix = "model."
    try:
        net = {key.removeprefix(prefix): value for key, value in checkpoint["net"].items() if key.startswith(prefix)}
        model.load_state_dict(net | mean_buffers([rank["buffers"] for rank in checkpoint.get("ranks", ())]))
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint does not fit: {error}") from error


def mean_buffers(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each buffer, averaged over the ranks that have it; of a single rank, as it is."""
    if len(ranks) < 2:
        return ranks[0] if ranks else {}
    return {key: torch.stack([rank[key] for rank in ranks]).double().mean(0).to(ranks[0][key]) for key in ranks[0]}


def rng_state() -> dict[str, Any]:
    """The state of torch's random number generators, of the CPU and of every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA devices that this machine lacks are passed over."""
    torch.set_rng_state(state["cpu"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
