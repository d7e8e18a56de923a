"""DKP on CIFAR-10 with other steps of B, on held-out images: does what a least-squares fit of B suggests help it?

Run:    python benchmarks/dkp_steps.py --data DIR --epochs 12 --channels-last --precision bf16
Every flag but --data goes to main.py. A run each of seed 1:

    decayed-3e-5    B's learning rate begins at 3e-5 and falls by 0.8 an epoch
    tied-RATE       it follows W's one-cycle schedule, with a peak of RATE
    ...-gamma       the same, and less by 0.9 an epoch beside it
    ...-wd, -lr     the same with less decay of W, 1e-3; with twice its learning rate
    ...-gamma-lr    as ...-gamma with half of W's learning rate
    ...-fc-norm     the same with `--fc-norm`, and W's learning rate at 0.01, or as said
    normalised      e^T h is divided by the running mean of ||e||^2, as in normalised least mean squares (Nagumo, Noda
                    1967), and B takes plain steps in place, tied to the schedule as well

Each run's metrics.csv lies in runs/cifar10-dkp-steps/NAME.
"""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from feedback import RULES, Labels, Rule
from feedback.rules.rule import output_error
from training.arguments import Parser
from training.checkpoint import NAMES
from training.console import run_script
from training.machine import REPOSITORY
from training.plot import read_metrics

RULE = "DKP-NORMALISED"
FOLDER = REPOSITORY / "runs" / "cifar10-dkp-steps"
MEMORY = 0.997  # of the running mean, which three points ask for in each step
BASE = ["--recipe", "original", "--batch-size", "50", "--schedule", "one-cycle", "--lr", "0.002", "--wd", "3e-3"]
BASE += ["--b-wd", "1e-3", "--train-mode", "DKP"]
TIED = [*BASE, "--b-schedule", "one-cycle", "--gamma", "1"]
FC_NORM = ["--fc-norm", "--lr", "0.01"]
VARIANTS = {  # elements of e^T h / ||e||^2 begin near 1, so that 1e-5 in place moves B about as 1e-5 by Adam does
    "decayed-3e-5": [*BASE, "--b-lr", "3e-5"],
    **{f"tied-{rate}": [*TIED, "--b-lr", rate] for rate in ("3e-5", "1e-4", "3e-4", "1e-3")},
    "tied-3e-4-gamma": [*TIED, "--b-lr", "3e-4", "--gamma", "0.9"],
    "tied-3e-4-gamma-lr": [*TIED, "--b-lr", "3e-4", "--gamma", "0.9", "--lr", "0.001"],
    "tied-1e-4-wd": [*TIED, "--b-lr", "1e-4", "--wd", "1e-3"],
    "tied-3e-4-lr": [*TIED, "--b-lr", "3e-4", "--lr", "0.004"],
    **{f"tied-{rate}-fc-norm": [*TIED, "--b-lr", rate, *FC_NORM] for rate in ("1e-4", "3e-4")},
    **{f"tied-3e-4-fc-norm-{lr}": [*TIED, "--b-lr", "3e-4", *FC_NORM, "--lr", lr] for lr in ("0.004", "0.002")},
    "normalised": [*TIED, "--train-mode", RULE, "--b-update", "inplace", "--b-lr", "1e-5"],
}


def normalised_rule() -> Rule:
    """DKP whose gradient of B is e^T h over the running mean of ||e||^2."""
    squares: list[float] = []  # the running mean of the batches' sums, corrected for its start as Adam's are

    def normalised(error_NK: Tensor, h_ND: Tensor, feedback_KD: Tensor, labels: Labels | None) -> Tensor:
        count, mean = squares or (0, 0.0)
        count, mean = count + 1, MEMORY * mean + (1 - MEMORY) * error_NK.float().square().sum().item()
        squares[:] = count, mean
        return error_NK / (mean / (1 - MEMORY**count))

    return Rule(RULE, sent=output_error, correlated=normalised)


def run(argv: list[str] | None = None) -> int:
    """Train what is not trained yet; print a table of the last epochs."""
    parser = Parser(prog="benchmarks/dkp_steps.py", description=__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="folder where data are found (default: ./data)")
    parser.add_argument("--quick", action="store_true", help="one step of each, no files: to see that it runs")
    args, flags = parser.parse_known_args(argv)
    held_out = "16" if args.quick else "5000"
    flags += ["--data", args.data, "--validation", held_out, *(["--dry-run"] if args.quick else ())]
    RULES[RULE] = normalised_rule()
    print("| B's steps | held-out accuracy, % | training loss |\n|---|---|---|")
    with tempfile.TemporaryDirectory() if args.quick else nullcontext(FOLDER) as folder:
        for name, settings in VARIANTS.items():
            out = Path(folder) / name
            new = main.parse_arguments([*settings, "--out", str(out), *flags])[0]
            if len(read_metrics(out)) < new.epochs:
                begun = (out / NAMES["ConvNet"]).exists()
                start = ["--resume", str(out)] if begun else [*settings, "--out", str(out), *flags]
                status = main.main(start)
                if status:
                    print(f"| {name} | ended with status {status} | |", flush=True)
                    continue
            last = read_metrics(out)[-1]
            print(
                f"| {name} | {float(last['validation_accuracy']):.2f} | {float(last['train_loss']):.4f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    run_script(run)
