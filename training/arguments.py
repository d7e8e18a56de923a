"""Command-line arguments: one clear line and exit status 2 for whatever does not fit."""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from feedback import RULES, UPDATES, Rule
from feedback.heads import HEAD_POOL, HEAD_WIDTH
from training.checkpoint import CONTENT, TRAINED, find_checkpoint, load_checkpoint

SCHEDULES = ("constant", "one-cycle")
RECIPES = Path(__file__).parent / "recipes.json"  # of each net: the best flags of each rule; what else is known


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags cannot be abbreviated."""

    # of B's flags, set by `add_common_arguments`
    feedback_defaults: dict[str, float | str]
    learned_b_scale: float

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse a command line; name the flag that an unknown one comes close to."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            close = [match for word in unknown for match in difflib.get_close_matches(word.partition("=")[0], flags, 1)]
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


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


def below_one(text: str) -> float:
    """Parse a number from 0 to below 1; argparse reports the ArgumentTypeError that is raised for any other."""
    value = number_up_to(text, 1.0)
    if value == 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected less than 1")
    return value


def number_up_to(text: str, most: float) -> float:
    """Parse a number from 0 to `most`, or raise ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to {most:g}")
    return value


def folder_name(text: str) -> str:
    """Parse a folder's name, ~ for home; argparse reports the ArgumentTypeError that is raised for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty name, expected a folder")
    return os.path.expanduser(text)


def seed(text: str) -> int:
    """Parse an integer from 0 to 2**32 - 1; argparse reports the ArgumentTypeError that is raised for any other."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to {2**32 - 1}")
    return int(text)


