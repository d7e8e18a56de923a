"""A terminal that goes away, and Ctrl-C, neither of which is to look like a fault."""

import contextlib
import sys
from types import TracebackType
from typing import Any, TextIO


class Lasting:
    """A text stream that drops what it cannot write: a run outlives its terminal, and `| head -n 1`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlast_the_terminal() -> None:
    """Let this process's standard output and error be `Lasting`."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # type: ignore[assignment]


def show_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An excepthook that says of Ctrl-C that it came, and no more."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
