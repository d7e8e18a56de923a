"""2-conv/2-FC net on CIFAR-10, trained by BP, FA, KP, DFA, DKP or LAS.

Run:    python main.py --train-mode DKP --batch-size 50 --epochs 10 --seed 1
Result: 64.47 % test accuracy (n=1; BP 69.00, DFA 59.29), 17 minutes on one thread of an AMD EPYC, torch 2.13.0
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import functools
import itertools
import json
import math
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

import torch

from models import ConvNet
from training.arguments import (
    Parser,
    add_feedback_arguments,
    folder,
    nonnegative_float,
    parse_run_arguments,
    positive_int,
    run_script,
    seed,
)
from training.checkpoint import save_checkpoint
from training.data import Batches, batches, epoch_order, load_images, normalise
from training.loop import Job, fit, restore
from training.memory import reuse_memory
from training.run import make_run_folder, write_config
from training.setup import SCHEDULES, make_optimizers, set_learning_rates, wrap

BEST_RECIPE = Path(__file__).parent / "training" / "best_recipe.json"  # of each rule: what the search in README found
PROBE_IMAGES = 256  # the first training images, on which the angles are measured after each epoch
FIXED_BY_THE_CHECKPOINT = (
    "recipe",
    "train_mode",
    "dataset",
    "b_update",
    "b_scale",
    "batch_size",
    "seed",
    "precision",
    "dry_run",
    "fc_norm",
    "schedule",
    "validation",
)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="main.py", description=__doc__)
    parser.set_defaults(momentum=0.9)
    add = parser.add_argument
    add("--dataset", choices=("cifar10", "synthetic"), help="default: cifar10; synthetic if it cannot be had")
    add("--data", default="data", metavar="DIR", help="folder where data are found and kept (default: ./data)")
    add("--recipe", choices=("original", "best"), default="original", help="the flags' defaults (default: original)")
    add("--validation", type=positive_int, metavar="N", help="hold out N training images and test on them instead")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="training images per step (default: 64)")
    add("--test-batch-size", type=positive_int, default=1000, metavar="N", help="images per test batch (default: 1000)")
    add("--epochs", type=positive_int, default=100, metavar="N", help="epochs in all, resumed ones too (default: 100)")
    add("--lr", type=nonnegative_float, default=5e-4, help="learning rate of SGD for the weights (default: 5e-4)")
    add("--wd", type=nonnegative_float, default=1e-6, help="weight decay of the weights (default: 1e-6)")
    add("--schedule", choices=SCHEDULES, default="constant", help="of the weights' learning rate (default: constant)")
    add(
        "--fc-norm",
        action=BooleanOptionalAction,
        default=False,
        help="batch norm in fc1, which the original's net does not have",
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast to bfloat16 (default: fp32)")
    add("--channels-last", action="store_true", help="keep feature maps as (N, H, W, C) in memory: faster")
    add("--seed", type=seed, default=1, help="of weights, B and data order (default: 1)")
    add("--no-cuda", action="store_true", help="train on the CPU even where there is a GPU")
    add("--dry-run", action="store_true", help="one training step and one test batch, to see that all is in place")
    add("--log-interval", type=positive_int, default=10, metavar="N", help="steps between logs (default: 10)")
    add("--save-model", action="store_true", help="at the end, write the bare net's state dict to model.pt")
    add("--out", type=folder, metavar="DIR", help="the run's folder (default: runs/DATASET-MODE-SEED-TIME)")
    add(
        "--resume",
        type=folder,
        metavar="RUN",
        help="continue the run in this folder; its arguments hold unless given anew",
    )
    add_feedback_arguments(parser, b_lr=1e-4, b_wd=1e-6, gamma=0.8, b_scale=1.0)
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[Namespace, dict[str, Any] | None, Parser]:
    """Parse the command line; with --resume, over that run's own arguments, and with its checkpoint."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    asked, _ = parser.parse_known_args(argv)
    if asked.recipe == "best" and asked.resume is None:
        if asked.b_update == "inplace":
            parser.error("--recipe best is for B learned by Adam: it does not go with --b-update inplace")
        argv = [*json.loads(BEST_RECIPE.read_text())[asked.train_mode], *argv]
    args, checkpoint = parse_run_arguments(parser, argv, "checkpoint.pt", "ConvNet", FIXED_BY_THE_CHECKPOINT)
    if args.dry_run:
        args.epochs = 1
    if checkpoint is not None and checkpoint["epoch"] >= args.epochs:
        parser.error(f"the run in {args.resume} has done its {checkpoint['epoch']} epochs: raise --epochs to go on")
    if checkpoint is not None and args.schedule != "constant" and checkpoint["args"]["epochs"] != args.epochs:
        parser.error(f"--epochs: --schedule {args.schedule} was laid out for {checkpoint['args']['epochs']} epochs")
    return args, checkpoint, parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status of `training.loop.fit`."""
    args, checkpoint, parser = parse_arguments(argv)
    reuse_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    try:
        data = load_images(args.dataset, args.data).to(device)
        if args.validation is not None:
            data = data.hold_out(args.validation)
        args.dataset = data.name
        name = f"{args.dataset}-{args.train_mode}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = Path(args.resume or args.out or f"runs/{name}")
        if checkpoint is None:
            make_run_folder(run, "checkpoint.pt")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    torch.manual_seed(args.seed)
    model = ConvNet(data.num_classes, args.fc_norm).to(device)
    example = torch.zeros(1, 3, 32, 32, device=device)
    if args.channels_last:
        model, example = model.to(memory_format=torch.channels_last), example.to(memory_format=torch.channels_last)
    net = wrap(args, model, example)
    optimizers = make_optimizers(args, net, nesterov=True)
    images = len(data.x_train)
    limit = 1 if args.dry_run else None
    steps = limit or math.ceil(images / args.batch_size)

    def train_batches(epoch: int, seen: int) -> Batches:
        order = epoch_order(images, args.seed, epoch)[seen:].to(device)
        return batches(data.x_train, data.y_train, args.batch_size, order)

    def test_batches() -> Batches:
        return itertools.islice(batches(data.x_test, data.y_test, args.test_batch_size), limit)

    job = Job(
        net=net,
        train_net=net,
        optimizers=optimizers,
        set_learning_rates=functools.partial(set_learning_rates, args, net, optimizers, steps),
        train_batches=train_batches,
        test_batches=test_batches,
        probe=(normalise(data.x_train[:PROBE_IMAGES]), data.y_train[:PROBE_IMAGES]),
        train_images=images,
        steps=steps,
        epochs=args.epochs,
        folder=run,
        settings={key: value for key, value in vars(args).items() if key not in ("out", "resume")},
        data=data.sha256(),
        model_name="ConvNet",
        command=f"python main.py --resume {run}",
        bfloat16=args.precision == "bf16",
        log_interval=args.log_interval,
        split="test" if args.validation is None else "validation",
    )
    try:
        if checkpoint is not None:
            restore(job, checkpoint)
        write_config(run, vars(args), data.source, device)
    except (ValueError, OSError) as error:
        parser.error(f"{run}: {error}")
    del checkpoint
    print(f"{args.train_mode} on {data.source}, {device}; run folder {run}", flush=True)
    status = fit(job)
    if status == 0 and args.save_model:
        save_checkpoint(run / "model.pt", model.state_dict())
    return status


if __name__ == "__main__":
    run_script(main)
