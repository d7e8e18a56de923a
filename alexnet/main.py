"""AlexNet with batch norm on CIFAR-100 or an ImageNet folder, by BP, FA, KP, DFA, DKP or LAS, in one process or many.

Run:    python alexnet/main.py --multiprocessing-distributed
Result: at 64x64, 5 epochs: 25.30 % top-1 (n=1; BP 23.39, DFA 12.74), settings and hardware in README.md
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import functools
import itertools
import math
import os
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import AlexNet
from training.arguments import (
    Parser,
    add_common_arguments,
    advice,
    nonnegative_float,
    nonnegative_int,
    parse_run_arguments,
    positive_int,
    run_script,
)
from training.augment import resized_side
from training.checkpoint import CONTENT, NAMES, TRAINED, load_checkpoint, save_checkpoint, trained_state
from training.classify import classify
from training.data import load_images
from training.distributed import barrier, gather, rank, world_size
from training.images import Source, cifar_source, folder_source
from training.launch import check, device_of, launch, processes_per_node, restarts, under_torchrun
from training.loop import Job, evaluate, fit, restore, test_line
from training.memory import reuse_memory
from training.run import make_run_folder, write_config
from training.setup import make_optimizers, set_learning_rates, wrap

BEST = "model_best.pth.tar"  # weights and B after the epoch of the best test accuracy
PROBE_IMAGES = 64  # spread over the training set, on which the angles are measured after each epoch
FIXED_BY_THE_CHECKPOINT = ("recipe", "arch", "train_mode", "dataset", "b_update", "b_scale", "seed", "image_size")
# not of the experiment, so not in the checkpoint
OF_THE_RUN = {"out", "resume", "evaluate", "classify", "start_epoch", "workers", "compile", "limit_batches"}
OF_THE_PROCESSES = {"world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "gpu", "nprocs_per_node"}
NOT_KEPT = OF_THE_RUN | OF_THE_PROCESSES | {"multiprocessing_distributed"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="alexnet/main.py", description=__doc__)
    parser.set_defaults(schedule="constant")
    common = {"epochs": 90, "lr": 0.1, "wd": 1e-4, "b_lr": 0.01, "b_wd": 1e-4, "gamma": 1.0, "b_scale": 0.0}
    training, data, run = add_common_arguments(parser, **common)
    add = training.add_argument
    add("-a", "--arch", choices=("alexnet",), default="alexnet", help="the only one there is: alexnet")
    add("-b", "--batch-size", type=positive_int, default=256, metavar="N", help="of a node's processes (default: 256)")
    add("--momentum", type=nonnegative_float, default=0.9, help="of SGD, below 1 (default: 0.9)")
    add("--compile", action="store_true", help="compile the net with torch.compile")
    add = data.add_argument
    add("data", nargs="?", default="data", metavar="DATA", help="where data are found and kept (default: ./data)")
    add("--dataset", choices=("cifar100", "imagenet", "synthetic"), help="default: cifar100, or synthetic without it")
    add("--image-size", type=positive_int, default=224, metavar="S", help="pixels a side, 63 or more (default: 224)")
    add("-j", "--workers", type=nonnegative_int, metavar="N", help="a node's workers for imagenet (default: 4)")
    add("--limit-batches", type=positive_int, metavar="N", help="train on the first N batches of an epoch, test on N")
    add = run.add_argument
    add("--start-epoch", type=nonnegative_int, default=0, metavar="N", help="count from this epoch on (default: 0)")
    add("-p", "--print-freq", type=positive_int, default=10, metavar="N", help="steps between logs (default: 10)")
    add = parser.add_argument_group("processes").add_argument
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU, or --nprocs-per-node")
    add("--nprocs-per-node", type=positive_int, metavar="N", help="default: the number of GPUs, without any 1")
    add("--world-size", type=int, default=-1, metavar="N", help="nodes (processes, if started one by one by hand)")
    add("--rank", type=int, default=-1, metavar="N", help="of this node (or process)")
    add("--dist-url", metavar="URL", help="where the processes meet (default: a free local port)")
    add("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on CUDA, gloo on a CPU")
    add("--dist-timeout", type=positive_int, default=600, metavar="S", help="seconds to wait for others (default: 600)")
    add("--gpu", type=nonnegative_int, metavar="N", help="the GPU of a single process (default: 0)")
    return parser


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Parse and check the command line. After torchrun has restarted the job, it resumes from its own checkpoint."""
    parser = make_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = parser.parse_args(argv) if restarts() > 0 else None
    if asked is not None and not asked.evaluate and (run_folder(asked) / NAMES["AlexNet"]).exists():
        argv += ["--resume", str(run_folder(asked)), "--start-epoch", "0"]
    args, checkpoint = parse_run_arguments(parser, argv, "AlexNet", FIXED_BY_THE_CHECKPOINT)
    check(args, parser)
    if args.momentum >= 1:
        parser.error(f"--momentum: got {args.momentum}, expected less than 1")
    if args.image_size < AlexNet.smallest_image:
        parser.error(f"--image-size: got {args.image_size}, expected {AlexNet.smallest_image} or more")
    if args.workers is not None and args.dataset != "imagenet":
        print("-j is for --dataset imagenet alone: the CIFAR sets lie on the device", file=sys.stderr)
    if args.start_epoch and checkpoint is not None:
        parser.error("--start-epoch does not go with --resume: the checkpoint knows its epoch")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch: got {args.start_epoch}, expected less than --epochs {args.epochs}")
    if args.batch_size < 2 * processes_per_node(args):
        parser.error(f"-b: got {args.batch_size}, expected 2 or more for each of {processes_per_node(args)} processes")
    return args


