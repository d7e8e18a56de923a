"""What a training step costs by each rule: forward, backward and optimiser, beside a plain BP step of the same net.

Run:    python benchmarks/step_time.py
Prints a table, and writes it as JSON and a bar chart as PNG beside it. Variants of a net are timed in random order,
round by round, so that a ratio is of steps that ran seconds apart. For each net and memory format there are:

    BP              the bare model in plain PyTorch
    floor           forward and weight gradients only; the learning signals at the points are given for nothing
    DFA, DKP, ...   `feedback.DirectFeedback`; DKP's B learned by Adam (optimizer) or in the backward pass (inplace),
                    the others' by Adam, and KP's as the weights; HEAD 32 4 has heads of width 32 that pool to 4x4

With `--device cuda` every step runs eager, compiled and captured as a CUDA graph; `--executions graph-streams` is a
graph with each block on a stream of its own, where its backward may run beside those of others. BP, whose blocks wait
for one another, keeps to one stream.
"""

import argparse
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import MEASURED, write_raw
from feedback import RULES, DirectFeedback
from feedback.heads import default_head
from models import AlexNet, ConvNet, Net
from training.arguments import positive_int
from training.machine import hardware, reuse_memory

WARM_UP = 3  # untimed steps of each variant
STEPS_PER_SAMPLE, GPU_WARM_UP_S = 20, 0.5  # on a GPU
VARIANTS: dict[str, dict[str, Any] | None] = {  # the wrapper's arguments, or None where there is no wrapper
    "BP": None,
    "floor": None,
    "DFA": {"rule": "DFA"},
    "DKP optimizer": {"rule": "DKP"},
    "DKP inplace": {"rule": "DKP", "update": "inplace", "feedback_lr": 5e-3, "feedback_weight_decay": 1e-6},
    "LAS": {"rule": "LAS"},
    "HEAD": {"rule": "HEAD"},
    "HEAD 32 4": {"rule": "HEAD", "head": functools.partial(default_head, width=32, pool=4)},
    "LOCAL": {"rule": "LOCAL"},
    "FDFA": {"rule": "FDFA"},
    "FA": {"rule": "FA"},
    "KP": {"rule": "KP"},
}
# many nets of one class are compiled here, told apart by their hooks
DYNAMO: dict[str, Any] = {"skip_nnmodule_hook_guards": False, "cache_size_limit": 64}
CAPTURED = ("graph", "graph-streams")  # executions as a CUDA graph
Step = Callable[[], None]
Roots = tuple[list[Tensor], list[Tensor | None]]  # what to go backward from, and the gradients there
Forward = Callable[[Tensor, Tensor], Roots]


class Cell(NamedTuple):
    """What is timed together: a net, its batch, and the ways (memory format, precision, execution) to run it."""

    net: str
    batch: int
    ways: list[tuple[str, str, str]]

    def example(self) -> tuple[type[Net], int, int]:
        """The net's class, its image size in pixels, and its number of classes."""
        return (ConvNet, 32, 10) if self.net == "ConvNet" else (AlexNet, 224, 100)


def cells(
    device: torch.device, quick: bool, nets: Sequence[str], batches: Sequence[int] | None, executions: Sequence[str]
) -> list[Cell]:
    """What to time on `device`: on a CPU, both memory formats; on CUDA, precisions and executions, in channels_last."""
    if device.type == "cpu":
        ways = [("contiguous", "fp32", "eager"), ("channels_last", "fp32", "eager")]
        sizes = [("ConvNet", 64), ("ConvNet", 512), ("AlexNet", 32), ("AlexNet", 128)]
    else:
        ways = list(itertools.product(["channels_last"], ["fp32", "bf16"], executions))
        sizes = [("ConvNet", 64), ("ConvNet", 512), ("AlexNet", 256)]
    sizes = [(net, batch) for net, batch in sizes if net in nets and batch in (batches or [batch])]
    sizes = sizes[:1] if quick else sizes
    return [Cell(net, 2 if quick else batch, ways) for net, batch in sizes]


def floor_forward(model: Net) -> Forward:
    """A forward pass whose backward gives every block a gradient at its output that nobody had to compute."""
    activations: list[Tensor] = []
    signals: list[Tensor] = []

    def tap(module: nn.Module, inputs: tuple, h: Tensor) -> Tensor:
        activations.append(h)
        return h.detach()

    for point in model.points:
        model.get_submodule(point).register_forward_hook(tap)

    def forward(x: Tensor, y: Tensor) -> Roots:
        activations.clear()
        loss = F.cross_entropy(model(x), y)
        if not signals:
            signals.extend(1e-4 * torch.randn_like(h) for h in activations)
        if len(activations) != len(model.points):
            raise RuntimeError("the floor's blocks are not cut apart: its compiled net is another one's")
        return [loss, *activations], [None, *signals]

    return forward


