"""The training loop of both scripts, in one process or in many: epochs, checkpoints, metrics, an early end.

Shapes: N images of a rank's batch, K classes.
"""

import contextlib
import itertools
import math
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from feedback import DirectFeedback, alignment
from training.checkpoint import NAMES, mean_buffers, rng_state, save_checkpoint, set_rng_state
from training.data import Batches
from training.distributed import average_buffers, barrier, gather, rank, sum_over_ranks, world_size
from training.run import StopRequest, count, stop_on_signal, write_metrics

DIVERGED = 3  # exit status of a run whose loss diverged or is not finite
RECENT_STEPS, TIMES_GUESSING = 20, 10  # see `check_convergence`


@dataclass
class Job:
    """What there is to train, and on what.

    net: the wrapped model; train_net: the same inside DistributedDataParallel, where there are several ranks.
    optimizers: W's, then B's if it has one. set_learning_rates: sets those of an epoch's step (1 is the first of
        either), returns them.
    train_batches: (epoch, images of it that all ranks have seen) to this rank's rest of the epoch, as images (N, ...),
        labels (N,) and the number of images of all ranks together; as many batches on every rank.
    test_batches: to this rank's share of the test images, or of those that `split` names.
    probe: images and labels to measure the angles on.
    train_images, steps: of an epoch, all ranks together; an epoch ends after that many steps, even with batches left.
    classes: the names of the K classes, kept in the checkpoint.
    settings: the script's arguments, plain data, kept in the checkpoint. data: a fingerprint of the training data.
    command: the line that resumes the run. advice: what to try where it diverges.
    recent: the mean losses of the last steps, all ranks together.
    """

    net: DirectFeedback
    train_net: nn.Module
    optimizers: list[torch.optim.Optimizer]
    set_learning_rates: Callable[[int, int], dict[str, float | None]]
    train_batches: Callable[[int, int], Batches]
    test_batches: Callable[[], Batches]
    probe: tuple[Tensor, Tensor]
    train_images: int
    steps: int
    epochs: int
    folder: Path
    classes: list[str]
    settings: dict[str, Any]
    data: str
    model_name: str
    command: str
    advice: str = "try a lower --lr"
    best_name: str | None = None
    split: str = "test"
    bfloat16: bool = False
    log_interval: int = 10
    epoch: int = 0
    rows: list[dict[str, float | None]] = field(default_factory=list)
    tally: dict[str, Any] = field(default_factory=lambda: new_tally())
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    @property
    def device(self) -> torch.device:
        """Where the net lies."""
        return next(self.net.parameters()).device

    def precision(self) -> torch.autocast:
        """The autocast context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def new_tally() -> dict[str, Any]:
    """An epoch's sums so far. Of all ranks: steps, images seen, seconds; of this rank: images, loss, right ones."""
    return {"step": 0, "seen": 0, "seconds": 0.0, "images": 0, "loss": 0.0, "correct": 0}


def save(job: Job) -> None:
    """Write the checkpoint from rank 0: net with B, optimisers, metrics; of each rank sums, buffers, random state.

    Raises:
        OSError: it cannot be written.
    """
    ranks = gather({"rng": rng_state(), "tally": job.tally, "buffers": dict(job.net.model.named_buffers())})
    if rank() == 0:
        trained = {"model": job.model_name, "args": job.settings, "classes": job.classes, "epoch": job.epoch}
        trained |= {"net": job.net.state_dict()}
        state = trained | {"data": job.data, "rows": job.rows, "ranks": ranks}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in job.optimizers]}
        save_checkpoint(job.folder / NAMES[job.model_name], state)
        best = max((row[f"{job.split}_accuracy"] for row in job.rows), default=0)
        if job.best_name and job.tally["step"] == 0 and job.rows and job.rows[-1][f"{job.split}_accuracy"] == best:
            save_checkpoint(job.folder / job.best_name, trained)
    barrier()