def run_folder(args: Namespace) -> Path:
    """The run's folder; under torchrun, the same one after a restart."""
    if args.resume is not None:
        return Path(args.resume).parent
    stamp = time.strftime("%Y%m%d-%H%M%S")
    if under_torchrun():
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        stamp = run_id if run_id != "none" else f"torchrun{os.getppid()}"
    name = f"alexnet-{args.dataset or 'cifar100'}-{args.train_mode}-seed{args.seed}-{stamp}"
    return Path(args.out or f"runs/{name}")


def global_batch_size(args: Namespace) -> int:
    """Images per step of all the processes of all nodes."""
    return args.batch_size * world_size() // processes_per_node(args)


def load_source(args: Namespace, device: torch.device) -> Source:
    """Find, fetch or make the data; on every node one process goes first, so that it alone fetches.

    Raises:
        ValueError, OSError: there are none, or they cannot be read.
    """
    batch_size = global_batch_size(args)
    if args.dataset == "imagenet":
        workers = math.ceil((4 if args.workers is None else args.workers) / processes_per_node(args))
        return folder_source(Path(args.data), args.image_size, batch_size, args.seed, PROBE_IMAGES, workers, device)
    first = int(os.environ.get("LOCAL_RANK", rank() % processes_per_node(args))) == 0
    data = load_images(args.dataset, args.data, "cifar100", 100) if first else None
    names = gather(data.name if data is not None else None)
    if data is None:
        data = load_images(names[0], args.data, "cifar100", 100)
    return cifar_source(data.to(device), args.image_size, batch_size, args.seed, PROBE_IMAGES)


def work(args: Namespace, device: torch.device) -> int:
    """What every process does: data, net, optimisers, and the loop. Return its exit status."""
    reuse_memory()
    run = Path(gather(str(run_folder(args)))[0])  # where it is named by the time, rank 0's
    checkpoint = None
    try:
        source = load_source(args, device)
        args.dataset = source.name
        if args.resume is not None:
            checkpoint = load_checkpoint(Path(args.resume), "AlexNet", TRAINED if args.evaluate else CONTENT)
        if len(set(gather((source.fingerprint, checkpoint and checkpoint["epoch"])))) > 1:
            raise ValueError("the processes see other data or checkpoints than each other: are the folders shared?")
        if rank() == 0 and checkpoint is None:
            make_run_folder(run, "AlexNet")
    except (ValueError, OSError) as error:
        make_parser().error(str(error))
    barrier()

    torch.manual_seed(args.seed)
    model = AlexNet(len(source.classes)).to(device)
    example = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
    if args.channels_last:
        model, example = model.to(memory_format=torch.channels_last), example.to(memory_format=torch.channels_last)
    net = wrap(args, model, example)
    optimizers = make_optimizers(args, net, nesterov=False)
    torch.manual_seed(args.seed + rank())  # dropout: another mask on every rank
    train_net = net
    if world_size() > 1:
        # (torch 2.6 has no other name for broadcast_buffers.)
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # BatchNorm normalises by each rank's own batch; its running statistics are averaged before they are used
        train_net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        net.compile()
    steps = math.ceil(source.train_images / global_batch_size(args))
    steps = min(steps, args.limit_batches or steps)
    job = Job(
        net=net,
        train_net=train_net,
        optimizers=optimizers,
        set_learning_rates=functools.partial(set_learning_rates, args, net, optimizers, steps),
        train_batches=source.train_batches,
        test_batches=lambda: itertools.islice(source.test_batches(), args.limit_batches),
        probe=source.probe,
        train_images=source.train_images,
        steps=steps,
        epochs=args.epochs,
        folder=run,
        classes=source.classes,
        settings={key: value for key, value in vars(args).items() if key not in NOT_KEPT},
        data=source.fingerprint,
        model_name="AlexNet",
        command=f"the same command and --resume {run}",
        advice=advice(args),
        best_name=BEST,
        bfloat16=args.precision == "bf16",
        log_interval=args.print_freq,
        epoch=args.start_epoch,
    )
    try:
        if args.evaluate:
            model.load_state_dict(trained_state(checkpoint))
            line = test_line(job, evaluate(job))
            if rank() == 0:
                print(line)
            return 0
        if checkpoint is not None:
            restore(job, checkpoint)
        if rank() == 0:
            write_config(run, vars(args), source.where, device)
    except (ValueError, RuntimeError, OSError) as error:
        make_parser().error(f"{run}: {error}")
    del checkpoint
    if rank() == 0:
        world = "1 process" if world_size() == 1 else f"{world_size()} processes"
        print(
            f"{args.train_mode} on {source.where}, {device}, {world}; run folder {run}, "
            f"from epoch {job.epoch}, step {job.tally['step']}",
            flush=True,
        )
    status = fit(job)
    if status == 0 and args.save_model and rank() == 0:
        save_checkpoint(run / "model.pt", model.state_dict())
        print(f"see {run / 'model.pt'}")
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the job's exit status."""
    args = parse_arguments(argv)
    if args.classify is None:
        return launch(args, work)
    try:
        checkpoint = load_checkpoint(Path(args.resume), "AlexNet", TRAINED)
        model = AlexNet(len(checkpoint["classes"])).to(device_of(args.gpu or 0))
        return classify(model, checkpoint, args.classify, resized=resized_side(args.image_size), size=args.image_size)
    except (ValueError, OSError) as error:
        make_parser().error(str(error))


if __name__ == "__main__":
    run_script(main)
