"""A training run: what it has done so far, the folder that it leaves, and how it ends.

Shapes: N images of a rank's batch, K classes.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from feedback import DirectFeedback
from training.batches import Batches, Data, Held
from training.checkpoint import NAMES, identity, mean_buffers, rng_state, save_checkpoint, set_rng_state
from training.distributed import barrier, gather, rank, replica, sum_over_ranks, world_size
from training.files import locked, replaced
from training.image_files import ImageFileError
from training.machine import git_revision, hardware, versions
from training.stages import Stages

DIVERGED_MARK = "diverged"  # a file in the folder of a run that did
DIVERGED = 3  # exit status of a run whose loss diverged or is not finite
COUNTS = ("step", "seen", "images", "correct")  # of `new_tally`, whole numbers
WRITTEN = ("config.json", "metrics.csv", "model.pt", "model_best.pth.tar", *NAMES.values())  # by a run in its folder
RECENT_STEPS, TIMES_GUESSING = 20, 10  # see `Run.check_convergence`


class RunEndedError(Exception):
    """A run ended before its last epoch; the message is for its user, and `status` is the process's exit status."""

    status = 1


class WriteError(RunEndedError):
    """The run's folder cannot be written to."""


class ReadError(RunEndedError):
    """A training or test image cannot be read."""


class DivergedError(RunEndedError):
    """The loss, or a weight, is not finite or far above what guessing has; the last good state is saved."""

    status = DIVERGED


class StoppedError(RunEndedError):
    """A signal asked for the end; the state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


def stop_signals() -> list[int]:
    """The signals that ask a run to stop. nohup ignores SIGHUP, and so it stays."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


class Noted(NamedTuple):
    """A step, and what `Run.watch` has returned."""

    values: Tensor  # on the CPU, once `copied` has come: loss and right answers of this rank; of several, also over all
    copied: Any  # a CUDA event, or None
    images: int  # of this rank


