"""What each rank of tests/test_distributed.py runs; a module of its own, so that spawned processes can import it."""

import itertools
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import main
from feedback import RULES, DirectFeedback
from training.batches import Data
from training.launch import LAST_TENSORS_S
from training.run import DivergedError, Run, StoppedError

POINTS = ("0", "2")


def make_net(rule, options):
    """A conv net with BatchNorm in eval mode, as the equality of many ranks and one needs it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 7), nn.ReLU()),
        nn.Linear(7, 3),
    ).double()
    net = DirectFeedback(model, POINTS, rule, torch.zeros(1, 3, 6, 6, dtype=torch.float64), **options)
    model[0][1].eval()
    return net


def train(net, train_net, rank, world, steps, folder, nan_at=None, signal_in_test=None):
    """An epoch of main.py's loop on this rank's share of the same batches of 6 and, in every third step, 5 images.

    But not by LAS and DRTP: what they make of the labels is a mean over a rank's images, whatever their share. In step
    `nan_at` the images of rank 1 are NaN. Rank 1 has three test batches, and gets a signal at number `signal_in_test`.
    """
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def batches(epoch, seen):
        net.model[0][1].eval()
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            images = 5 if step % 3 == 2 and not RULES[net.rule].needs_target else 6
            x = torch.randn(images, 3, 6, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (images,), generator=generator)
            mine = slice(images * rank // world, images * (rank + 1) // world)
            factor = torch.nan if step == nan_at and rank == 1 else 1
            yield (x[mine] * factor, y[mine]), images

    def test_batches():
        for number, (batch, images) in enumerate(itertools.islice(batches(1, 0), 1 if rank == 0 else 3)):
            if number == signal_in_test and rank == 1:
                signal.raise_signal(signal.SIGTERM)
            yield *batch, images

    data = Data(
        name="random",
        where="random",
        classes=["a", "b", "c"],
        images=6 * steps,
        steps_after=lambda seen: steps,
        train=batches,
        load=lambda x, y: (x, y),
        test=test_batches,
        probe=next(batches(1, 0))[0],
        fingerprint="",
    )
    args = Namespace(
        epochs=1, lr=0.02, schedule="constant", train_mode=net.rule, precision="fp32", gamma=1, b_schedule="constant"
    )
    args.b_lr, args.cuda_graph = net.feedback_lr or args.lr, False
    optimizers = [torch.optim.SGD(learned, 0.02, momentum=0.9, weight_decay=0.01, fused=True)]
    kept = {"not_kept": set(), "command": "", "advice": "", "log_interval": 10}
    run = Run(Path(folder), net, optimizers, data, args, model="ConvNet", **kept)
    main.train(args, net, train_net, optimizers, data, run)
    return run.rows[0]["train_loss"], run.rows[0]["train_accuracy"]


def run(rank, world, port, modes, steps, folder):
    """Train each mode as `rank` under DistributedDataParallel; write the state dicts to `folder`."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name, (rule, options) in modes.items():
        net = make_net(rule, options)
        metrics = train(net, DistributedDataParallel(net), rank, world, steps, folder)
        torch.save({"net": net.state_dict(), "metrics": metrics}, f"{folder}/{name}-{rank}.pt")
    net = make_net("DKP", {})
    try:
        train(net, DistributedDataParallel(net), rank, world, steps, folder, nan_at=3)
    except DivergedError as error:
        Path(f"{folder}/diverged-{rank}.txt").write_text(str(error))
    try:
        net = make_net("DKP", {})
        train(net, DistributedDataParallel(net), rank, world, steps, folder, signal_in_test=2)
    except StoppedError as error:
        Path(f"{folder}/stopped-{rank}.txt").write_text(f"{error.status} {error}")
    dist.destroy_process_group()
    time.sleep(LAST_TENSORS_S)
