"""A terminal that goes away, and Ctrl-C, neither of which is to look like a fault.

Scripts import it first, so that Ctrl-C while torch is loaded is a line, too.
"""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO


class Lasting:
    """A text stream that drops what it cannot write: a run outlives its terminal, and `| head -n 1`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlast_the_terminal() -> None:
    """Let this process's standard output and error be `Lasting`; one that was closed at the start goes nowhere."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, Lasting(getattr(sys, name) or io.StringIO()))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: raise KeyboardInterrupt, but end the process where a module is being imported.

    Modules in the midst of their import may catch the exception, or fail in another way because of it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print("interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


in_main_thread = threading.current_thread() is threading.main_thread()
if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)


def run_script(main: Callable[[], int]) -> NoReturn:
    """End the process with `main`'s exit status; Ctrl-C before or after training is one line and 130."""
    outlast_the_terminal()
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
