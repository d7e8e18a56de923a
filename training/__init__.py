"""What both training scripts share. They import it first: Ctrl-C while torch is loaded is then a line, no traceback."""

import sys

from training.console import show_uncaught

sys.excepthook = show_uncaught
