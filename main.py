"""2-conv/2-FC net on CIFAR-10, trained by BP, DFA or DKP.

Run:    python main.py --train-mode DKP --batch-size 50 --epochs 100
Source: Webster, Choi, Ahn, "Learning the connections in direct feedback alignment", 2020
"""

import contextlib
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from feedback import RULES, UPDATES, DirectFeedback, alignment
from models import ConvNet
from training.arguments import Parser, nonnegative_float, positive_int, seed
from training.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from training.data import ImageSet, batches, epoch_order, load_images
from training.run import StopRequest, make_run_folder, stop_on_signal, write_config, write_metrics

Optimizers = list[torch.optim.Optimizer]
PROBE_IMAGES = 256  # the first training images, on which the angles are measured after each epoch
B_LR_DEFAULTS = {"optimizer": 1e-4, "inplace": 5e-3}  # the original's for Adam; W's step lr / (1 - momentum)
B_OPTIONS_DEFAULTS = {"b_wd": 1e-6, "gamma": 0.8}
FIXED_BY_THE_CHECKPOINT = ("train_mode", "dataset", "b_update", "batch_size", "seed", "precision", "dry_run")


def make_parser() -> Parser:
    parser = Parser(prog="main.py", description=__doc__)
    add = parser.add_argument
    add("--train-mode", choices=RULES, default="DKP", help="learning rule (default: DKP)")
    add("--dataset", choices=("cifar10", "synthetic"), help="default: cifar10; synthetic if it cannot be had")
    add("--data", default="data", metavar="DIR", help="folder where data are found and kept (default: ./data)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="training images per step (default: 64)")
    add("--test-batch-size", type=positive_int, default=1000, metavar="N", help="images per test batch (default: 1000)")
    add("--epochs", type=positive_int, default=100, metavar="N", help="epochs in all, resumed ones too (default: 100)")
    add("--lr", type=nonnegative_float, default=5e-4, help="learning rate of SGD for the weights (default: 5e-4)")
    add("--wd", type=nonnegative_float, default=1e-6, help="weight decay of the weights (default: 1e-6)")
    add("--b-update", choices=UPDATES, help="DKP: how B learns, by Adam or in the backward pass (default: optimizer)")
    add("--b-lr", type=nonnegative_float, help="DKP: learning rate of B (default: 1e-4 for Adam, 5e-3 in place)")
    add("--b-wd", type=nonnegative_float, help="DKP: weight decay of B (default: 1e-6)")
    add("--gamma", type=nonnegative_float, help="DKP: factor on B's learning rate after each epoch (default: 0.8)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast to bfloat16 (default: fp32)")
    add("--seed", type=seed, default=1, help="of weights, B and data order (default: 1)")
    add("--no-cuda", action="store_true", help="train on the CPU even where there is a GPU")
    add("--dry-run", action="store_true", help="one training step and one test batch, to see that all is in place")
    add("--log-interval", type=positive_int, default=10, metavar="N", help="steps between logs (default: 10)")
    add("--save-model", action="store_true", help="at the end, write the bare net's state dict to model.pt")
    add("--out", metavar="DIR", help="the run's folder (default: runs/DATASET-MODE-SEED-TIME)")
    add("--resume", metavar="RUN", help="continue the run in this folder; its arguments hold unless given anew")
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[Namespace, dict[str, Any] | None, Parser]:
    """Parse the command line; with --resume, over the defaults of that run's own arguments and with its checkpoint."""
    parser = make_parser()
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume is not None:
        if args.out is not None:
            parser.error("--out does not go with --resume: the run goes on in its own folder")
        try:
            checkpoint = load_checkpoint(Path(args.resume) / "checkpoint.pt")
        except ValueError as error:
            parser.error(str(error))
        if checkpoint["model"] != "ConvNet":
            parser.error(f"{args.resume} is a run of {checkpoint['model']}, expected ConvNet")
        saved = checkpoint["args"]
        parser.set_defaults(**{key: value for key, value in saved.items() if key not in ("out", "resume")})
        args = parser.parse_args(argv)
        for key in FIXED_BY_THE_CHECKPOINT:
            if getattr(args, key) != saved[key]:
                flag = "--" + key.replace("_", "-")
                parser.error(f"{flag}: the run in {args.resume} has {saved[key]}, got {getattr(args, key)}")
        if checkpoint["epoch"] >= args.epochs:
            parser.error(f"the run in {args.resume} has done its {checkpoint['epoch']} epochs: raise --epochs to go on")
    if args.train_mode == "DKP":
        args.b_update = args.b_update or "optimizer"
        for key, default in {"b_lr": B_LR_DEFAULTS[args.b_update], **B_OPTIONS_DEFAULTS}.items():
            if getattr(args, key) is None:
                setattr(args, key, default)
    else:
        for key in ("b_update", "b_lr", "b_wd", "gamma"):
            if getattr(args, key) is not None:
                flag = "--" + key.replace("_", "-")
                parser.error(f"{flag} needs --train-mode DKP, got {args.train_mode}: B is not trained")
    return args, checkpoint, parser


def make_net(args: Namespace, num_classes: int, device: torch.device) -> DirectFeedback:
    model = ConvNet(num_classes).to(device)
    inplace = {}
    if args.b_update == "inplace":
        inplace = {"update": "inplace", "feedback_lr": args.b_lr, "feedback_weight_decay": args.b_wd}
    return DirectFeedback(model, model.points, args.train_mode, torch.zeros(1, 3, 32, 32, device=device), **inplace)


def make_optimizers(args: Namespace, net: DirectFeedback) -> Optimizers:
    optimizers: Optimizers = [
        torch.optim.SGD(net.model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.wd, fused=True)
    ]
    if args.b_update == "optimizer":
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), args.b_lr, weight_decay=args.b_wd, fused=True))
    return optimizers


