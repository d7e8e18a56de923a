"""A ResNet-20 and a VGG-11 on CIFAR-10 by each rule: does direct feedback hold where nets get deep?

Run:    python examples/deep_nets.py --epochs 1
Result: docs/results-deep.md
Source: He, Zhang, Ren, Sun 2016; Simonyan, Zisserman 2015, for 32x32 images

The points of the ResNet are every second of its residual blocks, since the skips lead around whatever is within one.
Those of the VGG are its eight convolutions. Images are flipped at random; SGD with Nesterov momentum, one-cycle, and
Adam for B or the heads.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.char_gpt import append_row
from examples.resnet import Residual
from feedback import DirectFeedback, alignment
from training.data import load_images, normalise
from training.machine import reuse_memory

BATCH, PROBE = 128, 256
# the learning rates of W and of B or the heads, and the factor on B's start: best of two to eight on held-out images
SETTINGS: dict[str, dict[str, tuple[float, float | None, float | None]]] = {
    "resnet20": {
        "BP": (0.1, None, None),
        "LAS": (0.005, 3e-5, 0.0),
        "DKP": (0.002, 1e-5, 0.0),
        "DFA": (0.02, None, 0.1),
        "HEAD": (0.1, 3e-3, None),
        "LOCAL": (0.1, 3e-3, None),
    },
    "vgg11": {
        "BP": (0.02, None, None),
        "LAS": (0.02, 3e-4, 1.0),
        "DKP": (0.02, 3e-4, 1.0),
        "DFA": (0.02, None, 1.0),
        "HEAD": (0.02, 3e-4, None),
        "LOCAL": (0.02, 3e-4, None),
    },
}
RULES_SHOWN = tuple(SETTINGS["vgg11"])


def resnet20() -> tuple[nn.Sequential, list[str]]:
    """The net, and its points: behind the residual blocks 1, 3, 5, 7 and 9."""
    blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    inputs = 16
    for number in range(9):
        outputs = (16, 32, 64)[number // 3]
        blocks.append(Residual(inputs, outputs, stride=outputs // inputs))
        inputs = outputs
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*blocks, last), ["1", "3", "5", "7", "9"]


def vgg11() -> tuple[nn.Sequential, list[str]]:
    """The net with batch norm, and its points: its convolutions, with the max-pool that follows."""
    blocks: list[nn.Module] = []
    inputs = 3
    for outputs, pools in zip((64, 128, 256, 256, 512, 512, 512, 512), (1, 1, 0, 1, 0, 1, 0, 1), strict=True):
        block = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        if pools:
            block.append(nn.MaxPool2d(2))
        blocks.append(block)
        inputs = outputs
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(512, 10))), [str(i) for i in range(8)]


NETS = {"resnet20": resnet20, "vgg11": vgg11}


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of right answers on images (N, 3, 32, 32) uint8."""
    net.eval()
    right = sum((net(prepared(a)).argmax(1) == b).sum() for a, b in zip(x.split(1000), y.split(1000), strict=True))
    net.train()
    return 100 * int(right) / len(y)


def prepared(x: Tensor) -> Tensor:
    """Images (N, 3, 32, 32) uint8 as the nets take them."""
    return normalise(x).to(memory_format=torch.channels_last)


def scaled_start(feedback_KD: Tensor, scale: float) -> None:
    """B's default start, times `scale`."""
    nn.init.kaiming_uniform_(feedback_KD)
    with torch.no_grad():
        feedback_KD.mul_(scale)


def train(name: str, rule: str, args: argparse.Namespace) -> dict[str, object]:
    """Train a net by `rule`; return a row of the table."""
    lr, b_lr, b_scale = SETTINGS[name][rule]
    lr = lr if args.lr is None else args.lr
    b_lr = b_lr if args.b_lr is None else args.b_lr
    b_scale = b_scale if args.b_scale is None else args.b_scale
    images = load_images("synthetic" if args.synthetic else "cifar10", args.data)
    images = images.hold_out(5000) if args.validation else images
    torch.manual_seed(args.seed)
    model, points = NETS[name]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    init = None if b_scale is None else partial(scaled_start, scale=b_scale)
    net = DirectFeedback(model, points, rule, prepared(images.x_train[:2]), init=init)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    ]
    if b_lr is not None:
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), b_lr))
    steps = args.epochs * -(-len(images.x_train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], lr, steps, cycle_momentum=False)
    start, total, seen = time.perf_counter(), 0.0, 0
    for _ in range(args.epochs):
        total, seen = 0.0, 0
        for index in torch.randperm(len(images.x_train)).split(BATCH):
            x, y = prepared(images.x_train[index]), images.y_train[index]
            x = torch.where((torch.rand(len(x)) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x, target=y), y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
            total, seen = total + loss.item() * len(y), seen + len(y)
    seconds = (time.perf_counter() - start) / args.epochs
    probe = prepared(images.x_train[:PROBE])
    angles = alignment(net, probe, images.y_train[:PROBE])
    right = accuracy(net, images.x_test, images.y_test)
    with torch.no_grad():
        model.eval()
        size = model[:-1](probe).abs().mean().item()
    row: dict[str, object] = {"net": name, "rule": rule, "lr": lr, "b_lr": b_lr, "b_scale": b_scale}
    row |= {"epochs": args.epochs, "seed": args.seed, "images": "held out" if args.validation else "test"}
    row |= {"train_loss": round(total / seen, 4), "accuracy": round(right, 2)}
    row |= {
        "activation": float(f"{size:.3g}"),
        "angles": " ".join(f"{angles[point]['alignment_deg']:.1f}" for point in points),
    }
    return row | {"seconds": round(seconds, 1), "torch": torch.__version__}


def main() -> None:
    """Train by each rule and print the table; add to a csv if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--rules", nargs="+", choices=RULES_SHOWN, default=list(RULES_SHOWN))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, help="of the weights, by SGD (default: SETTINGS)")
    parser.add_argument("--b-lr", type=float, help="of B or the heads, by Adam (default: SETTINGS)")
    parser.add_argument("--b-scale", type=float, help="factor on B's random start (default: SETTINGS)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder where CIFAR-10 is found and kept")
    parser.add_argument("--synthetic", action="store_true", help="the built-in set instead, to see that it runs")
    parser.add_argument("--validation", action="store_true", help="hold out 5,000 training images and test on them")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    parser.add_argument("--csv", type=Path, help="file to which the rows are added")
    args = parser.parse_args()
    for flag, given, place in (("--b-lr", args.b_lr, 1), ("--b-scale", args.b_scale, 2)):
        if given is not None and any(SETTINGS["vgg11"][rule][place] is None for rule in args.rules):
            parser.error(f"{flag}: not every one of {', '.join(args.rules)} has what it sets")
    reuse_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    print("| net | rule | training loss | accuracy, % | last activation | angles, degrees | seconds an epoch |")
    print("|---|---|---|---|---|---|---|")
    for name in args.nets:
        for rule in args.rules:
            row = train(name, rule, args)
            shown = ("net", "rule", "train_loss", "accuracy", "activation", "angles", "seconds")
            print("| " + " | ".join(str(row[key]) for key in shown) + " |", flush=True)
            if args.csv:
                append_row(args.csv, row)


if __name__ == "__main__":
    main()
