"""The backward pass in parallel: a step over several processes, by direct feedback and by backpropagation.

Run:    python benchmarks/pipeline.py
Starts a process for each stage of a net (`--stages`, on a CPU of one thread each; with `--device cuda` a GPU each) and
times a training step, forward, backward and optimisers, in random order, round by round, of

    BP GPipe, BP 1F1B   the two schedules of torch.distributed.pipelining: the gradient goes back from stage to stage
    BP DDP              every process has the whole net and a share of the batch
    DFA, DKP, LAS       `feedback.pipeline`: e goes to all stages at once, and all go backward at once

by 1, 2, 4 and 8 micro-batches. Stages are cut so that the dearest is cheapest, each way by its own measured costs.
Prints a table with medians, quartiles, the share of a step in which each stage waits, and what each sends; writes every
single time as JSON, a chart, and a picture of what each stage does when.
"""

import argparse
import functools
import itertools
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import MEASURED, write_raw
from feedback.pipeline import Pipeline, balanced_cuts, costs_of, parts_of
from models import VGG, AlexNet
from training.arguments import positive_int
from training.launch import LAST_TENSORS_S, free_port
from training.machine import hardware, reuse_memory

WARM_UP, STEPS = 2, 2  # untimed steps of each way; steps in a row that are timed together
MICRO_BATCHES = (1, 2, 4, 8)
CHAINED = {"BP GPipe": ScheduleGPipe, "BP 1F1B": Schedule1F1B}
DIRECT: dict[str, dict[str, Any]] = {
    "DFA": {"rule": "DFA"},
    "DKP optimizer": {"rule": "DKP"},
    "DKP inplace": {"rule": "DKP", "update": "inplace", "feedback_lr": 5e-3, "feedback_weight_decay": 1e-6},
    "LAS": {"rule": "LAS"},
}
PHASES = ("forward", "backward", "update")
BASE, PICTURED, PICTURED_BY = "BP GPipe", ("BP GPipe", "DKP optimizer"), 4  # what a timeline is drawn of; micro-batches
Busy = list[tuple[str, float, float]]  # what a stage did, from when to when


class MLP(nn.Sequential):
    """Eight hidden layers."""

    def __init__(self, width: int, classes: int) -> None:
        sizes = [3072, *[width] * 8]
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        super().__init__(*hidden, nn.Linear(width, classes))
        self.points = [str(number) for number in range(8)]


class Case(NamedTuple):
    """A net, the shape of its batch, and its number of classes."""

    title: str
    make: Callable[[], Any]
    shape: tuple[int, ...]
    classes: int


NETS = {
    "alexnet": Case("AlexNet 224, batch 32", lambda: AlexNet(100), (32, 3, 224, 224), 100),
    "vgg": Case("VGG, batch 128", lambda: VGG(10), (128, 3, 32, 32), 10),
    "mlp": Case("MLP 8 x 2048, batch 256", lambda: MLP(2048, 10), (256, 3072), 10),
}
QUICK = [Case("MLP 8 x 32, batch 8", lambda: MLP(32, 10), (8, 3072), 10)]


class Way(NamedTuple):
    """One way to train a net over the processes."""

    step: Callable[[], None]
    busy: Busy
    sent: list[int]  # bytes, of all steps so far


def optimizers_of(model: nn.Module, feedback: nn.Module | None = None) -> list[torch.optim.Optimizer]:
    """SGD over the weights, and Adam over B where an optimiser has it."""
    kind: dict[str, Any] = {"fused": True, "weight_decay": 1e-6}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), 5e-4, 0.9, nesterov=True, **kind)]
    of_b = [] if feedback is None else [B for B in feedback.parameters() if B.requires_grad]
    return [*optimizers, torch.optim.Adam(of_b, 1e-4, **kind)] if of_b else optimizers


def noted(call: Callable[..., Any], name: str, busy: Busy) -> Callable[..., Any]:
    """The same call; its start and end are added to `busy`."""

    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        busy.append((name, start, time.perf_counter()))
        return result

    return timed


def with_update(step: Callable[[], Any], optimizers: list[torch.optim.Optimizer], busy: Busy) -> Callable[[], None]:
    """A training step: gradients by `step`, then the optimisers."""

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    timed = noted(update, "update", busy)

    def whole() -> None:
        step()
        timed()

    return whole


