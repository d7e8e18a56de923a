"""Command-line arguments: one clear line and exit status 2 for whatever does not fit."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from feedback import LEARNED, RULES, UPDATES
from training.checkpoint import load_checkpoint


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags cannot be abbreviated."""

    # of B's flags, set by `add_feedback_arguments`
    feedback_defaults: dict[str, float]
    learned_b_scale: float

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text: str) -> int:
    """Parse an integer from 1 to 2**31 - 1; argparse reports the ArgumentTypeError that is raised for any other."""
    if not (text.isdecimal() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more, below {2**31}")
    return int(text)


def nonnegative_int(text: str) -> int:
    """Parse an integer of 0 or more; argparse reports the ArgumentTypeError that is raised for any other."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 0 or more")
    return int(text)


def nonnegative_float(text: str) -> float:
    """Parse a number from 0 to 1e6; argparse reports the ArgumentTypeError that is raised for any other."""
    return number_up_to(text, 1e6)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1; argparse reports the ArgumentTypeError that is raised for any other."""
    return number_up_to(text, 1.0)


def number_up_to(text: str, most: float) -> float:
    """Parse a number from 0 to `most`, or raise ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to {most:g}")
    return value


def folder(text: str) -> str:
    """Parse a folder's name; argparse reports the ArgumentTypeError that is raised for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty name, expected a folder")
    return text


def seed(text: str) -> int:
    """Parse an integer from 0 to 2**32 - 1; argparse reports the ArgumentTypeError that is raised for any other."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to {2**32 - 1}")
    return int(text)


def run_script(main: Callable[[], int]) -> NoReturn:
    """End the process with `main`'s exit status; Ctrl-C before or after training is one line and 130."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def add_feedback_arguments(parser: Parser, b_lr: float, b_wd: float, gamma: float, b_scale: float) -> None:
    """Add the flags of the learning rule and of B; the numbers are the defaults that --help names for DKP and LAS."""
    parser.add_argument("--train-mode", choices=RULES, default="DKP", help="learning rule (default: DKP)")
    parser.add_argument(
        "--b-scale",
        type=nonnegative_float,
        metavar="X",
        help=f"factor on B's random start, 0: B starts at zero (default: {b_scale:g} for DKP and LAS, else 1)",
    )
    add = parser.add_argument_group("B, with --train-mode DKP or LAS only").add_argument
    add("--b-update", choices=UPDATES, help="how B learns: by Adam, or in the backward pass (default: optimizer)")
    add("--b-lr", type=nonnegative_float, help=f"learning rate of B (default: {b_lr}; in place lr / (1 - momentum))")
    add("--b-wd", type=nonnegative_float, help=f"weight decay of B (default: {b_wd})")
    add("--gamma", type=fraction, help=f"factor on B's learning rate after each epoch (default: {gamma})")
    parser.feedback_defaults = {"b_lr": b_lr, "b_wd": b_wd, "gamma": gamma}
    parser.learned_b_scale = b_scale


def flag(key: str) -> str:
    """The flag of an argument, "--b-lr" for "b_lr"."""
    return "--" + key.replace("_", "-")


def parse_run_arguments(
    parser: Parser, argv: list[str] | None, checkpoint_name: str, model_name: str, fixed: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Parse a training script's command line; with --resume RUN, over the defaults of that run's own arguments.

    Args:
        parser: with `add_feedback_arguments`' flags, --resume, --out and --lr, and a value for `momentum`.
        argv: the command line, or None for the process's own.
        checkpoint_name: of the file in a run's folder.
        model_name: what the checkpoint must be of.
        fixed: the arguments that a resumed run may not change.

    Returns:
        The arguments, and the checkpoint to resume or None. A mistake ends the process with one line and status 2.
    """
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume is not None:
        if args.out is not None and Path(args.out) != Path(args.resume):
            parser.error("--out does not go with --resume: the run goes on in its own folder")
        path = Path(args.resume)
        try:
            checkpoint = load_checkpoint(path if path.is_file() else path / checkpoint_name)
        except ValueError as error:
            parser.error(str(error))
        if checkpoint["model"] != model_name:
            parser.error(f"{args.resume} is a run of {checkpoint['model']}, expected {model_name}")
        saved = checkpoint["args"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for key in fixed:
            had = parser.get_default(key)
            if getattr(args, key) != had:
                parser.error(f"{flag(key)}: the run in {args.resume} has {had}, got {getattr(args, key)}")
    if args.train_mode in LEARNED:
        args.b_update = args.b_update or "optimizer"
        defaults = dict(parser.feedback_defaults)
        if args.b_update == "inplace":
            defaults["b_lr"] = args.lr / (1 - args.momentum)
        for key, default in defaults.items():
            if getattr(args, key) is None:
                setattr(args, key, default)
    else:
        for key in ("b_update", *parser.feedback_defaults):
            if getattr(args, key) is not None:
                why = "B is trained as W is" if args.train_mode == "KP" else "B is not trained"
                parser.error(f"{flag(key)} needs --train-mode {' or '.join(LEARNED)}, got {args.train_mode}: {why}")
    if args.train_mode == "BP" and args.b_scale is not None:
        parser.error("--b-scale does not go with --train-mode BP: there is no B")
    if args.train_mode != "BP" and args.b_scale is None:
        args.b_scale = parser.learned_b_scale if args.train_mode in LEARNED else 1.0
    return args, checkpoint
