"""What each of the changes that make a step of direct feedback cheap is worth: the step with it and without it.

Run:    python benchmarks/step_changes.py
        python benchmarks/step_changes.py --return-memory
Prints the step time of ConvNet at batch 64 on a CPU with one change at a time undone, and with ideas that were not
taken, as a ratio to the step as it is, round by round, rounds interleaved in random order. Freed memory is kept or
returned by the whole process, so the second command is for comparing the milliseconds of both.
"""

import argparse
import functools
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.raw import write_raw
from benchmarks.step_time import WARM_UP, Cell, Step, make_step, quartiles, seconds
from feedback import DirectFeedback, direct_feedback, functional, layout
from training.arguments import positive_int
from training.machine import hardware, reuse_memory

DEVICE, BATCH = torch.device("cpu"), 64


def all_at_once(net: DirectFeedback, x: Tensor, target: Tensor | None = None) -> Tensor:
    """The wrapper's forward with every point made behind the logits, so that e meets all B before any block runs."""
    logits, activations = net.tapped_forward(x, cut=True)
    lr, decay = net.feedback_lr, net.feedback_weight_decay
    return direct_feedback(
        logits, list(activations.values()), net.matrices(), rule=net.rule, inplace_lr=lr, inplace_weight_decay=decay
    )


def in_bfloat16(error_NK: Tensor, feedback_KD: Tensor) -> Tensor:
    """e @ B rounded to bfloat16: another result."""
    return (error_NK.bfloat16() @ feedback_KD.bfloat16()).to(error_NK.dtype)


def with_patch(step: Step, place: Any, name: str, value: Any) -> Step:
    """The step with `place.name` replaced while it runs."""

    def patched() -> None:
        kept = getattr(place, name)
        setattr(place, name, value)
        try:
            step()
        finally:
            setattr(place, name, kept)

    return patched


def changes(variant: str, memory_format: str) -> dict[str, Step]:
    """Steps of one variant: as it is, and otherwise."""
    way = (memory_format, "fp32", "eager")
    make = functools.partial(make_step, Cell("ConvNet", BATCH, [way]), variant, way, DEVICE)
    return {
        "as it is": make(),
        "all signals made at once": with_patch(make(), DirectFeedback, "forward", all_at_once),
        "products over the whole batch": with_patch(make(), layout, "CACHED_BYTES", 0),
        "optimisers not fused": make(fused=False),
        "e @ B in bfloat16 (not taken)": with_patch(make(), functional, "learning_signal", in_bfloat16),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=60, help="timed steps of each kind (default: 60)")
    parser.add_argument("--return-memory", action="store_true", help="let glibc return freed memory to the system")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: quartiles take 2 or more")
    if not args.return_memory:
        reuse_memory()
    rounds = 2 if args.quick else args.rounds
    variants = ("DFA", "DKP optimizer", "DKP inplace")
    steps = {
        (memory_format, variant, name): step
        for memory_format in ("contiguous", "channels_last")
        for variant in variants
        for name, step in changes(variant, memory_format).items()
    }
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in steps}
    order = list(steps)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in tqdm(range(rounds), unit="round", leave=False, disable=None):
        random.shuffle(order)
        for key in order:
            times[key].append(seconds(steps[key], DEVICE))
    memory = "freed memory returned" if args.return_memory else "freed memory kept"
    print(f"{hardware(DEVICE)}, torch {torch.__version__}, {rounds} rounds, {memory}")
    print("| memory format | variant | step | ms | to the step as it is |\n|---|---|---|---|---|")
    for key, values in times.items():
        base = times[(*key[:2], "as it is")]
        low, median, high = quartiles([a / b for a, b in zip(values, base, strict=True)])
        print(f"| {' | '.join(key)} | {1e3 * quartiles(values)[1]:.1f} | {median:.3f} ({low:.3f}-{high:.3f}) |")
    if not args.quick:
        names = ("memory_format", "variant", "step")
        rows = [dict(zip(names, key, strict=True)) | {"seconds": values} for key, values in times.items()]
        write_raw(f"step_changes_{memory.replace(' ', '_')}", DEVICE, rows)


if __name__ == "__main__":
    main()
