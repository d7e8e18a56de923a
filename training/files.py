"""Files that more than one process may want: locked, and written whole or not at all."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to lock the file `path`, or `wait` for it; yield whether this process holds it. Its end frees the lock.

    On a file system without locks it holds it always, and says so.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        held = True
        try:
            # (a lock of this kind does not pass on to forked DataLoader workers, which may outlive a killed run)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            held = wait
            if wait:
                print(f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"warning: cannot lock {path}: {error}", file=sys.stderr)
        yield held


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` after the with-block, or after an error delete it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