def set_learning_rates(args: Namespace, net: DirectFeedback, optimizers: Optimizers, epoch: int) -> float | None:
    """Set the learning rates of `epoch`, 1 for the first; return B's, decayed by gamma an epoch, or None without it."""
    b_lr = args.b_lr * args.gamma ** (epoch - 1) if args.train_mode == "DKP" else None
    for optimizer, lr in zip(optimizers, (args.lr, b_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
    if args.b_update == "inplace":
        net.feedback_lr = b_lr
    return b_lr


def new_tally() -> dict[str, Any]:
    """What an epoch sums up so far: steps, images, their summed loss, how many were right, seconds of training."""
    return {"step": 0, "images": 0, "loss": 0.0, "correct": 0, "seconds": 0.0}


def save(folder: Path, state: dict[str, Any], net: DirectFeedback, optimizers: Optimizers) -> None:
    """Write the run's checkpoint: `state` (plain data), the net with B, the optimisers, the random numbers."""
    tensors = {"net": net.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    save_checkpoint(folder / "checkpoint.pt", state | tensors | {"rng": rng_state()})


def restore(checkpoint: dict[str, Any], net: DirectFeedback, optimizers: Optimizers) -> None:
    """Put back what `save` wrote of the net, the optimisers and the random numbers."""
    net.load_state_dict(checkpoint["net"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    set_rng_state(checkpoint["rng"])


class NonFiniteLossError(Exception):
    """The training loss was infinite or NaN; nothing has been updated with it."""


def train_epoch(
    args: Namespace,
    net: DirectFeedback,
    optimizers: Optimizers,
    data: ImageSet,
    epoch: int,
    tally: dict[str, Any],
    stop: StopRequest,
    writer: SummaryWriter,
) -> None:
    """Train from step `tally["step"]` of the epoch to its end or, earlier, to a stop request; sum up in `tally`.

    Raises:
        NonFiniteLossError: before the update of W and of B.
    """
    images = len(data.x_train)
    steps = math.ceil(images / args.batch_size)
    order = epoch_order(images, args.seed, epoch)[tally["images"] :].to(data.x_train.device)
    precision = torch.autocast(order.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    started = time.perf_counter() - tally["seconds"]
    net.train()
    title = f"epoch {epoch}/{args.epochs}"
    with tqdm(total=images, initial=tally["images"], desc=title, unit="image", leave=False, disable=None) as bar:
        for x, y in batches(data.x_train, data.y_train, args.batch_size, order):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with precision:
                logits = net(x)
                loss = F.cross_entropy(logits, y)
            loss_value = loss.item()
            if not math.isfinite(loss_value):
                raise NonFiniteLossError(f"the loss is {loss_value} at epoch {epoch}, step {tally['step'] + 1}")
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

            tally["step"] += 1
            tally["images"] += len(y)
            tally["loss"] += loss_value * len(y)
            tally["correct"] += int((logits.argmax(1) == y).sum())
            tally["seconds"] = time.perf_counter() - started
            bar.update(len(y))
            if tally["step"] % args.log_interval == 0 or tally["step"] == steps:
                accuracy = 100 * tally["correct"] / tally["images"]
                bar.set_postfix_str(f"loss {tally['loss'] / tally['images']:.3f}, accuracy {accuracy:.1f} %")
                writer.add_scalar("step/train_loss", loss_value, (epoch - 1) * steps + tally["step"])
            if stop.signal is not None or args.dry_run:
                return


@torch.no_grad()
def evaluate(args: Namespace, net: DirectFeedback, data: ImageSet) -> tuple[float, float]:
    """Mean loss and accuracy in percent over the test images; in a dry run, over the first batch."""
    net.eval()
    precision = torch.autocast(data.x_test.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    loss, correct, images = 0.0, 0, 0
    for x, y in batches(data.x_test, data.y_test, args.test_batch_size):
        with precision:
            logits = net(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
        images += len(y)
        if args.dry_run:
            break
    return loss / images, 100 * correct / images


def report(
    args: Namespace, epoch: int, tally: dict[str, Any], test: tuple[float, float], b_lr: float | None, angles: dict
) -> dict[str, float | None]:
    """Print the line of a finished epoch and return its row of metrics.csv; accuracies are in percent."""
    row = {
        "epoch": epoch,
        "train_loss": tally["loss"] / tally["images"],
        "train_accuracy": 100 * tally["correct"] / tally["images"],
        "test_loss": test[0],
        "test_accuracy": test[1],
        "lr": args.lr,
        "feedback_lr": b_lr,
        "seconds": tally["seconds"],
    }
    row |= {f"{key}_{point}": value for point, values in angles.items() for key, value in values.items()}
    degrees = " ".join(f"{point} {values['alignment_deg']:.1f}" for point, values in angles.items())
    print(
        f"epoch {epoch}/{args.epochs}: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2f} %; "
        f"test loss {test[0]:.4f}, accuracy {test[1]:.2f} %; angle to BP in degrees {degrees}; {row['seconds']:.0f} s",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 where the loss is not finite, 128 + a signal that stopped it."""
    args, checkpoint, parser = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    try:
        data = load_images(args.dataset, args.data).to(device)
        args.dataset = data.name
        name = f"{args.dataset}-{args.train_mode}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(args.resume or args.out or f"runs/{name}")
        if checkpoint is None:
            make_run_folder(folder)
        write_config(folder, vars(args), data.source, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    torch.manual_seed(args.seed)
    net = make_net(args, data.num_classes, device)
    optimizers = make_optimizers(args, net)
    state: dict[str, Any] = {"model": "ConvNet", "args": vars(args), "epoch": 0, "rows": [], "tally": new_tally()}
    if checkpoint is not None:
        restore(checkpoint, net, optimizers)
        state |= {key: checkpoint[key] for key in ("epoch", "rows", "tally")}
    probe = next(batches(data.x_train, data.y_train, PROBE_IMAGES))
    steps = 1 if args.dry_run else math.ceil(len(data.x_train) / args.batch_size)
    print(f"{args.train_mode} on {data.source}, {device}; run folder {folder}", flush=True)

    writer = SummaryWriter(folder, purge_step=state["epoch"] * steps + state["tally"]["step"] + 1)
    with stop_on_signal() as stop, contextlib.closing(writer):
        save(folder, state, net, optimizers)
        while state["epoch"] < (1 if args.dry_run else args.epochs) and stop.signal is None:
            epoch, tally = state["epoch"] + 1, state["tally"]
            b_lr = set_learning_rates(args, net, optimizers, epoch)
            try:
                train_epoch(args, net, optimizers, data, epoch, tally, stop, writer)
            except NonFiniteLossError as error:
                print(f"{error}: stopped before the update. The last good state is kept in {folder}", file=sys.stderr)
                return 1
            if tally["step"] == steps:
                test = evaluate(args, net, data)
                state["rows"].append(report(args, epoch, tally, test, b_lr, alignment(net.train(), *probe)))
                state |= {"epoch": epoch, "tally": new_tally()}
                write_metrics(folder / "metrics.csv", state["rows"])
                for key, value in state["rows"][-1].items():
                    if value is not None:
                        writer.add_scalar(f"epoch/{key}", value, epoch * steps)
            save(folder, state, net, optimizers)

    if stop.signal is not None and state["epoch"] < args.epochs:
        where = f"epoch {state['epoch'] + 1}, step {state['tally']['step']}"
        print(f"stopped at {where}; go on with: python main.py --resume {folder}", file=sys.stderr)
        return 128 + stop.signal
    if args.save_model:
        save_checkpoint(folder / "model.pt", net.model.state_dict())
    print(f"test accuracy {state['rows'][-1]['test_accuracy']:.2f} % after {state['epoch']} epochs; see {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