def chained_way(name: str, part: nn.Module, micro_batches: int, x: Tensor, y: Tensor) -> Way:
    """Backpropagation by a schedule of torch.distributed.pipelining."""
    busy: Busy = []
    sent = [0]
    stage = PipelineStage(part, dist.get_rank(), dist.get_world_size(), x.device)
    schedule = CHAINED[name](stage, micro_batches, F.cross_entropy)
    for method, what in (("forward_one_chunk", "forward"), ("backward_one_chunk", "backward")):
        setattr(stage, method, noted(getattr(stage, method), what, busy))
    for method in ("get_fwd_send_ops", "get_bwd_send_ops"):
        setattr(stage, method, counted(getattr(stage, method), sent))

    def step() -> None:
        inputs = [x] if stage.is_first else []
        schedule.step(*inputs, target=y if stage.is_last else None)

    return Way(with_update(step, optimizers_of(part), busy), busy, sent)


def counted(call: Callable[..., list], sent: list[int]) -> Callable[..., list]:
    """The same call; the bytes of the operations that it returns are added to `sent`."""

    def counting(*args: Any) -> list:
        operations = call(*args)
        sent[0] += sum(operation.tensor.nbytes for operation in operations)
        return operations

    return counting


def direct_way(pipeline: Pipeline, optimizers: list[torch.optim.Optimizer], m: int, x: Tensor, y: Tensor) -> Way:
    """Direct feedback by `m` micro-batches."""
    busy: Busy = []
    sent = [0]
    pieces = [len(piece) for piece in y.tensor_split(m)]
    flowing = pipeline.logits if pipeline.last else pipeline.sent
    copies = pipeline.stages - 1 if pipeline.last else 1
    per_step = sum(pieces) * flowing[:1].nbytes * copies

    def step() -> None:
        pipeline.trace = busy
        pipeline.step(x, y, micro_batches=m)
        sent[0] += per_step

    return Way(with_update(step, optimizers, busy), busy, sent)