def add_common_arguments(
    parser: Parser, epochs: int, lr: float, wd: float, b_lr: float, b_wd: float, gamma: float, b_scale: float
) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Add the flags that both training scripts have; the numbers are the original's, as --help names them.

    Returns:
        The groups of training, data and run, for the script to add its own flags to.
    """
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--recipe", choices=("best", "original"), default="best", help="where defaults come from (default: best)")
    add("--epochs", type=positive_int, default=epochs, metavar="N", help=f"resumed ones too (default: {epochs})")
    add("--lr", type=nonnegative_float, default=lr, help=f"learning rate of SGD for the weights (original: {lr:g})")
    add("--wd", "--weight-decay", type=nonnegative_float, default=wd, help=f"of the weights (original: {wd:g})")
    add("--schedule", choices=SCHEDULES, default="constant", help="of the weights' learning rate (original: constant)")
    add(
        "--fc-norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="batch norm in fc blocks (original: none)",
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast to bfloat16 (default: fp32)")
    add("--channels-last", action="store_true", help="keep feature maps as (N, H, W, C) in memory: faster")
    add("--tf32", choices=("on", "off"), help="on a GPU: float32 products by TF32 (default: in convolutions alone)")
    add("--deterministic", action="store_true", help="the same bits from run to run, on a GPU too: slower there")
    add("--seed", type=seed, default=1, help="of weights, B and data order (default: 1)")

    rule = parser.add_argument_group("rule and B").add_argument
    rule("--train-mode", type=str.upper, choices=RULES, default="DKP", help="learning rule (default: DKP)")
    learned, heads = rules(lambda rule: rule.learns), rules(lambda rule: rule.head)
    b_update = f"{rules(lambda rule: rule.in_place)}: B learns by Adam or in the backward pass (default: optimizer)"
    rule("--b-update", choices=UPDATES, help=b_update)
    in_place = "in place lr / (1 - momentum)"
    rule("--b-lr", type=nonnegative_float, help=f"{learned}: learning rate of B (original: {b_lr:g}; {in_place})")
    rule("--b-wd", type=nonnegative_float, help=f"{learned}: weight decay of B (original: {b_wd:g})")
    rule("--gamma", type=fraction, help=f"{learned}: factor on B's learning rate an epoch (original: {gamma:g})")
    rule(
        "--b-schedule", choices=SCHEDULES, help=f"{learned}: of B's learning rate, beside --gamma (original: constant)"
    )
    start = f"original: {b_scale:g} for {learned}, else 1"
    b_scale_help = f"factor on the random start of B or a head's last layer, 0: it starts at zero ({start})"
    rule("--b-scale", type=nonnegative_float, metavar="X", help=b_scale_help)
    width, pool = (
        f"features within a head (original: {HEAD_WIDTH})",
        f"pool feature maps to NxN (original: {HEAD_POOL})",
    )
    rule("--head-width", type=positive_int, metavar="N", help=f"{heads}: {width}")
    rule("--head-pool", type=positive_int, metavar="N", help=f"{heads}: {pool}")
    parser.feedback_defaults = {"b_lr": b_lr, "b_wd": b_wd, "gamma": gamma, "b_schedule": "constant"}
    parser.learned_b_scale = b_scale

    data, run = parser.add_argument_group("data"), parser.add_argument_group("run")
    add = run.add_argument
    add("--out", type=folder_name, metavar="DIR", help="folder of a new run (default: runs/ and a name)")
    add("--resume", type=folder_name, metavar="RUN", help="run to go on with; its arguments hold unless given anew")
    add("-e", "--evaluate", action="store_true", help="evaluate the net of --resume on the test images, and end")
    add("--classify", nargs="+", metavar="IMAGE", help="say what the net of --resume sees in image files, and end")
    add("--save-model", action="store_true", help="at the end, write the bare net's state dict to model.pt")
    return training, data, run


def recipe_flags(parser: Parser, argv: Sequence[str], model: str) -> list[str]:
    """The flags that `--recipe` puts before those of `argv`; none for the original's, whose numbers the parser has.

    B in place may have a recipe of its own. Where it has none, it takes the rule's, which is for Adam, without what is
    B's.
    """
    asked, _ = parser.parse_known_args(argv)
    if asked.resume is not None or asked.recipe == "original":
        return []
    recipes = json.loads(RECIPES.read_text())[model]["best"]
    if asked.train_mode not in recipes:
        parser.error(f"--recipe: no best one is known for {asked.train_mode}: take --recipe original, and name --lr")
    if asked.b_update != "inplace":
        return recipes[asked.train_mode]
    words = recipes[asked.train_mode]
    of_b = {i + after for i, word in enumerate(words) if word in ("--b-lr", "--b-wd") for after in (0, 1)}
    return recipes.get(f"{asked.train_mode} inplace", [word for i, word in enumerate(words) if i not in of_b])


def warn_of_the_original(parser: Parser, args: argparse.Namespace, model: str) -> None:
    """Say on standard error where a new run has settings of the original that are known to diverge."""
    diverges = json.loads(RECIPES.read_text())[model]["original_diverges"]
    if args.recipe == "original" and args.train_mode in diverges and args.lr == parser.get_default("lr"):
        print(f"warning: {model} diverges by {args.train_mode} with the original's settings", file=sys.stderr)


def advice(args: argparse.Namespace) -> str:
    """What to try where a run with these arguments diverges."""
    rates = "--lr or --b-lr" if RULES[args.train_mode].learns else "--lr"
    return f"try {'--recipe best, or ' if args.recipe == 'original' else ''}a lower {rates}"


def kolen_pollack_lr(args: argparse.Namespace) -> float:
    """B's learning rate in place that makes its steps as large as W's: lr / (1 - momentum)."""
    return args.lr / (1 - args.momentum)


def follows_w(args: argparse.Namespace) -> bool:
    """Whether B's learning rate in place is the default, which follows W's."""
    return args.b_lr == kolen_pollack_lr(args)


def flag(key: str) -> str:
    """The flag of an argument, "--b-lr" for "b_lr"."""
    return "--" + key.replace("_", "-")


def check_kept(parser: Parser, kept: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the arguments kept in the checkpoint `path` are such as the command line could give."""
    actions = {action.dest: action for action in parser._actions}
    for key, value in kept.items():
        action, default = actions.get(key), parser.get_default(key)
        if action is None:  # a constant of the script
            fits = type(value) is type(default)
        elif action.nargs == 0:  # a switch
            fits = isinstance(value, bool)
        else:
            try:
                again = value if value is None else parser._get_value(action, str(value))
                parser._check_value(action, again)
                fits = again == value and (value is not None or default is None)
            except argparse.ArgumentError:
                fits = value is None and default is None
        if not fits:
            raise ValueError(f"{path} is damaged: it has {str(value)[:50]!r} for {flag(key)}")


