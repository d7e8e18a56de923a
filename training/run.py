"""The folder that a training run leaves behind, and the signals that end it early."""

import csv
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from training.checkpoint import NAMES

REPOSITORY = Path(__file__).resolve().parent.parent


def count(number: int, noun: str) -> str:
    """The number with its noun: "1 epoch", "2 epochs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def make_run_folder(folder: Path, model: str) -> None:
    """Make `folder` for a new run that trains `model`.

    Raises:
        ValueError: it holds a run's checkpoint already.
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAMES[model]).exists():
        raise ValueError(f"{folder} already holds a run: continue it with --resume {folder}, or name another --out")
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "config.json").touch()


def write_config(folder: Path, args: dict[str, Any], data_source: str, device: torch.device) -> None:
    """Write config.json: arguments, the data's source, versions, git revision and hardware, a resumed run's below.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is one of an earlier run, and it is damaged.
    """
    config: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "args": args,
        "data": data_source,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision")}},
        "git": git_revision(),
        "hardware": hardware(device),
    }
    path = folder / "config.json"
    if path.exists() and path.stat().st_size > 0:
        try:
            first = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to go on") from error
        config = first | {"resumed": [*first.get("resumed", []), config]}
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, path)


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """This repository's commit, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def hardware(device: torch.device) -> str:
    """One line: the processor and torch's threads or, on CUDA, the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def write_metrics(path: Path, rows: list[dict[str, float | None]]) -> None:
    """Write all rows so far as CSV, whole or not at all; None, NaN and what a row lacks stay empty."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value is None or math.isnan(value) else value for key, value in row.items()})
    os.replace(partial, path)


class StopRequest:
    """The signal that asked the run to stop, or None."""

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within, the first SIGINT or SIGTERM is only noted in the yielded request; a second one acts as ever."""
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for known, handler in previous.items():
            signal.signal(known, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