class Run:
    """Counts, checks, logs and saves what the training loop does; a context manager around the loop.

    Within it the first SIGINT, SIGTERM or SIGHUP is only noted: the step under way is finished, the state saved, and
    StoppedError raised on every rank. A second SIGINT acts as ever; more of the others are the same request.

    Args:
        folder: holds checkpoints, metrics.csv and TensorBoard events.
        net: the wrapped model. optimizers: W's, then B's if it has one; fused, which heed `found_inf`.
        data: what it is trained on.
        args: the script's arguments; all but those named in `not_kept` go into the checkpoint.
        model: the net's name.
        command: what resumes the run, with --resume and its folder. advice: what to try where it diverges.
        log_interval: steps between logs of the loss.
        best_name: of a checkpoint of weights and B after the best epoch, if any.
        split: what the accuracies are of, "test" or "validation" images.
        epoch: count from here.
        stages: where each process trains a stage of the net.

    Attributes:
        epoch: how many epochs are done. step: how many steps of the next one. done: how many steps in all, of whatever
            batch size. rows: of metrics.csv.
    """

    def __init__(
        self,
        folder: Path,
        net: DirectFeedback,
        optimizers: list[torch.optim.Optimizer],
        data: Data,
        args: Namespace,
        *,
        model: str,
        not_kept: set[str],
        command: str,
        advice: str,
        log_interval: int,
        best_name: str | None = None,
        split: str = "test",
        epoch: int = 0,
        stages: Stages | None = None,
    ) -> None:
        self.folder, self.net, self.optimizers, self.data = folder, net, optimizers, data
        self.settings = {key: value for key, value in vars(args).items() if key not in not_kept}
        self.epochs, self.steps, self.epoch = args.epochs, data.steps_after(0), epoch
        self.done = epoch * self.steps
        self.model, self.advice, self.best_name, self.split = model, advice, best_name, split
        self.command = f"{command} --resume {shlex.quote(str(folder))}"
        self.log_interval = log_interval
        self.device = next(net.parameters()).device
        self.rows: list[dict[str, float | None]] = []
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # losses of the last steps, all ranks together
        self.tally = new_tally()
        self._signal = 0  # the signal that asked for a stop
        self._handlers: dict[int, Any] = {}  # what signals did before
        self._stopping = False  # whether a signal had come, on any rank, before a step that has been read
        self._started = self._together = 0.0
        self._writer: SummaryWriter | None = None
        self._bar = tqdm(disable=True)
        self.stages = stages
        self.counts = stages is None or stages.pipeline.last  # whether this rank's images are in the sums over all
        self._held = contextlib.ExitStack()
        self._noted: deque[Noted] = deque()  # steps to be read
        self.behind = 1 if self.device.type == "cuda" else 0  # steps that may be under way on the device
        self._zero, self._spoilt, self._found_inf = torch.zeros(3, device=self.device).unbind()
        for optimizer in optimizers:
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        if net.update == "inplace":
            net.found_inf = self._found_inf
        self._trained = False  # whether a step was taken since the last test
        self._before = folder / f"{NAMES[model]}.before"  # the checkpoint of before the epoch that is being tested

    @property
    def step(self) -> int:
        """How many steps of the epoch under way are done."""
        return self.tally["step"]

    # --- around the loop

    def begin(self, checkpoint: dict[str, Any] | None, args: dict[str, Any]) -> None:
        """Take the run's folder until `end`, go on from `checkpoint` if there is one, and write config.json.

        Raises:
            ValueError: the folder is not to be had, or the checkpoint does not fit, on any rank; on every rank.
        """
        problem = None
        try:
            if rank() == 0:
                self._held.enter_context(claimed(self.folder, new=checkpoint is None))
                if checkpoint is not None and checkpoint["file"] != identity(Path(args["resume"])):
                    raise ValueError("another process has trained it on in this moment: start once more")
            if checkpoint is not None:
                self._restore(checkpoint)
            if rank() == 0:
                write_config(self.folder, args, self.data.where, self.device)
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [one for one in gather(problem) if one]
        if problems:
            self.end()
            raise ValueError(problems[0])

    def end(self) -> None:
        """Let go of the run's folder."""
        self._held.close()

    def __enter__(self) -> "Run":
        for number in stop_signals():
            self._handlers[number] = signal.signal(number, self._note_signal)
        self._thread_hook, threading.excepthook = threading.excepthook, self._pass_over_writer
        try:
            self.save()
            if rank() == 0:
                (self.folder / DIVERGED_MARK).unlink(missing_ok=True)
                with self._writing():
                    self._writer = SummaryWriter(self.folder, purge_step=self.done + 1)
                    if self.rows:
                        write_metrics(self.folder / "metrics.csv", self.rows)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        try:
            if self._writer is not None:
                with self._writing() if error is None else contextlib.suppress(OSError):
                    self._writer.close()
        finally:
            self._restore_handlers()
            threading.excepthook = self._thread_hook

    def _pass_over_writer(self, args: threading.ExceptHookArgs) -> None:
        """A threading.excepthook: TensorBoard's thread that cannot write says so here, and again at the next event."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._thread_hook(args)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[number])

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # --- in the loop

    def batches(self) -> Iterator[tuple[Held, float]]:
        """The rest of the epoch: what `data.load` makes this rank's images and labels of, and the factor on its loss.

        Gradients are averaged over the ranks; with the factor on each loss that is the mean over all images.

        Raises:
            ReadError: an image cannot be read; on this rank alone.
        """
        self._started = time.perf_counter() - self.tally["seconds"]
        self._bar.close()
        self._bar = tqdm(
            total=self.data.images,
            initial=self.tally["seen"],
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            unit="image",
            leave=False,
            disable=None if rank() == 0 else True,
        )
        seen = self.tally["seen"]
        left = self.data.steps_after(seen)
        with self._reading():
            for held, together in itertools.islice(self.data.train(self.epoch + 1, seen), left):
                self._together = together
                weight = len(held[0]) * replica()[1] / together
                if self.stages is not None:
                    self.stages.weight = weight
                yield held, weight

    def watch(self, loss: Tensor, logits_NK: Tensor, y: Tensor) -> Tensor:
        """Return, for `count`, a step's loss over this rank's images and its right answers; of several ranks, more.

        From a loss on that is not finite over all ranks, the optimisers and a B in place update nothing (in stages, B
        in place only within that step). Nothing waits for the device here.
        """
        own = of_all = loss.detach()
        right = (logits_NK.argmax(1) == y).sum(dtype=own.dtype)
        values = [own, right]
        if world_size() > 1:
            share = len(y) / self._together if self.counts else 0.0
            over_ranks = torch.stack((own * share, own.new_full((), self._signal)))
            dist.all_reduce(over_ranks)
            of_all, signals = over_ranks.unbind()
            values += [of_all, signals]
        self._spoilt.addcmul_(of_all, self._zero)
        torch.ne(self._spoilt, self._spoilt, out=self._found_inf)
        return torch.stack(values)

    def count(self, values: Tensor, images: int) -> None:
        """Add a step over so many images to the epoch's sums, and log it; on a GPU its `values` are read a step later.

        Raises:
            DivergedError: the loss of a step over all ranks was not finite, and nothing has been updated since; or as
                `check_convergence` does. On every rank.
            StoppedError: a signal came before the step, on any rank.
        """
        on_host = values.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if values.is_cuda else None
        if copied is not None:
            copied.record()
        self._noted.append(Noted(on_host, copied, images))
        tally, self._trained = self.tally, True
        tally["step"] += 1
        self.done += 1
        tally["seen"] += self._together
        tally["seconds"] = time.perf_counter() - self._started
        self._bar.update(self._together)
        self._read_noted(self.behind)
        if tally["step"] % self.log_interval == 0 and tally["step"] > self.behind:
            train_loss, accuracy = self.train_metrics()
            self._bar.set_postfix_str(f"loss {train_loss:.3f}, accuracy {accuracy:.1f} %")
        if self._stopping:
            self._stop()

    def _read_noted(self, behind: int) -> None:
        """Read what `watch` has returned, but for the last `behind` steps.

        Raises:
            DivergedError: as `count` does.
        """
        while len(self._noted) > behind:
            values, copied, images = self._noted.popleft()
            if copied is not None:
                copied.synchronize()
            loss, right, *over_ranks = values.tolist()
            of_all, signals = over_ranks or (loss, self._signal)
            step = self.step - len(self._noted)
            if not math.isfinite(of_all):
                where = f"epoch {self.epoch + 1}, step {step}"
                raise self._diverged(f"the loss is {of_all} at {where}: stopped before the update")
            self.recent.append(of_all)
            self._stopping = self._stopping or signals > 0
            if self.counts:
                self.tally["images"] += images
                self.tally["loss"] += loss * images
                self.tally["correct"] += int(right)
            if step % self.log_interval == 0 and self._writer is not None:
                with self._writing():
                    self._writer.add_scalar("step/train_loss", of_all, self.done - len(self._noted))
            self.check_convergence(step)

    def test_batches(self) -> Batches:
        """Save the epoch, so that a kill while testing loses nothing; return this rank's share of the test images.

        The checkpoint of before stays beside the new one until the test has been found sound.

        Raises:
            DivergedError: as `check_soundness` does.
            StoppedError: a signal came meanwhile, on any rank; on every rank.
            ReadError: an image cannot be read; on this rank alone.
        """
        self._read_noted(0)
        self.bring_together()
        self.check_soundness()
        if self._trained:  # not a resumed run that was saved here
            if rank() == 0:
                with contextlib.suppress(OSError):  # a file system without hard links
                    self._before.unlink(missing_ok=True)
                    os.link(self.folder / NAMES[self.model], self._before)
            self.save()
        return self._test_batches()

    def _test_batches(self) -> Batches:
        with self._reading():
            batches = self.data.test()
            more = 1.0
            while more:
                batch = next(batches, None)
                signals, more = sum_over_ranks([float(self._signal), float(batch is not None)], self.device)
                if signals:
                    self._stop()
                if batch is not None:
                    yield batch

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except ImageFileError as error:
            if world_size() == 1:  # other ranks are elsewhere: what was saved before stays
                self.save()
            message = f"error: {error}; without it go on with: {self.command}"
            if rank() > 0:  # the script prints rank 0's
                print(message, file=sys.stderr, flush=True)
            raise ReadError(message) from None

    def bring_together(self) -> None:
        """Where processes train stages of the net: let each have all of it."""
        if self.stages is not None:
            self.stages.bring_together()

    def _stop(self) -> NoReturn:
        self._read_noted(0)
        self.bring_together()
        self.check_soundness()
        self.save()
        where = f"epoch {self.epoch + 1}, step {self.step}"
        raise StoppedError(f"stopped at {where}; go on with: {self.command}", self._signal or signal.SIGTERM)

    def end_epoch(
        self,
        tested: dict[str, float],
        angles: dict[str, dict[str, float]],
        learning_rates: dict[str, float | None],
    ) -> None:
        """Print the epoch's line on rank 0, write its row of metrics.csv, and save.

        Args:
            tested: what `evaluate` returned. angles: what `measure_angles` returned.
            learning_rates: those of the last step.

        Raises:
            DivergedError: weights, B or the loss are not sound; the epoch before is what stays saved.
            WriteError: a file cannot be written.
        """
        self._bar.close()
        train_loss, train_accuracy = self.train_metrics()
        row: dict[str, float | None] = {"epoch": self.epoch + 1, "train_loss": train_loss}
        row |= {"train_accuracy": train_accuracy, **{f"{self.split}_{key}": value for key, value in tested.items()}}
        row |= learning_rates | {"seconds": self.tally["seconds"]}
        row |= {f"{key}_{name}": value for name, values in angles.items() for key, value in values.items()}
        if rank() == 0:
            degrees = " ".join(f"{point} {angles[point]['alignment_deg']:.1f}" for point in self.net.points)
            print(
                f"epoch {self.epoch + 1}/{self.epochs}: train loss {train_loss:.4f}, accuracy {train_accuracy:.2f} %; "
                f"{self.split} loss {tested['loss']:.4f}, accuracy {tested['accuracy']:.2f} %; "
                f"angle to BP in degrees {degrees}; {self.tally['seconds']:.0f} s, "
                f"{self.tally['seen'] / self.tally['seconds']:.0f} images/s",
                flush=True,
            )
        self.rows.append(row)
        self.check_soundness()
        self.epoch, self.tally = self.epoch + 1, new_tally()
        if self._writer is not None:
            with self._writing():
                write_metrics(self.folder / "metrics.csv", self.rows)
                for key, value in row.items():
                    if value is not None:
                        self._writer.add_scalar(f"epoch/{key}", value, self.done)
        self.save()
        self._trained = False
        if rank() == 0:
            self._before.unlink(missing_ok=True)

    def save_model(self) -> None:
        """Write the bare net's state dict to model.pt, from rank 0.

        Raises:
            WriteError: it cannot be written.
        """
        if rank() == 0:
            with self._writing():
                save_checkpoint(self.folder / "model.pt", self.net.model.state_dict())
            print(f"see {self.folder / 'model.pt'}")

    def report(self) -> str:
        """The line at the end of a run that has done its epochs."""
        accuracy = self.rows[-1][f"{self.split}_accuracy"]
        return f"{self.split} accuracy {accuracy:.2f} % after {plural(self.epoch, 'epoch')}; see {self.folder}"

    def train_metrics(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent of the epoch so far, over all ranks."""
        images, loss, correct = sum_over_ranks([self.tally[key] for key in ("images", "loss", "correct")], self.device)
        return loss / images, 100 * correct / images

    # --- checks

    def check_convergence(self, step: int) -> None:
        """Raise DivergedError where the mean loss of the last 20 steps, to `step`, is above 10 times that of guessing.

        A net that guesses has a loss of ln K, K classes: 2.3 for 10, 4.6 for 100. A net that trains may start somewhat
        above it, and a single step may leap; no run that learned anything had a mean of 20 steps near 10 ln K.
        """
        if len(self.recent) < RECENT_STEPS:
            return
        mean, guessing = statistics.fmean(self.recent), math.log(len(self.data.classes))
        if mean > TIMES_GUESSING * guessing:
            where = f"epoch {self.epoch + 1}, step {step}"
            last = f"the mean loss of the last {RECENT_STEPS} steps is {mean:.4g}"
            raise self._diverged(f"diverged at {where}: {last}, and guessing has {guessing:.2f}")

    def check_soundness(self) -> None:
        """Raise DivergedError unless all that is saved of net and optimisers, and the last test loss, is finite."""
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        kept = [*self.net.parameters(), *self.net.buffers(), *(value for state in states for value in state.values())]
        finite = all(bool(value.isfinite().all()) for value in kept if isinstance(value, Tensor))
        (unsound,) = sum_over_ranks([float(not finite)], self.device)  # a rank may have statistics of its own
        if unsound or (self.rows and not math.isfinite(self.rows[-1][f"{self.split}_loss"] or 0)):
            raise self._diverged(
                f"weights, statistics or {self.split} loss are not finite after epoch {self.epoch + 1}: stopped"
            )

    def _diverged(self, what: str) -> DivergedError:
        if rank() == 0:
            with contextlib.suppress(OSError):
                (self.folder / DIVERGED_MARK).touch()
                os.replace(self._before, self.folder / NAMES[self.model])
        return DivergedError(f"{what}. The last good state is in {self.folder}: {self.advice}")

    # --- checkpoints

    def save(self) -> None:
        """Write the checkpoint from rank 0: net with B, optimisers, metrics, each rank's sums, buffers, random state.

        Raises:
            WriteError: it cannot be written.
        """
        self._read_noted(0)
        self.bring_together()
        states = [o.state_dict() for o in self.optimizers] if self.stages is None else self.stages.optimizer_states()
        buffers = {name: buffer.cpu() for name, buffer in self.net.model.named_buffers()}
        ranks = gather({"rng": rng_state(), "tally": self.tally, "buffers": buffers})
        if rank() == 0:
            trained = {"model": self.model, "args": self.settings, "classes": self.data.classes, "epoch": self.epoch}
            trained |= {"net": self.net.state_dict()}
            state = trained | {"data": self.data.fingerprint, "rows": self.rows, "ranks": ranks}
            state |= {"recent": list(self.recent), "steps": self.done, "shares": replica()[1]}
            state |= {"optimizers": states}
            accuracies = [row[f"{self.split}_accuracy"] or 0 for row in self.rows]
            with self._writing():
                save_checkpoint(self.folder / NAMES[self.model], state)
                if self.best_name and self.step == 0 and accuracies and accuracies[-1] == max(accuracies):
                    save_checkpoint(self.folder / self.best_name, trained)
        barrier()

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Put back what `save` wrote. In a world of another size the sums go to rank 0, and random numbers start anew.

        Raises:
            ValueError: the checkpoint is of other data, does not fit the net or the optimisers, or is past the epochs.
        """
        if checkpoint.get("data") != self.data.fingerprint:
            raise ValueError("the checkpoint's run had other training images, labels, or another order of them")
        try:
            self.net.load_state_dict(checkpoint["net"])
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # with the options of this command line
                optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
                lay_out_as_parameters(optimizer)
            check_counters(checkpoint)
            self._restore_ranks(checkpoint["ranks"], checkpoint["shares"])
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the checkpoint does not fit: {error}") from error
        self.epoch, self.rows, self.done = checkpoint["epoch"], checkpoint["rows"], checkpoint["steps"]
        self.recent.extend(checkpoint["recent"])
        if self.epochs < self.epoch + (self.step > 0):
            raise ValueError(f"--epochs: got {self.epochs}, but the run is past epoch {self.epoch} already")

    def _restore_ranks(self, saved: list[dict[str, Any]], shares: int) -> None:
        """Put back each rank's random numbers, sums, and buffers (BatchNorm's running statistics).

        Ranks that share the batches in another way than those that saved get the mean of all.
        """
        mine = [saved[rank()]] if (len(saved), shares) == (world_size(), replica()[1]) else saved
        values = mean_buffers([other["buffers"] for other in mine])
        with torch.no_grad():
            for name, buffer in self.net.model.named_buffers():
                buffer.copy_(values[name])
        if len(saved) == world_size():
            set_rng_state(saved[rank()]["rng"])
            self.tally = saved[rank()]["tally"]
        else:
            self.tally = saved[0]["tally"] | {
                key: sum(other["tally"][key] for other in saved) if rank() == 0 else 0
                for key in ("images", "loss", "correct")
            }

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError in the with-block into a WriteError."""
        try:
            yield
        except OSError as error:
            raise WriteError(f"cannot write to {self.folder}: {error}") from error


