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
    add_feedback_arguments,
    folder,
    nonnegative_float,
    nonnegative_int,
    parse_run_arguments,
    positive_int,
    run_script,
    seed,
)
from training.checkpoint import load_checkpoint
from training.data import load_images
from training.distributed import barrier, gather, rank, world_size
from training.images import Source, cifar_source, folder_source
from training.launch import check, launch, processes_per_node, restarts, under_torchrun
from training.loop import Job, evaluate, fit, restore
from training.memory import reuse_memory
from training.run import make_run_folder, write_config
from training.setup import make_optimizers, set_learning_rates, wrap

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PROBE_IMAGES = 64  # spread over the training set, on which the angles are measured after each epoch
FIXED_BY_THE_CHECKPOINT = ("arch", "train_mode", "dataset", "b_update", "b_scale", "seed", "image_size")
# not of the experiment, so not in the checkpoint
OF_THE_RUN = {"out", "resume", "evaluate", "start_epoch", "workers", "compile", "limit_batches"}
OF_THE_PROCESSES = {"world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "gpu", "nprocs_per_node"}
NOT_KEPT = OF_THE_RUN | OF_THE_PROCESSES | {"multiprocessing_distributed"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="alexnet/main.py", description=__doc__)
    parser.set_defaults(schedule="constant")
    add = parser.add_argument
    add(
        "data", nargs="?", default="data", metavar="DATA", help="folder where data are found and kept (default: ./data)"
    )
    add("--dataset", choices=("cifar100", "imagenet", "synthetic"), help="default: cifar100, or synthetic without it")
    add("-a", "--arch", choices=("alexnet",), default="alexnet", help="the only one there is: alexnet")
    add("--image-size", type=positive_int, default=224, metavar="S", help="pixels a side, 63 or more (default: 224)")
    add("--epochs", type=positive_int, default=90, metavar="N", help="epochs in all, resumed ones too (default: 90)")
    add("--start-epoch", type=nonnegative_int, default=0, metavar="N", help="count from this epoch on (default: 0)")
    add(
        "-b",
        "--batch-size",
        type=positive_int,
        default=256,
        metavar="N",
        help="of all a node's processes (default: 256)",
    )
    add("--lr", type=nonnegative_float, default=0.1, help="learning rate of SGD for the weights (default: 0.1)")
    add("--momentum", type=nonnegative_float, default=0.9, help="of SGD, below 1 (default: 0.9)")
    add("--wd", "--weight-decay", type=nonnegative_float, default=1e-4, help="of the weights (default: 1e-4)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast to bfloat16 (default: fp32)")
    add("--channels-last", action="store_true", help="keep feature maps as (N, H, W, C) in memory: faster")
    add("--compile", action="store_true", help="compile the net with torch.compile")
    add("--limit-batches", type=positive_int, metavar="N", help="train on the first N batches of an epoch, test on N")
    add("--seed", type=seed, default=1, help="of weights, B, data order and crops (default: 1)")
    add("-p", "--print-freq", type=positive_int, default=10, metavar="N", help="steps between logs (default: 10)")
    add(
        "-j",
        "--workers",
        type=nonnegative_int,
        metavar="N",
        help="DataLoader workers of the node, imagenet only (default: 4)",
    )
    add("-e", "--evaluate", action="store_true", help="evaluate the --resume checkpoint on the test set and end")
    add("--out", type=folder, metavar="DIR", help="the run's folder (default: runs/alexnet-DATASET-MODE-SEED-TIME)")
    add("--resume", type=folder, metavar="RUN", help="continue from this run's folder, or from a checkpoint file in it")
    processes = parser.add_argument_group("processes").add_argument
    processes("--multiprocessing-distributed", action="store_true", help="one process per GPU, or --nprocs-per-node")
    processes("--nprocs-per-node", type=positive_int, metavar="N", help="default: the number of GPUs, without any 1")
    processes(
        "--world-size", type=int, default=-1, metavar="N", help="nodes (processes, if started one by one by hand)"
    )
    processes("--rank", type=int, default=-1, metavar="N", help="of this node (or process)")
    processes("--dist-url", metavar="URL", help="where the processes meet (default: a free local port)")
    processes("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on CUDA, gloo on a CPU")
    processes(
        "--dist-timeout", type=positive_int, default=600, metavar="S", help="seconds to wait for others (default: 600)"
    )
    processes("--gpu", type=nonnegative_int, metavar="N", help="the GPU of a single process (default: 0)")
    add_feedback_arguments(parser, b_lr=0.01, b_wd=1e-4, gamma=1.0, b_scale=0.0)
    return parser


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Parse and check the command line. After torchrun has restarted the job, it resumes from its own checkpoint."""
    parser = make_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = parser.parse_args(argv) if restarts() > 0 else None
    resumed_by_itself = asked is not None and not asked.evaluate and (run_folder(asked) / CHECKPOINT).exists()
    if resumed_by_itself:
        argv += ["--resume", str(run_folder(asked)), "--start-epoch", "0"]
    args, checkpoint = parse_run_arguments(parser, argv, CHECKPOINT, "AlexNet", FIXED_BY_THE_CHECKPOINT)
    check(args, parser)
    if args.momentum >= 1:
        parser.error(f"--momentum: got {args.momentum}, expected less than 1")
    if args.image_size < AlexNet.smallest_image:
        parser.error(f"--image-size: got {args.image_size}, expected {AlexNet.smallest_image} or more")
    if args.workers is not None and args.dataset != "imagenet":
        print("-j is for --dataset imagenet alone: the CIFAR sets lie on the device", file=sys.stderr)
    if args.evaluate and checkpoint is None:
        parser.error("--evaluate needs --resume: the checkpoint to evaluate")
    if args.start_epoch and checkpoint is not None:
        parser.error("--start-epoch does not go with --resume: the checkpoint knows its epoch")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch: got {args.start_epoch}, expected less than --epochs {args.epochs}")
    if checkpoint is not None and checkpoint["epoch"] >= args.epochs and not args.evaluate:
        done = f"the run in {args.resume} has done its {checkpoint['epoch']} epochs"
        if resumed_by_itself:
            parser.exit(0, f"{done}\n")
        parser.error(f"{done}: raise --epochs to go on")
    if args.batch_size < 2 * processes_per_node(args):
        parser.error(f"-b: got {args.batch_size}, expected 2 or more for each of {processes_per_node(args)} processes")
    return args


def run_folder(args: Namespace) -> Path:
    """The run's folder; under torchrun, the same one after a restart."""
    if args.resume is not None:
        path = Path(args.resume)
        return path.parent if path.is_file() else path
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
            path = Path(args.resume)
            checkpoint = load_checkpoint(path if path.is_file() else path / CHECKPOINT)
        if len(set(gather((source.fingerprint, checkpoint and checkpoint["epoch"])))) > 1:
            raise ValueError("the processes see other data or checkpoints than each other: are the folders shared?")
        if rank() == 0 and checkpoint is None:
            make_run_folder(run, CHECKPOINT)
    except (ValueError, OSError) as error:
        make_parser().error(str(error))
    barrier()

    torch.manual_seed(args.seed)
    model = AlexNet(source.num_classes).to(device)
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
        settings={key: value for key, value in vars(args).items() if key not in NOT_KEPT},
        data=source.fingerprint,
        model_name="AlexNet",
        command=f"the same command and --resume {run}",
        checkpoint_name=CHECKPOINT,
        best_name=BEST,
        bfloat16=args.precision == "bf16",
        log_interval=args.print_freq,
        epoch=args.start_epoch,
    )
    try:
        if checkpoint is not None:
            restore(job, checkpoint)
        if rank() == 0 and not args.evaluate:
            write_config(run, vars(args), source.where, device)
    except (ValueError, OSError) as error:
        make_parser().error(f"{run}: {error}")
    if args.evaluate:
        metrics = evaluate(job)
        if rank() == 0:
            top1, top5 = metrics["test_accuracy"], metrics["test_top5_accuracy"]
            print(f"test accuracy {top1:.2f} % top-1, {top5:.2f} % top-5; loss {metrics['test_loss']:.4f}")
        return 0
    del checkpoint
    if rank() == 0:
        world = f"{world_size()} process{'es' if world_size() > 1 else ''}"
        print(
            f"{args.train_mode} on {source.where}, {device}, {world}; run folder {run}, "
            f"from epoch {job.epoch}, step {job.tally['step']}",
            flush=True,
        )
    return fit(job)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the job's exit status."""
    return launch(parse_arguments(argv), work)


if __name__ == "__main__":
    run_script(main)