def make_step(cell: Cell, variant: str, way: tuple[str, str, str], device: torch.device, fused: bool = True) -> Step:
    """A whole training step of one variant, on random images; its optimisers fused or not."""
    memory_format, precision, execution = way
    net_class, side, classes = cell.example()
    torch.manual_seed(0)
    model = net_class(classes).to(device)
    x = torch.randn(cell.batch, 3, side, side, device=device)
    y = torch.randint(classes, (cell.batch,), device=device)
    if memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(memory_format=torch.channels_last)
    kind: dict[str, Any] = {"fused": fused, "weight_decay": 1e-6}
    options = VARIANTS[variant]
    net: nn.Module = model
    weights, learned = list(model.parameters()), list[nn.Parameter]()
    if options is not None:
        net = DirectFeedback(model, model.points, example=x[:1], **options)
        learned = [B for B in net.feedback.parameters() if B.requires_grad]
        if RULES[net.rule].as_weight:
            weights, learned = weights + learned, []
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(weights, 5e-4, 0.9, nesterov=True, **kind)]
    if learned:
        optimizers.append(torch.optim.Adam(learned, 1e-4, capturable=execution in CAPTURED, **kind))
    if execution == "compiled":
        net.compile()
    target = {} if options is None else {"target": y}
    forward = (
        floor_forward(model) if variant == "floor" else lambda x, y: ([F.cross_entropy(net(x, **target), y)], [None])
    )
    if execution == "graph-streams" and variant != "BP":
        on_side_streams(model)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            roots, signals = forward(x, y)
        torch.autograd.backward(roots, signals)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:  # last, so that between steps there are no gradients
            optimizer.zero_grad()

    return capture(step) if execution in CAPTURED else step


@functools.cache
def side_stream(i: int) -> "torch.cuda.Stream":
    """The i-th of this process; made once, since CUDA's 32 streams would come round again."""
    return torch.cuda.Stream()


@functools.cache
def graph_pool() -> Any:
    """The memory that all graphs work in, one after the other: nothing there outlives a step."""
    return torch.cuda.graph_pool_handle()


def on_side_streams(model: Net) -> None:
    """Have each block of `model.points` run on a CUDA stream of its own, its feedback point included.

    Autograd runs the backward of an operation on the stream of its forward, so blocks that wait for nothing but e may
    go backward side by side. To be called last: the hooks that cut the blocks apart are to run before `leave`.
    """
    homes: list[torch.cuda.Stream] = []

    def enter(stream: torch.cuda.Stream, block: nn.Module, inputs: tuple) -> None:
        homes.append(torch.cuda.current_stream())
        stream.wait_stream(homes[-1])
        for x in inputs:
            x.record_stream(stream)
        torch.cuda.set_stream(stream)

    def leave(stream: torch.cuda.Stream, block: nn.Module, inputs: tuple, h: Tensor) -> None:
        home = homes.pop()
        home.wait_stream(stream)
        h.record_stream(home)
        torch.cuda.set_stream(home)

    for i, point in enumerate(model.points, start=1):
        stream, block = side_stream(i), model.get_submodule(point)
        block.register_forward_pre_hook(functools.partial(enter, stream))
        block.register_forward_hook(functools.partial(leave, stream))


def capture(step: Step) -> Step:
    """The same step as a CUDA graph."""
    stream = side_stream(0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graph_pool(), stream=stream):
        step()

    def replay(owner: Step = step) -> None:
        """Run the graph, on the weights, images and optimiser state that `owner` keeps alive."""
        graph.replay()

    return replay


