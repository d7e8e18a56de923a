"""Where a measurement keeps what it measured: every single number, with the command, the machine and the versions."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from training.machine import REPOSITORY, git_revision, hardware

MEASURED = REPOSITORY / "runs" / "benchmarks"


def write_raw(name: str, device: torch.device, rows: list[dict[str, Any]], folder: Path = MEASURED) -> None:
    """Write `folder`/`name`.json and print where.

    Args:
        name: of the measurement.
        device: that it ran on.
        rows: plain data, one dict a row.
        folder: is made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {"command": " ".join(sys.argv), "hardware": hardware(device), "torch": torch.__version__}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result | {"git": git_revision(), "rows": rows}, indent=1) + "\n")
    print(f"see {path}")
