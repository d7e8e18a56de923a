"""2-conv/2-FC net on CIFAR-10, trained by BP, FA, KP, DFA, DKP or LAS.

Run:    python main.py --train-mode LAS --epochs 12 --precision bf16 --channels-last
Result: 72.61 +- 0.25 % test accuracy (n=3; BP 74.27, DKP 66.74, DFA 66.13), 24 to 34 seconds an epoch on one thread of
        an AMD EPYC, torch 2.13.0
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import functools
import itertools
import math
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

import torch

from models import ConvNet
from training.arguments import Parser, add_common_arguments, advice, parse_run_arguments, positive_int, run_script
from training.checkpoint import save_checkpoint, trained_state
from training.classify import classify
from training.data import Batches, batches, epoch_order, load_images, normalise
from training.loop import Job, evaluate, fit, restore, test_line
from training.memory import reuse_memory
from training.run import count, make_run_folder, write_config
from training.setup import SCHEDULES, make_optimizers, set_learning_rates, wrap

IMAGE_SIZE = 32
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
NOT_KEPT = {"out", "resume", "evaluate", "classify"}  # not of the experiment, so not in the checkpoint


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="main.py", description=__doc__)
    parser.set_defaults(momentum=0.9)
    common = {"epochs": 100, "lr": 5e-4, "wd": 1e-6, "b_lr": 1e-4, "b_wd": 1e-6, "gamma": 0.8, "b_scale": 1.0}
    training, data, run = add_common_arguments(parser, **common)
    add = training.add_argument
    add("--batch-size", type=positive_int, default=64, metavar="N", help="training images per step (original: 64)")
    add("--schedule", choices=SCHEDULES, default="constant", help="of the weights' learning rate (original: constant)")
    add(
        "--fc-norm",
        action=BooleanOptionalAction,
        default=False,
        help="batch norm in fc1, which the original's net does not have",
    )
    add("--no-cuda", action="store_true", help="train on the CPU even where there is a GPU")
    add = data.add_argument
    add("--dataset", choices=("cifar10", "synthetic"), help="default: cifar10; synthetic if it cannot be had")
    add("--data", default="data", metavar="DIR", help="folder where data are found and kept (default: ./data)")
    add("--validation", type=positive_int, metavar="N", help="hold out N training images and test on them instead")
    add("--test-batch-size", type=positive_int, default=1000, metavar="N", help="images per test batch (default: 1000)")
    add = run.add_argument
    add("--dry-run", action="store_true", help="one training step and one test batch, to see that all is in place")
    add("--log-interval", type=positive_int, default=10, metavar="N", help="steps between logs (default: 10)")
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[Namespace, dict[str, Any] | None, Parser]:
    """Parse the command line; with --resume, over that run's own arguments, and with its checkpoint."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args, checkpoint = parse_run_arguments(parser, argv, "ConvNet", FIXED_BY_THE_CHECKPOINT)
    if args.dry_run:
        args.epochs = 1
    if args.fc_norm and args.batch_size == 1:
        parser.error("--batch-size: got 1, expected 2 or more for --fc-norm: a batch norm compares images")
    if checkpoint is not None and args.schedule != "constant" and checkpoint["args"]["epochs"] != args.epochs:
        laid_out = count(checkpoint["args"]["epochs"], "epoch")
        parser.error(f"--epochs: --schedule {args.schedule} was laid out for {laid_out}")
    return args, checkpoint, parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status of `training.loop.fit`."""
    args, checkpoint, parser = parse_arguments(argv)
    reuse_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    try:
        if args.classify is not None:
            model = ConvNet(len(checkpoint["classes"]), args.fc_norm).to(device)
            return classify(model, checkpoint, args.classify, resized=IMAGE_SIZE, size=IMAGE_SIZE)
        data = load_images(args.dataset, args.data).to(device)
        if args.validation is not None:
            data = data.hold_out(args.validation)
        args.dataset = data.name
        images = len(data.x_train)
        steps = math.ceil(images / args.batch_size)
        if args.fc_norm and images % args.batch_size == 1:  # a last batch of one image: batch norm cannot train on it
            steps -= 1
        if steps == 0:
            raise ValueError(f"{data.source}: {count(images, 'training image')}, expected 2 or more for --fc-norm")
        name = f"{args.dataset}-{args.train_mode}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = Path(args.resume).parent if args.resume else Path(args.out or f"runs/{name}")
        if checkpoint is None:
            make_run_folder(run, "ConvNet")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    torch.manual_seed(args.seed)
    model = ConvNet(data.num_classes, args.fc_norm).to(device)
    example = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    if args.channels_last:
        model, example = model.to(memory_format=torch.channels_last), example.to(memory_format=torch.channels_last)
    net = wrap(args, model, example)
    optimizers = make_optimizers(args, net, nesterov=True)
    limit = 1 if args.dry_run else None
    steps = limit or steps

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
        classes=data.classes,
        settings={key: value for key, value in vars(args).items() if key not in NOT_KEPT},
        data=data.sha256(),
        model_name="ConvNet",
        command=f"python main.py --resume {run}",
        advice=advice(args),
        bfloat16=args.precision == "bf16",
        log_interval=args.log_interval,
        split="test" if args.validation is None else "validation",
    )
    try:
        if args.evaluate:
            model.load_state_dict(trained_state(checkpoint))
            print(test_line(job, evaluate(job)))
            return 0
        if checkpoint is not None:
            restore(job, checkpoint)
        write_config(run, vars(args), data.source, device)
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(f"{run}: {error}")
    del checkpoint
    print(f"{args.train_mode} on {data.source}, {device}; run folder {run}", flush=True)
    status = fit(job)
    if status == 0 and args.save_model:
        save_checkpoint(run / "model.pt", model.state_dict())
        print(f"see {run / 'model.pt'}")
    return status


if __name__ == "__main__":
    run_script(main)