def new_tally() -> dict[str, Any]:
    """An epoch's sums so far. Of all ranks: steps, images seen, seconds; of this rank: images, loss, right ones."""
    return {"step": 0, "seen": 0, "seconds": 0.0, "images": 0, "loss": 0.0, "correct": 0}


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give each state tensor its parameter's memory format: the fused optimisers on a CPU read both in memory order."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)


def plural(number: int, noun: str) -> str:
    """The number with its noun: "1 epoch", "2 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def check_counters(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError where a number in a checkpoint is none, or a count is below 0."""

    def number(value: Any, kinds: type | tuple[type, ...] = (int, float)) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    tallies = [saved["tally"] for saved in checkpoint["ranks"]]
    whole = [checkpoint["epoch"], checkpoint["steps"], *(tally[key] for tally in tallies for key in COUNTS)]
    fits = all(number(value, int) and value >= 0 for value in whole)
    fits = fits and all(tally.keys() == new_tally().keys() and all(map(number, tally.values())) for tally in tallies)
    fits = fits and all(map(number, checkpoint["recent"])) and len(checkpoint["rows"]) <= checkpoint["epoch"]
    for row in checkpoint["rows"]:
        values = [value for value in row.values() if value is not None]
        fits = fits and all(isinstance(key, str) for key in row) and all(map(number, values))
    if not fits:
        raise ValueError("its epochs, steps, sums or rows are not the numbers that a run counts")


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint of either script."""
    return any((folder / name).exists() for name in NAMES.values())


@contextlib.contextmanager
def claimed(folder: Path, new: bool) -> Iterator[None]:
    """Hold the folder of a run, a `new` one or one to go on with, against other processes.

    Raises:
        ValueError: another process holds it; or a new run's folder holds a run, or somebody's files.
        OSError: it cannot be made or written to.
    """
    lock = folder / "run.lock"
    strange = [name for name in WRITTEN if (folder / name).exists()]
    if new and strange and not lock.exists() and not holds_run(folder):
        raise ValueError(f"it holds {strange[0]}, but no run of these scripts: name another --out")
    with locked(lock) as free:
        if not free:
            raise ValueError("another process is training there")
        if new and holds_run(folder):
            raise ValueError(f"it already holds a run: continue it with --resume {folder}, or name another --out")
        for name in WRITTEN:
            for partial in folder.glob(f"{name}.*.partial"):  # of a process that was killed while it wrote
                partial.unlink()
        if new:
            (folder / "config.json").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        yield


def write_config(folder: Path, args: dict[str, Any], data_source: str, device: torch.device) -> None:
    """Write config.json: arguments, the data's source, versions, git revision and hardware, a resumed run's below.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is one of an earlier run, and it is damaged.
    """
    config: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "args": args,
        "data": data_source,
        "versions": versions(device),
        "git": git_revision(),
        "hardware": hardware(device),
    }
    path = folder / "config.json"
    if path.exists():
        try:
            first = json.loads(path.read_text())
            first.setdefault("resumed", []).append(config)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to go on") from error
        config = first
    with replaced(path) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def write_metrics(path: Path, rows: list[dict[str, float | None]]) -> None:
    """Write all rows so far as CSV, whole or not at all; None, NaN and what a row lacks stay empty."""
    with replaced(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value is None or math.isnan(value) else value for key, value in row.items()})