def restore(job: Job, checkpoint: dict[str, Any]) -> None:
    """Put back what `save` wrote. In a world of another size the sums go to rank 0, and random numbers start anew.

    Raises:
        ValueError: the checkpoint is of other data, or does not fit the net or the optimisers.
    """
    if checkpoint.get("data") != job.data:
        raise ValueError("the checkpoint's run had other training images, labels, or another order of them")
    try:
        job.net.load_state_dict(checkpoint["net"])
        for optimizer, saved in zip(job.optimizers, checkpoint["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # with the options of this command line
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            lay_out_as_parameters(optimizer)
        restore_ranks(job, checkpoint["ranks"])
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint does not fit: {error}") from error
    job.epoch, job.rows = checkpoint["epoch"], checkpoint["rows"]


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give each state tensor its parameter's memory format: the fused optimisers on a CPU walk both as they lie."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)


def restore_ranks(job: Job, saved: list[dict[str, Any]]) -> None:
    """Put back each rank's random numbers, sums, and buffers (BatchNorm's running statistics)."""
    mine = [saved[rank()]] if len(saved) == world_size() else saved
    values = mean_buffers([other["buffers"] for other in mine])
    with torch.no_grad():
        for name, buffer in job.net.model.named_buffers():
            buffer.copy_(values[name])
    if len(saved) == world_size():
        set_rng_state(saved[rank()]["rng"])
        job.tally = saved[rank()]["tally"]
    else:
        job.tally = saved[0]["tally"] | {
            key: sum(other["tally"][key] for other in saved) if rank() == 0 else 0
            for key in ("images", "loss", "correct")
        }


class WriteError(Exception):
    """The run's folder cannot be written to."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Within, an OSError becomes a WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError(str(error)) from error


class DivergedError(Exception):
    """The loss, or a weight, is not finite or far above what guessing has; the last good state is saved."""


def check_convergence(job: Job, steps: int) -> None:
    """Raise DivergedError where the mean loss of the last steps, `steps` or more, is 10 times that of guessing.

    A net that guesses has a loss of ln K, K classes: 2.3 for 10, 4.6 for 100. A net that trains may start somewhat
    above it, and a single step may leap; a mean of 20 steps at 10 ln K comes down again in no run that we know of.
    """
    bound = TIMES_GUESSING * math.log(len(job.classes))
    if len(job.recent) >= steps and statistics.fmean(job.recent) > bound:
        where = f"at epoch {job.epoch + 1}, step {job.tally['step']}"
        raise DivergedError(
            f"diverged {where}: the mean loss of the last {count(len(job.recent), 'step')} is "
            f"{statistics.fmean(job.recent):.4g}, and guessing has {math.log(len(job.classes)):.2f}"
        )


def train_epoch(job: Job, stop: StopRequest, writer: SummaryWriter | None) -> bool:
    """Train to the end of the epoch, or to a stop request on any rank; sum up in `job.tally`; return if it is the end.

    Raises:
        DivergedError: before the update of W and of B where the loss is not finite, else as `check_convergence` does.
    """
    tally = job.tally
    started = time.perf_counter() - tally["seconds"]
    job.net.train()
    bar = tqdm(
        total=job.train_images,
        initial=tally["seen"],
        desc=f"epoch {job.epoch + 1}/{job.epochs}",
        unit="image",
        leave=False,
        disable=None if rank() == 0 else True,
    )
    with bar:
        left = job.steps - tally["step"]
        for x, y, together in itertools.islice(job.train_batches(job.epoch + 1, tally["seen"]), left):
            job.set_learning_rates(job.epoch + 1, tally["step"] + 1)
            for optimizer in job.optimizers:
                optimizer.zero_grad()
            with job.precision():
                logits = job.train_net(x, y)
                loss = F.cross_entropy(logits, y)
            loss_value = loss.item()
            if not math.isfinite(loss_value):
                raise DivergedError(
                    f"the loss is {loss_value} at epoch {job.epoch + 1}, step {tally['step'] + 1}: "
                    "stopped before the update"
                )
            # ranks are averaged: weigh this one by its images, so that the outcome is the mean over all of them
            (loss * (len(y) * world_size() / together)).backward()
            for optimizer in job.optimizers:
                optimizer.step()

            tally["step"] += 1
            tally["seen"] += together
            tally["images"] += len(y)
            tally["loss"] += loss_value * len(y)
            tally["correct"] += int((logits.argmax(1) == y).sum())
            tally["seconds"] = time.perf_counter() - started
            bar.update(together)
            signals, step_loss = sum_over_ranks([float(stop.signal or 0), loss_value * len(y) / together], job.device)
            job.recent.append(step_loss)
            if tally["step"] % job.log_interval == 0:
                train_loss, accuracy = train_metrics(job)
                bar.set_postfix_str(f"loss {train_loss:.3f}, accuracy {accuracy:.1f} %")
                if writer is not None:
                    writer.add_scalar("step/train_loss", step_loss, job.epoch * job.steps + tally["step"])
            check_convergence(job, RECENT_STEPS)
            if signals > 0:
                return False
    return True


def train_metrics(job: Job) -> tuple[float, float]:
    """Mean loss and accuracy in percent of the epoch so far, over all ranks."""
    images, loss, correct = sum_over_ranks([job.tally[key] for key in ("images", "loss", "correct")], job.device)
    return loss / images, 100 * correct / images


@torch.no_grad()
def evaluate(job: Job) -> dict[str, float]:
    """Mean loss and top-1 and top-5 accuracy in percent over the test images of all ranks, each counted once."""
    average_buffers(job.net.model)
    job.net.eval()
    loss, correct, correct5, images = 0.0, 0, 0, 0
    for x, y, _ in job.test_batches():
        with job.precision():
            logits = job.net(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
        top5 = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        correct += int(top5[:, 0].sum())
        correct5 += int(top5.sum())
        images += len(y)
    loss, correct, correct5, images = sum_over_ranks([loss, correct, correct5, images], job.device)
    return {
        f"{job.split}_loss": loss / images,
        f"{job.split}_accuracy": 100 * correct / images,
        f"{job.split}_top5_accuracy": 100 * correct5 / images,
    }


def test_line(job: Job, metrics: dict[str, float]) -> str:
    """What `evaluate` found, in a line."""
    loss, top1, top5 = (metrics[f"{job.split}_{key}"] for key in ("loss", "accuracy", "top5_accuracy"))
    return f"{job.split} accuracy {top1:.2f} % top-1, {top5:.2f} % top-5; loss {loss:.4f}"


def epoch_row(job: Job) -> dict[str, float | None]:
    """Evaluate a finished epoch, print its line on rank 0, and return its row of metrics.csv.

    Accuracies are in percent, angles in degrees; the learning rates are those of the last step.
    """
    train_loss, train_accuracy = train_metrics(job)
    row = {"epoch": job.epoch + 1, "train_loss": train_loss, "train_accuracy": train_accuracy}
    row |= evaluate(job) | job.set_learning_rates(job.epoch + 1, job.steps) | {"seconds": job.tally["seconds"]}
    angles: dict[str, dict[str, float]] = {}
    if rank() == 0:
        with job.precision():
            angles = alignment(job.net.train(), *job.probe)
        # not of biases and batch norm: in front of a batch norm a bias's gradient is rounding noise
        of_vectors = {name for name, parameter in job.net.model.named_parameters() if parameter.dim() == 1}
        angles = {name: values for name, values in angles.items() if name not in of_vectors}
    row |= {f"{key}_{name}": value for name, values in angles.items() for key, value in values.items()}
    if rank() == 0:
        degrees = " ".join(f"{point} {angles[point]['alignment_deg']:.1f}" for point in job.net.points)
        print(
            f"epoch {job.epoch + 1}/{job.epochs}: train loss {train_loss:.4f}, accuracy {train_accuracy:.2f} %; "
            f"{job.split} loss {row[f'{job.split}_loss']:.4f}, accuracy {row[f'{job.split}_accuracy']:.2f} %; "
            f"angle to BP in degrees {degrees}; {row['seconds']:.0f} s, "
            f"{job.tally['seen'] / row['seconds']:.0f} images/s",
            flush=True,
        )
    return row


def check_soundness(job: Job) -> None:
    """Raise DivergedError unless weights, B and the last loss on the test images are finite, and the loss is sound."""
    check_convergence(job, steps=1)
    finite = all(bool(parameter.isfinite().all()) for parameter in job.net.parameters())
    if not finite or (job.rows and not math.isfinite(job.rows[-1][f"{job.split}_loss"])):
        raise DivergedError(f"weights or {job.split} loss are not finite after epoch {job.epoch + 1}: stopped")


def fit(job: Job) -> int:
    """Train to `job.epochs`. Leave checkpoints, metrics.csv and TensorBoard events in the job's folder.

    Returns:
        The exit status: 0, DIVERGED, 1 where the folder cannot be written to, or 128 + the signal that stopped the run.
    """
    try:
        with stop_on_signal() as stop:
            train(job, stop)
    except DivergedError as error:
        print(f"{error}. The last good state is in {job.folder}: {job.advice}", file=sys.stderr)
        return DIVERGED
    except WriteError as error:
        print(f"cannot write to {job.folder}: {error}", file=sys.stderr)
        return 1
    if job.epoch < job.epochs:
        if rank() == 0:
            where = f"epoch {job.epoch + 1}, step {job.tally['step']}"
            print(f"stopped at {where}; go on with: {job.command}", file=sys.stderr)
        return 128 + (stop.signal or signal.SIGTERM)
    if rank() == 0:
        accuracy = job.rows[-1][f"{job.split}_accuracy"]
        print(f"{job.split} accuracy {accuracy:.2f} % after {count(job.epoch, 'epoch')}; see {job.folder}")
    return 0


def train(job: Job, stop: StopRequest) -> None:
    """Train epoch by epoch until the last one or a stop request; of a run that is over, write its files once more.

    Raises:
        DivergedError: with the last good state saved.
        WriteError: a file cannot be written.
    """
    purge_step = job.epoch * job.steps + job.tally["step"] + 1
    with writing():
        save(job)
        writer = SummaryWriter(job.folder, purge_step=purge_step) if rank() == 0 else None
        if job.rows and rank() == 0:
            write_metrics(job.folder / "metrics.csv", job.rows)
    with contextlib.closing(writer) if writer else contextlib.nullcontext():
        while job.epoch < job.epochs:
            finished = train_epoch(job, stop, writer)
            if finished:
                job.rows.append(epoch_row(job))
            check_soundness(job)
            if finished:
                job.epoch, job.tally = job.epoch + 1, new_tally()
            with writing():
                if finished and writer is not None:
                    write_metrics(job.folder / "metrics.csv", job.rows)
                    for key, value in job.rows[-1].items():
                        if value is not None:
                            writer.add_scalar(f"epoch/{key}", value, job.epoch * job.steps)
                save(job)
            if not finished:
                break
