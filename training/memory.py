"""How the process keeps its memory."""

import ctypes
import platform

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