def rules(of: Callable[[Rule], bool]) -> str:
    """The names of the rules that `of` takes, in a sentence."""
    *names, last = (name for name, rule in RULES.items() if of(rule))
    return f"{', '.join(names)} or {last}"


def complete_rule(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse the flags that the rule of `args` has no use for, and set those of B or heads that are not given."""
    rule, learned = RULES[args.train_mode], rules(lambda rule: rule.learns)
    if rule.learns:
        args.b_update = args.b_update or "optimizer"
        defaults = dict(parser.feedback_defaults)
        if args.b_update == "inplace":
            if not rule.in_place:
                parser.error(f"--b-update inplace needs {rules(lambda rule: rule.in_place)}, got {rule.name}")
            defaults["b_lr"] = kolen_pollack_lr(args)
    else:
        defaults = {}
        for key in ("b_update", *parser.feedback_defaults):
            if getattr(args, key) is not None:
                needed = rules(lambda rule: rule.in_place) if key == "b_update" else learned
                why = "B is trained as W is" if rule.as_weight else "B is not trained"
                parser.error(f"{flag(key)} needs --train-mode {needed}, got {rule.name}: {why}")
    if rule.head:
        defaults |= {"head_width": HEAD_WIDTH, "head_pool": HEAD_POOL}
    elif args.head_width is not None or args.head_pool is not None:
        parser.error(f"--head-width and --head-pool need {rules(lambda rule: rule.head)}, got {rule.name}: no heads")
    if rule.has_feedback:
        defaults["b_scale"] = parser.learned_b_scale if rule.learns else 1.0
    elif args.b_scale is not None:
        parser.error(f"--b-scale does not go with --train-mode {rule.name}: there is no B")
    for key, default in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, default)


def parse_run_arguments(
    parser: Parser, argv: Sequence[str], model: str, fixed: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Parse a training script's command line; with --resume RUN, over the defaults of that run's own arguments.

    Args:
        parser: with `add_common_arguments`' flags, and a value for `momentum`.
        argv: the command line.
        model: the net that the script trains.
        fixed: the arguments that a resumed run may not change.

    Returns:
        The arguments, with `resume` the path of the checkpoint, and the checkpoint to resume or None. A mistake ends
        the process with one line and status 2.
    """
    argv = [*recipe_flags(parser, argv, model), *argv]
    args = parser.parse_args(argv)
    uses = [flag(key) for key in ("evaluate", "classify") if getattr(args, key)]
    if len(uses) > 1 or (uses and args.save_model):
        parser.error(f"{' and '.join(uses)}{' and --save-model' if args.save_model else ''} do not go together")
    checkpoint = None
    if args.resume is not None:
        if args.out is not None and Path(args.out) != Path(args.resume):
            parser.error("--out does not go with --resume: the run goes on in its own folder")
        try:
            path = find_checkpoint(Path(args.resume), model)
            checkpoint = load_checkpoint(path, model, TRAINED if uses else CONTENT)
            check_kept(parser, checkpoint["args"], path)
        except ValueError as error:
            parser.error(str(error))
        parser.set_defaults(**checkpoint["args"])
        args = parser.parse_args(argv)
        for key in fixed:
            had = parser.get_default(key)
            if getattr(args, key) != had:
                parser.error(f"{flag(key)}: the run in {args.resume} has {had}, got {getattr(args, key)}")
        args.resume = str(path)
        for key in ("schedule", "b_schedule"):
            value, laid_out = getattr(args, key), checkpoint["args"]["epochs"]
            if value not in (None, "constant") and laid_out != args.epochs:
                parser.error(f"--epochs: {flag(key)} {value} was laid out for {laid_out}: start a new run")
        if args.b_update == "inplace" and follows_w(argparse.Namespace(**checkpoint["args"])):
            args.b_lr = args.b_lr if args.b_lr != checkpoint["args"]["b_lr"] else None
    elif uses:
        parser.error(f"{uses[0]} needs --resume: the trained net")
    else:
        warn_of_the_original(parser, args, model)
    complete_rule(parser, args)
    return args, checkpoint
