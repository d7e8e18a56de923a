"""2-conv/2-FC net on CIFAR-10, trained by any rule of feedback/rules.

Run:    python main.py --train-mode LOCAL --epochs 12 --precision bf16 --channels-last
Result: 75.27 +- 0.53 % test accuracy (n=3; BP 74.27, LAS 72.61, DKP 69.72), 24 s an epoch on a thread of an AMD EPYC
        beside other work, torch 2.13.0
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.console import run_script  # first: so Ctrl-C while torch is loaded is a line

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from feedback import RULES, DirectFeedback
from models import ConvNet
from training.arguments import Parser, add_common_arguments, advice, parse_run_arguments, positive_int
from training.batches import Data, Held, whole_images
from training.checkpoint import load_trained
from training.classify import classify
from training.data import load_images
from training.distributed import print_once, world_size
from training.evaluate import evaluate, in_a_line, measure_angles
from training.graph import as_graph
from training.launch import refuse_torchrun
from training.machine import reuse_memory, set_arithmetic
from training.optim import autocast, learning_rates, make_optimizers, set_learning_rates, wrap
from training.run import Run, RunEndedError, plural

IMAGE_SIZE = 32
PROBE_IMAGES = 256  # the first training images, on which the angles are measured after each epoch
FIXED_BY_THE_CHECKPOINT: tuple[str, ...] = ("recipe", "train_mode", "dataset", "b_update", "b_scale", "batch_size")
FIXED_BY_THE_CHECKPOINT += (
    "seed",
    "precision",
    "dry_run",
    "fc_norm",
    "schedule",
    "b_schedule",
    "validation",
    "head_width",
    "head_pool",
)
# no part of the experiment: not in the checkpoint
NOT_KEPT = {"out", "resume", "evaluate", "classify", "cuda_graph", "no_cuda"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="main.py", description=__doc__)
    parser.set_defaults(momentum=0.9)
    groups = add_common_arguments(parser, epochs=100, lr=5e-4, wd=1e-6, b_lr=1e-4, b_wd=1e-6, gamma=0.8, b_scale=1.0)
    training, data, run = groups
    add = training.add_argument
    add("--batch-size", type=positive_int, default=64, metavar="N", help="training images per step (original: 64)")
    add("--cuda-graph", action="store_true", help="on a GPU: replay the training step as a CUDA graph")
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
    refuse_torchrun(parser)
    args.epochs = 1 if args.dry_run else args.epochs
    if args.cuda_graph and (args.no_cuda or not torch.cuda.is_available()):
        parser.error("--cuda-graph needs a GPU" + (", and got --no-cuda" if args.no_cuda else ", and there is none"))
    if args.batch_size < least_images(args):
        why = "for --fc-norm and for heads: a batch norm compares images"
        parser.error(f"--batch-size: got {args.batch_size}, expected {least_images(args)} or more {why}")
    return args, checkpoint, parser


def least_images(args: Namespace) -> int:
    """Images that a training step needs: a batch norm behind a linear layer cannot train on one."""
    return 2 if args.fc_norm or RULES[args.train_mode].head else 1


def train(
    args: Namespace,
    net: DirectFeedback,
    train_net: Callable[..., Tensor],
    optimizers: list[torch.optim.Optimizer],
    data: Data,
    run: Run,
) -> None:
    """Train from where `run` is to its last epoch. `train_net` is `net`, or what trains it in many processes.

    Raises:
        RunEndedError: the run ends early; its message and status say how.
    """
    precision = autocast(args, run.device)

    def step(held: Held, weight: float) -> Tensor:
        x, y = data.load(*held)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with precision:
            logits = train_net(x, target=y)
            loss = F.cross_entropy(logits, y)
        values = run.watch(loss, logits, y)
        (loss if weight == 1 else loss * weight).backward()
        for optimizer in optimizers:
            optimizer.step()
        return values

    take_step = as_graph(step, args.batch_size) if args.cuda_graph else step
    with run:
        while run.epoch < run.epochs:
            net.train()
            for held, weight in run.batches():
                rates = learning_rates(args, run.epoch + 1, run.step + 1, run.steps)
                set_learning_rates(rates, optimizers, net)
                run.count(take_step(held, weight), len(held[0]))
            tested = evaluate(net, run.test_batches(), precision)
            angles = measure_angles(net, data.probe, precision)
            run.end_epoch(tested, angles, learning_rates(args, run.epoch + 1, run.steps, run.steps))


def evaluate_or_train(
    args: Namespace,
    checkpoint: dict[str, Any] | None,
    net: DirectFeedback,
    train_net: Callable[..., Tensor],
    optimizers: list[torch.optim.Optimizer],
    data: Data,
    run: Run,
    parser: Parser,
) -> int:
    """Evaluate the net of `checkpoint` where --evaluate asks for it, else train from there; return the exit status."""
    try:
        if args.evaluate and checkpoint is not None:
            load_trained(net.model, checkpoint)
            print_once(in_a_line(evaluate(net, data.test(), autocast(args, run.device)), run.split))
            return 0
        run.begin(checkpoint, vars(args))
    except ValueError as error:
        parser.error(f"{run.folder}: {error}")
    where = f"{data.where}, {run.device}, {plural(world_size(), 'process')}"
    print_once(f"{args.train_mode} on {where}; run folder {run.folder}, from epoch {run.epoch}, step {run.step}")
    try:
        train(args, net, train_net, optimizers, data, run)
        print_once(run.report())
        if args.save_model:
            run.save_model()
    except RunEndedError as error:
        print_once(error, file=sys.stderr)
        return error.status
    finally:
        run.end()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or the one of the error that ended the run."""
    args, checkpoint, parser = parse_arguments(argv)
    reuse_memory()
    set_arithmetic(args.tf32, args.deterministic)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    try:
        if args.classify is not None and checkpoint is not None:
            model = ConvNet(len(checkpoint["classes"]), args.fc_norm).to(device)
            return classify(model, checkpoint, args.classify, resized=IMAGE_SIZE, size=IMAGE_SIZE)
        images = load_images(args.dataset, args.data).to(device)
        if args.validation is not None:
            images = images.hold_out(args.validation)
        args.dataset = images.name
        options: dict[str, Any] = {"least": least_images(args)}
        options["limit"] = 1 if args.dry_run and not args.evaluate else None
        data = whole_images(images, args.batch_size, args.test_batch_size, args.seed, PROBE_IMAGES, **options)
        name = f"{args.dataset}-{args.train_mode}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(args.resume).parent if args.resume else Path(args.out or f"runs/{name}")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    torch.manual_seed(args.seed)
    model = ConvNet(len(data.classes), args.fc_norm).to(device)
    net = wrap(args, model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
    optimizers = make_optimizers(args, net, nesterov=True)
    run = Run(
        folder,
        net,
        optimizers,
        data,
        args,
        model="ConvNet",
        not_kept=NOT_KEPT,
        command="python main.py",
        advice=advice(args),
        log_interval=args.log_interval,
        split="test" if args.validation is None else "validation",
    )
    return evaluate_or_train(args, checkpoint, net, net, optimizers, data, run, parser)


if __name__ == "__main__":
    run_script(main)