def seconds(step: Step, device: torch.device) -> float:
    """How long one step takes; on a GPU, by its own clock, the mean of `STEPS_PER_SAMPLE` that follow one another."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS_PER_SAMPLE):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / STEPS_PER_SAMPLE
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def warm_up(step: Step, device: torch.device) -> None:
    """Run untimed steps; on a GPU for half a second, so that its clock has risen."""
    begin = time.perf_counter()
    for number in itertools.count(1):
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP and (device.type == "cpu" or time.perf_counter() - begin > GPU_WARM_UP_S):
            return


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that one step holds beyond what there is between steps: activations, gradients, signals.

    Weights, B and what the optimisers keep (as much as the weights; for DKP's optimizer twice B) are there all along.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def compiles(variant: str, way: tuple[str, str, str]) -> bool:
    """Whether a variant can be run in this way: forward-mode differentiation does not compile."""
    return way[2] != "compiled" or variant != "FDFA"


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles; the middle one is the median."""
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(cell: Cell, device: torch.device, rounds: int, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Time every variant of a cell in every way, `rounds` times in random order; yield a row for each."""
    steps = {
        (way, variant): make_step(cell, variant, way, device)
        for way in cell.ways
        for variant in VARIANTS
        if compiles(variant, way)
    }
    memory = {}
    for key, step in steps.items():
        warm_up(step, device)
        way, variant = key
        if variant != "floor" and way[2] not in CAPTURED:  # its signals are kept; a graph's memory is
            memory[key] = peak_bytes(step, device) / 1e6
    times: dict[tuple, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for key in order:
            times[key].append(seconds(steps[key], device))
            bar.update()
    for way, variant in steps:
        ours = times[way, variant]
        row = {"net": cell.net, "batch": cell.batch, "way": " ".join(way), "variant": variant}
        row |= {"ms": [1e3 * value for value in quartiles(ours)], "peak_mb": memory.get((way, variant))}
        for base in ("BP", "floor"):
            ratios = [a / b for a, b in zip(ours, times[way, base], strict=True)]
            row[f"to_{base}"] = quartiles(ratios)
        yield row | {"seconds": ours}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown: medians, quartiles in brackets."""
    lines = ["| net, batch | way | variant | ms | to BP | to the floor | peak, MB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, median, high = row["ms"]
        ratios = " | ".join("{1:.3f} ({0:.3f}-{2:.3f})".format(*row[key]) for key in ("to_BP", "to_floor"))
        lines.append(
            f"| {row['net']} {row['batch']} | {row['way']} | {row['variant']} | {median:.1f} ({low:.1f}-{high:.1f}) "
            f"| {ratios} | {'' if row['peak_mb'] is None else format(row['peak_mb'], '.1f')} |"
        )
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw, for each net and way, bars of the step time as a share of BP's, with the floor as a line across them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [variant for variant in VARIANTS if variant != "floor"]
    hatches = itertools.cycle(("", "//", "..", "xx", "\\\\", "--", "++"))
    looks = {v: (f"{0.25 + 0.7 * i / len(shown):.2f}", next(hatches)) for i, v in enumerate(shown)}
    groups = list(dict.fromkeys((row["net"], row["batch"], row["way"]) for row in rows))
    median = {(row["net"], row["batch"], row["way"], row["variant"]): row["to_BP"][1] for row in rows}
    figure, axes = plt.subplots(figsize=(max(8, 2 * len(groups)), 3.6), dpi=150, layout="constrained")
    width = 0.8 / len(shown)
    for place, group in enumerate(groups):
        for i, variant in enumerate(shown):
            color, hatch = looks[variant]
            height = median.get((*group, variant), 0.0)
            left = place + (i - (len(shown) - 1) / 2) * width
            label = variant if place == 0 else None
            axes.bar(left, height, width, color=color, hatch=hatch, edgecolor="black", linewidth=0.6, label=label)
            axes.text(left, height + 0.01, f"{height:.2f}", ha="center", va="bottom", fontsize=5)
        floor = median[(*group, "floor")]
        label = "floor: signals for nothing" if place == 0 else None
        axes.plot([place - 0.4, place + 0.4], [floor, floor], color="black", linestyle="--", label=label)
    axes.set_xticks(
        range(len(groups)), [f"{net} {batch}\n{way.removesuffix(' fp32 eager')}" for net, batch, way in groups]
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(0, max(1.3, 1.4 * max(median.values())))
    axes.set_ylabel("step time / BP's")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7, ncols=5, loc="upper center")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Measure, print the table, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    nets, executions = ("ConvNet", "AlexNet"), ("eager", "compiled", *CAPTURED)
    parser.add_argument("--nets", nargs="+", choices=nets, default=nets, help="default: both")
    parser.add_argument("--batches", nargs="+", type=positive_int, help="sizes to keep of 32, 64, 128, 256, 512")
    parser.add_argument("--executions", nargs="+", choices=executions, help="CUDA: default all but graph-streams")
    parser.add_argument("--rounds", type=positive_int, default=60, help="timed steps of each variant (default: 60)")
    parser.add_argument(
        "--out", type=Path, default=MEASURED, metavar="DIR", help="of JSON and PNG (default: runs/benchmarks)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one tiny net, three rounds, no files: to see that it runs"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if args.executions and args.device != "cuda":
        parser.error("--executions goes with --device cuda")
    if args.rounds < 2:
        parser.error("--rounds: quartiles take 2 or more")
    device = torch.device(args.device)
    reuse_memory()
    rounds = 3 if args.quick else args.rounds
    todo = cells(device, args.quick, args.nets, args.batches, args.executions or executions[:3])
    if not todo:
        parser.error(f"--batches: no net of {', '.join(args.nets)} has a batch of {args.batches} here")
    rows: list[dict[str, Any]] = []
    total = sum(rounds * sum(compiles(variant, way) for way in cell.ways for variant in VARIANTS) for cell in todo)
    with tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        for cell in todo:
            bar.set_description(f"{cell.net} {cell.batch}")
            with torch._dynamo.config.patch(**DYNAMO):
                rows.extend(measure(cell, device, rounds, bar))
    title = f"{hardware(device)}, torch {torch.__version__}, {rounds} rounds"
    print(f"{title}\n{table(rows)}")
    if not args.quick:
        write_raw(f"step_time_{device.type}", device, rows, args.out)
        chart(rows, title, args.out / f"step_time_{device.type}.png")


if __name__ == "__main__":
    main()
