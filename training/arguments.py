"""Command-line arguments: one clear line and exit status 2 for whatever does not fit."""

import argparse
import math
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text: str) -> int:
    """Parse an integer of 1 or more; argparse reports the ArgumentTypeError that is raised for any other."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return value


def nonnegative_float(text: str) -> float:
    """Parse a finite number of 0 or more; argparse reports the ArgumentTypeError that is raised for any other."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number of 0 or more")
    return value


def seed(text: str) -> int:
    """Parse an integer from 0 to 2**32 - 1; argparse reports the ArgumentTypeError that is raised for any other."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to {2**32 - 1}")
    return int(text)