def ddp_way(model: nn.Module, x: Tensor, y: Tensor) -> Way:
    """Backpropagation by DistributedDataParallel; what a ring all-reduce sends is worked out, not counted."""
    busy: Busy = []
    sent, world = [0], dist.get_world_size()
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    mine = slice(len(y) * dist.get_rank() // world, len(y) * (dist.get_rank() + 1) // world)
    share, labels = x[mine], y[mine]
    gradients = sum(parameter.nbytes for parameter in model.parameters())

    def step() -> None:
        F.cross_entropy(net(share), labels).backward()
        sent[0] += 2 * gradients * (world - 1) // world

    optimizer = torch.optim.SGD(model.parameters(), 5e-4, 0.9, nesterov=True, fused=True, weight_decay=1e-6)

    def whole() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradients lie in DDP's buckets

    return Way(whole, busy, sent)


def agreed_cuts(case: Case, x: Tensor, chained: bool) -> list[str]:
    """Cuts that balance the stages by the costs that rank 0 measures alone."""
    cuts: list[Any] = [None]
    if dist.get_rank() == 0:
        model = case.make().to(x.device)
        cuts = [balanced_cuts(costs_of(model, x, chained), model.points, dist.get_world_size())]
    dist.broadcast_object_list(cuts, device=x.device)
    return cuts[0]


def ways_of(case: Case, x: Tensor, y: Tensor, micro_batches: tuple[int, ...]) -> dict[tuple[str, int], Way]:
    """Every way to train the net, by name and number of micro-batches; by DDP there is no such number (1)."""
    rank, ways = dist.get_rank(), {}
    model = case.make().to(x.device)
    ways["BP DDP", 1] = ddp_way(model, x, y)
    for name in CHAINED:
        part = parts_of(case.make().to(x.device), agreed_cuts(case, x, chained=True))[rank]
        for m in micro_batches:
            if name == BASE or m >= dist.get_world_size():  # 1F1B takes no fewer
                ways[name, m] = chained_way(name, part, m, x, y)
    for name, options in DIRECT.items():
        model = case.make().to(x.device)
        cut = parts_of(model, agreed_cuts(case, x, chained=False))
        pipeline = Pipeline(cut, model.points, example=x[:1], **options)
        optimizers = optimizers_of(pipeline.net.model, pipeline.net.feedback)
        for m in micro_batches:
            ways[name, m] = direct_way(pipeline, optimizers, m, x, y)
    return ways


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles; the middle one is the median."""
    return statistics.quantiles(values, n=4, method="inclusive")


def timed(way: Way, steps: int, device: torch.device) -> tuple[float, dict[str, float], int]:
    """Seconds of a step, those of them in which this stage does what, and the bytes it sends."""
    way.busy.clear()
    before = way.sent[0]
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        way.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    seconds = time.perf_counter() - start
    work: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for name, a, b in way.busy:
        if name.partition(" ")[0] in work:
            work[name.partition(" ")[0]] += (b - a) / steps
    return seconds / steps, work, (way.sent[0] - before) // steps


def measure(case: Case, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time every way in random order, round by round; return on every rank a row for each."""
    torch.manual_seed(0)
    x = torch.randn(case.shape, device=device)
    y = torch.randint(case.classes, (case.shape[0],), device=device)
    micro_batches = MICRO_BATCHES[:2] if args.quick else MICRO_BATCHES
    ways = ways_of(case, x, y, micro_batches)
    for way in ways.values():
        timed(way, WARM_UP, device)
    samples: dict[tuple[str, int], list[tuple[float, dict[str, float], int]]] = {key: [] for key in ways}
    order, shuffled = list(ways), random.Random(0)
    pictures = {}
    bar = tqdm(
        total=args.rounds * len(order), desc=case.title, leave=False, disable=None if dist.get_rank() == 0 else True
    )
    for _ in range(args.rounds):
        shuffled.shuffle(order)  # alike on all ranks
        for key in order:
            samples[key].append(timed(ways[key], STEPS, device))
            pictures[key] = list(ways[key].busy)
            bar.update()
    rows: list[dict[str, Any]] = []
    for (way_name, m), mine in samples.items():
        everyone: list[Any] = [None] * dist.get_world_size()
        pictured = pictures[way_name, m] if way_name in PICTURED and m == PICTURED_BY else []
        dist.all_gather_object(everyone, (mine, pictured))
        seconds = [sample[0] for sample in everyone[0][0]]
        idle = [statistics.median(1 - sum(work.values()) / s for s, work, _ in theirs) for theirs, _ in everyone]
        phases = [{phase: statistics.median(s[1][phase] for s in theirs) for phase in PHASES} for theirs, _ in everyone]
        sent = [theirs[0][2] for theirs, _ in everyone]
        row: dict[str, Any] = {
            "net": case.title,
            "variant": way_name,
            "micro_batches": m,
            "ms": [1e3 * q for q in quartiles(seconds)],
        }
        row |= {"idle": idle, "phases_s": phases, "sent_bytes": sent, "seconds": seconds}
        rows.append(row | ({"timeline": [picture for _, picture in everyone]} if pictured else {}))
    base = {row["micro_batches"]: row["seconds"] for row in rows if row["variant"] == BASE}
    for row in rows:
        if row["variant"] != "BP DDP":
            ratios = [a / b for a, b in zip(row["seconds"], base[row["micro_batches"]], strict=True)]
            row["to_gpipe"] = quartiles(ratios)
    return rows


def work(rank: int, url: str, args: argparse.Namespace) -> None:
    """What each process does; rank 0 prints and writes."""
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    reuse_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=args.stages)
    rows = []
    for case in QUICK if args.quick else [NETS[name] for name in args.nets]:
        rows += measure(case, args, device)
    if rank == 0:
        link = f" over {args.link}" if args.link else ""
        title = f"{args.stages} processes{link}, {hardware(device)}, torch {torch.__version__}, {args.rounds} rounds"
        print(f"{title}\n{table(rows)}")
        if not args.quick:
            name = "_".join(["pipeline", device.type, *args.link.split("/")[0].split()])
            write_raw(name, device, rows, args.out)
            chart(rows, title, args.out / f"{name}.png")
            timeline(rows, args.out / f"{name}_timeline.png")
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(LAST_TENSORS_S)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| net | way | micro-batches | ms | to BP GPipe | waits, % by stage | sends, kB by stage |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, median, high = row["ms"]
        ratio = "{1:.3f} ({0:.3f}-{2:.3f})".format(*row["to_gpipe"]) if "to_gpipe" in row else ""
        idle = ", ".join(f"{100 * share:.0f}" for share in row["idle"])
        sent = ", ".join(f"{count / 1e3:.1f}" for count in row["sent_bytes"])
        ddp = row["variant"] == "BP DDP"
        lines.append(
            f"| {row['net']} | {row['variant']} | {'' if ddp else row['micro_batches']} "
            f"| {median:.1f} ({low:.1f}-{high:.1f}) | {ratio} | {'' if ddp else idle} | {sent} |"
        )
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib's, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each way's step time over the number of micro-batches, a panel for each net."""
    plt = pyplot()
    nets = list(dict.fromkeys(row["net"] for row in rows))
    size = (4 * len(nets), 3.4)
    figure, panels = plt.subplots(1, len(nets), figsize=size, dpi=150, layout="constrained", squeeze=False)
    panels = panels[0]
    for panel, net in zip(panels, nets, strict=True):
        of_net = [row for row in rows if row["net"] == net]
        for name in dict.fromkeys(row["variant"] for row in of_net):
            mine = [row for row in of_net if row["variant"] == name]
            if name == "BP DDP":
                panel.axhline(mine[0]["ms"][1], color="0.6", linestyle=":", label=name)
                continue
            style = "--" if name in CHAINED else "-"
            m = [row["micro_batches"] for row in mine]
            panel.plot(m, [row["ms"][1] for row in mine], style, marker="o", markersize=3, label=name)
        panel.set(
            xscale="log", xticks=MICRO_BATCHES, xticklabels=MICRO_BATCHES, xlabel="micro-batches", ylabel="ms a step"
        )
        panel.minorticks_off()
        panel.set_title(net, fontsize=9)
        panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def timeline(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what each stage does when, in two steps in a row of the last net by two ways."""
    plt = pyplot()
    shown = [row for row in rows if "timeline" in row and row["net"] == rows[-1]["net"]]
    colors = {"forward": "tab:blue", "backward": "tab:orange", "update": "tab:green"}
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(9, 1.7 * len(shown)), dpi=150, layout="constrained", sharex=True
    )
    for panel, row in zip(panels, shown, strict=True):
        start = min(a for stage in row["timeline"] for _, a, _ in stage)
        for number, stage in enumerate(row["timeline"]):
            for what, color in colors.items():
                bars = [(1e3 * (a - start), 1e3 * (b - a)) for name, a, b in stage if name.startswith(what)]
                label = what if number == 0 else None
                panel.broken_barh(bars, (number - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.4, label=label)
        panel.set(yticks=range(len(row["timeline"])), yticklabels=[f"stage {n}" for n in range(len(row["timeline"]))])
        panel.invert_yaxis()
        panel.set_title(f"{row['variant']}, {row['net']}, {row['micro_batches']} micro-batches", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside upper right")
    panels[-1].set_xlabel("ms")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive_int, default=2, metavar="P", help="processes (default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET", help="default: all")
    parser.add_argument("--rounds", type=positive_int, default=20, help="samples of each way (default: 20)")
    parser.add_argument("--out", type=Path, default=MEASURED, metavar="DIR", help="default: runs/benchmarks")
    parser.add_argument("--rank", type=int, metavar="R", help="be the process of this stage alone, not all of them")
    parser.add_argument("--url", metavar="URL", help="where the processes meet, with --rank")
    parser.add_argument("--link", default="", metavar="NAME", help="what lies between the processes, for the title")
    parser.add_argument("--quick", action="store_true", help="one tiny net, two rounds, no files: to see that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < args.stages:
        parser.error(f"--stages: got {args.stages}, but there are {torch.cuda.device_count()} GPUs")
    if (args.rank is None) != (args.url is None):
        parser.error("--rank and --url go together")
    if args.stages < 2 or args.rounds < 2:
        parser.error("--stages and --rounds: expected 2 or more")
    args.rounds = 2 if args.quick else args.rounds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.rank is not None:
        work(args.rank, args.url, args)
    else:
        url = f"tcp://127.0.0.1:{free_port()}"
        multiprocessing.start_processes(work, (url, args), nprocs=args.stages, start_method="spawn")


if __name__ == "__main__":
    main()
