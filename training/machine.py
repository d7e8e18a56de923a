"""The machine that a run is on: how memory is kept, and what config.json says of hardware and versions."""

import ctypes
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

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


def set_arithmetic(tf32: str | None, deterministic: bool) -> None:
    """Let float32 products on a GPU use TF32, "on" or "off", and all algorithms be deterministic.

    Without `tf32` it stays as torch has it: on in convolutions, off in matrix products.
    """
    if tf32 is not None:
        torch.set_float32_matmul_precision("high" if tf32 == "on" else "highest")
        torch.backends.cudnn.allow_tf32 = tf32 == "on"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first call
    torch.use_deterministic_algorithms(deterministic)


def versions(device: torch.device) -> dict[str, Any]:
    """Versions of what computes on `device`; for a GPU, also whether float32 products use TF32."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "torchvision")}
    if device.type == "cuda":
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"driver": driver and driver.splitlines()[0]}
        found |= {"tf32_matmul": torch.get_float32_matmul_precision() != "highest"}
        found |= {"tf32_convolution": torch.backends.cudnn.allow_tf32}
    return found


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """This repository's commit, with "-dirty" where files differ from it; None outside a git checkout."""
    return output_of(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def output_of(command: list[str]) -> str | None:
    """What `command` prints, run in this repository; None where it cannot."""
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
