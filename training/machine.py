"""The machine that a run is on: how memory is kept, and what config.json says of hardware and versions."""

import ctypes
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def reuse_memory() -> None:
    """Have glibc keep what is freed, for the next allocation, and not return it to the system; elsewhere do nothing.

    A training step frees and allocates the same tensors over and over. Returned memory comes back page by page, each
    filled with zeros by the system.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


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
