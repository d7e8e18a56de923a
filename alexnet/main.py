"""AlexNet with batch norm on CIFAR-100 or an ImageNet folder, by any rule of feedback/rules, in one process or many.

Run:    python alexnet/main.py --multiprocessing-distributed
Result: at 64x64, 3 epochs: 21.10 % top-1 (n=1; BP 15.40, DFA 10.16), settings and hardware in docs/results-alexnet.md
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import math
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.console import run_script  # first: so Ctrl-C while torch is loaded is a line

# isort: split
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from feedback import RULES
from main import evaluate_or_train
from models import AlexNet
from training.arguments import (
    Parser,
    add_common_arguments,
    advice,
    below_one,
    flag,
    nonnegative_int,
    parse_run_arguments,
    positive_int,
)
from training.augment import resized_side
from training.batches import Data, crops, image_folder
from training.checkpoint import CONTENT, NAMES, TRAINED, load_checkpoint
from training.classify import classify
from training.data import load_images
from training.distributed import barrier, gather, print_once, rank, world_size
from training.launch import check, device_of, launch, processes_per_node, under_torchrun
from training.machine import reuse_memory, set_arithmetic
from training.optim import make_optimizers, wrap
from training.run import DIVERGED, DIVERGED_MARK, Run
from training.stages import Stages, share_among_replicas

BEST = "model_best.pth.tar"  # weights and B after the epoch of the best test accuracy
PROBE_IMAGES = 64  # spread over the training set, on which the angles are measured after each epoch
FIXED_BY_THE_CHECKPOINT: tuple[str, ...] = ("recipe", "arch", "train_mode", "dataset", "b_update", "b_scale")
FIXED_BY_THE_CHECKPOINT += ("seed", "image_size", "fc_norm", "schedule", "b_schedule", "head_width", "head_pool")
# no part of the experiment: not in the checkpoint
OF_THE_RUN = {"out", "resume", "evaluate", "classify", "start_epoch", "workers", "compile", "compile_mode"}
OF_THE_RUN |= {"limit_batches", "cuda_graph"}
OF_THE_STAGES = {"pipeline_stages", "micro_batches"}
OF_THE_PROCESSES = {"world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "gpu", "nprocs_per_node"}
OF_THE_FOLDERS = {"data", "out", "resume", "workers"}  # where a node has them
NOT_KEPT = OF_THE_RUN | OF_THE_STAGES | OF_THE_PROCESSES | {"multiprocessing_distributed"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="alexnet/main.py", description=__doc__)
    parser.set_defaults(cuda_graph=False)
    training, data, run = add_common_arguments(
        parser, epochs=90, lr=0.1, wd=1e-4, b_lr=0.01, b_wd=1e-4, gamma=1.0, b_scale=0.0
    )
    add = training.add_argument
    add("-a", "--arch", choices=("alexnet",), default="alexnet", help="the only one there is: alexnet")
    add(
        "-b",
        "--batch-size",
        type=positive_int,
        default=256,
        metavar="N",
        help="of a node (default: 256)",
    )
    add("--momentum", type=below_one, default=0.9, help="of SGD, below 1 (default: 0.9)")
    add("--compile", action="store_true", help="compile the net with torch.compile")
    add("--compile-mode", choices=("default", "reduce-overhead"), help="of torch.compile (default: default)")
    add("--pipeline-stages", type=positive_int, metavar="P", help="cut the net into P stages, a process each")
    add("--micro-batches", type=positive_int, metavar="M", help="pieces of a batch that pass the stages (default: 1)")
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
    add(
        "--nprocs-per-node",
        type=positive_int,
        metavar="N",
        help="processes of a node (default: number of GPUs, or 1)",
    )
    add("--world-size", type=int, default=-1, metavar="N", help="nodes (processes, if started one by one by hand)")
    add("--rank", type=int, default=-1, metavar="N", help="index of this node (or process)")
    add("--dist-url", metavar="URL", help="where the processes meet (default: a free local port)")
    add("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on CUDA, gloo on a CPU")
    add("--dist-timeout", type=positive_int, default=600, metavar="S", help="seconds to wait for others (default: 600)")
    add("--gpu", type=nonnegative_int, metavar="N", help="the GPU of a single process (default: 0)")
    return parser


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, checkpoint = parse_run_arguments(parser, argv, "AlexNet", FIXED_BY_THE_CHECKPOINT)
    check(args, parser)
    if args.image_size < AlexNet.smallest_image:
        parser.error(f"--image-size: got {args.image_size}, expected {AlexNet.smallest_image} or more")
    if args.deterministic and torch.cuda.is_available() and args.image_size not in AlexNet.exact_images:
        sizes = f"{AlexNet.exact_images.start} to {AlexNet.exact_images.stop - 1}"
        parser.error(f"--deterministic: on a GPU --image-size must be {sizes}, where the last pool has nothing to do")
    if args.workers is not None and args.dataset != "imagenet":
        print("-j is for --dataset imagenet alone: the CIFAR sets lie on the device", file=sys.stderr)
    if args.start_epoch and checkpoint is not None:
        parser.error("--start-epoch does not go with --resume: the checkpoint knows its epoch")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch: got {args.start_epoch}, expected less than --epochs {args.epochs}")
    if args.compile_mode is not None and not args.compile:
        parser.error("--compile-mode needs --compile")
    if args.compile and RULES[args.train_mode].perturbs:
        parser.error(f"--compile does not go with --train-mode {args.train_mode}: forward-mode differentiation")
    if args.compile_mode == "reduce-overhead" and args.b_update == "inplace":
        parser.error(
            "--compile-mode reduce-overhead does not go with --b-update inplace: its graphs may not write to B"
        )
    check_stages(args, parser)
    shares = max(1, processes_per_node(args) // (args.pipeline_stages or 1))
    if args.batch_size < 2 * shares * (args.micro_batches or 1):
        each = f"{shares} replicas' micro-batches" if args.pipeline_stages else f"{shares} processes"
        parser.error(f"-b: got {args.batch_size}, expected 2 or more for each of {each}")
    return args


def check_stages(args: Namespace, parser: Parser) -> None:
    """Refuse flags of stages that do not go together."""
    if args.pipeline_stages is None:
        if args.micro_batches is not None:
            parser.error("--micro-batches needs --pipeline-stages")
        return
    args.micro_batches = args.micro_batches or 1
    if args.pipeline_stages == 1:
        parser.error("--pipeline-stages: got 1, expected 2 or more")
    if RULES[args.train_mode].chained or RULES[args.train_mode].perturbs:
        direct = ", ".join(name for name, rule in RULES.items() if not (rule.chained or rule.perturbs))
        parser.error(f"--pipeline-stages: got --train-mode {args.train_mode}, expected {direct}: e goes to all stages")
    if args.pipeline_stages > len(AlexNet.points):
        parser.error(f"--pipeline-stages: got {args.pipeline_stages}, but {len(AlexNet.points)} blocks have feedback")
    if args.compile:
        parser.error("--compile does not go with --pipeline-stages")
    if args.batch_size % args.micro_batches:
        parser.error(f"--micro-batches: got {args.micro_batches}, expected a divisor of -b {args.batch_size}")


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


def load_data(args: Namespace, device: torch.device) -> Data:
    """Find, fetch or make the data; on every node one process goes first, so that it alone fetches.

    Raises:
        ValueError, OSError: there are none, or they cannot be read.
    """
    options = (args.image_size, global_batch_size(args), args.seed, PROBE_IMAGES)
    if args.dataset == "imagenet":
        workers = math.ceil((4 if args.workers is None else args.workers) / processes_per_node(args))
        return image_folder(Path(args.data).expanduser(), *options, workers, device, args.limit_batches)
    first = int(os.environ.get("LOCAL_RANK", rank() % processes_per_node(args))) == 0
    images = load_images(args.dataset, args.data, "cifar100", 100) if first else None
    names = gather(images.name if images is not None else None)
    if images is None:
        images = load_images(names[0], args.data, "cifar100", 100)
    return crops(images.to(device), *options, args.limit_batches)


def refuse_different_arguments(args: Namespace) -> None:
    """End every process with one line where they were started with other arguments, or sizes of the global batch."""
    shared = {key: value for key, value in vars(args).items() if key not in OF_THE_PROCESSES | OF_THE_FOLDERS}
    shared["batch_size"] = f"{args.batch_size} of a node, {global_batch_size(args)} of all"
    everyone = gather(shared)
    for key in shared:
        values = list(dict.fromkeys(str(other[key]) for other in everyone))
        if len(values) > 1:
            make_parser().error(f"{flag(key)}: the processes have {' and '.join(values)}, expected the same for all")


def work(args: Namespace, device: torch.device, restarted: bool) -> int:
    """What every process does: data, net, optimisers, and the loop. Return its exit status.

    Where torchrun has `restarted` the job, it goes on from its own last checkpoint.
    """
    reuse_memory()
    set_arithmetic(args.tf32, args.deterministic)
    refuse_different_arguments(args)
    if args.pipeline_stages is not None:
        try:
            share_among_replicas(args.pipeline_stages)
        except ValueError as error:
            make_parser().error(str(error))
    mine = run_folder(args)
    # as rank 0 has them: the default name contains the time
    folder, diverged, saved = gather((mine, (mine / DIVERGED_MARK).exists(), (mine / NAMES["AlexNet"]).exists()))[0]
    if restarted and diverged:
        print_once(f"the run in {folder} diverged: it would do so again", file=sys.stderr)
        return DIVERGED
    if restarted and saved and not args.evaluate:
        args.resume, args.start_epoch = str(folder / NAMES["AlexNet"]), 0
    checkpoint = None
    try:
        data = load_data(args, device)
        args.dataset = data.name
        if args.resume is not None:
            checkpoint = load_checkpoint(Path(args.resume), "AlexNet", TRAINED if args.evaluate else CONTENT)
        if len(set(gather((data.fingerprint, checkpoint and checkpoint["epoch"])))) > 1:
            raise ValueError("the processes see other data or checkpoints than each other: are the folders shared?")
    except (ValueError, OSError) as error:
        make_parser().error(str(error))
    barrier()

    torch.manual_seed(args.seed)
    model = AlexNet(len(data.classes), args.fc_norm).to(device)
    net = wrap(args, model, torch.zeros(1, 3, args.image_size, args.image_size, device=device))
    optimizers = make_optimizers(args, net, nesterov=False)
    train_net: Callable[..., Tensor] = net
    stages = None
    if args.pipeline_stages is not None:
        images = global_batch_size(args) * args.pipeline_stages // world_size() // args.micro_batches
        example = data.probe[0][:1].expand(images, -1, -1, -1).contiguous()
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        train_net = stages = Stages(args, net, optimizers, example.to(memory_format=layout))
        print_once(stages.description)
    torch.manual_seed(args.seed + rank())  # dropout: another mask on every rank
    if stages is None and world_size() > 1:
        # (torch 2.6 has no other name for broadcast_buffers.)
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # BatchNorm normalises by each rank's own batch; its running statistics are averaged before they are used
        train_net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        net.compile(mode=args.compile_mode)
    run = Run(
        folder,
        net,
        optimizers,
        data,
        args,
        model="AlexNet",
        not_kept=NOT_KEPT,
        command="the same command and",
        advice=advice(args),
        log_interval=args.print_freq,
        best_name=BEST,
        epoch=args.start_epoch,
        stages=stages,
    )
    return evaluate_or_train(args, checkpoint, net, train_net, optimizers, data, run, make_parser())


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the job's exit status."""
    args = parse_arguments(argv)
    if args.classify is None:
        return launch(args, work)
    try:
        checkpoint = load_checkpoint(Path(args.resume), "AlexNet", TRAINED)
        model = AlexNet(len(checkpoint["classes"]), args.fc_norm).to(device_of(args.gpu or 0))
        return classify(model, checkpoint, args.classify, resized=resized_side(args.image_size), size=args.image_size)
    except (ValueError, OSError) as error:
        make_parser().error(str(error))


if __name__ == "__main__":
    run_script(main)
