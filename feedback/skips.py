"""Find what a cut at the feedback points does not cut: parameters that the error at the logits still reaches.

A parameter that is reached from two of {each point's h_l, the logits} learns from two errors, and the one from further
up comes by backpropagation: a path leads around a point, or the weight is shared.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedback.calls import tensors_in

SHOWN = 6  # names in a message


def reached(root: Any, without: Any = None) -> set[Tensor]:
    """The leaf tensors that a backward pass from the node `root` of autograd's graph gets to, not through `without`."""
    found: set[Tensor] = set()
    nodes, seen = [root], {root, without}
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(node.variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def reached_twice(model: nn.Module, ends: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of `model`'s parameters that are reached from more than one of `ends`, and from which."""
    by_end = {name: reached(end.grad_fn) for name, end in ends.items()}
    found = {}
    for name, parameter in model.named_parameters():
        froms = [end for end, leaves in by_end.items() if parameter in leaves]
        if len(froms) > 1:
            found[name] = froms
    return found


def separators(model: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """The first submodules, outermost first, past which no path leads: all that flows on passes through their output.

    One whose output is that of a module around it is left out, and so is one whose output has another batch size than
    the logits, as a table of positions.
    """
    nodes: dict[str, Any] = {}
    batches: dict[str, int] = {}
    calls: dict[str, int] = {}

    def note(name: str, out: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(out, Tensor) and out.grad_fn is not None and out.dim() > 1:
            nodes[name], batches[name] = out.grad_fn, len(out)

    handles: list[RemovableHandle] = [
        module.register_forward_hook(lambda m, i, out, name=name: note(name, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    top = logits.grad_fn
    found: dict[Any, str] = {}
    for name, node in sorted(nodes.items(), key=lambda item: item[0].count(".")):
        if calls[name] > 1 or batches[name] != len(logits) or node is top or node in found:
            continue
        below = reached(node)
        if below and not below & reached(top, node):
            found[node] = name
    return [name for name in itertools.islice(found.values(), 2 * SHOWN) if cuts(model, name, run)]


def cuts(model: nn.Module, name: str, run: Callable[[], Tensor]) -> bool:
    """Whether the submodule's output, detached, leaves no path: another hook may have taken the output before."""
    outputs: list[Tensor] = []

    def detach(module: nn.Module, inputs: tuple, h: Tensor) -> Tensor:
        outputs.append(h)
        return h.detach()

    handle = model.get_submodule(name).register_forward_hook(detach)
    try:
        logits = run()
    finally:
        handle.remove()
    return not reached(outputs[0].grad_fn) & reached(logits.grad_fn)


def check_skips(model: nn.Module, run: Callable[[], Tensor], ends: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a parameter is reached twice, naming it and the points that would do.

    Args:
        model: with its points cut; without gradients or in training mode it is as it was before.
        run: runs the model on an example and returns its logits.
        ends: each point's h_l and the logits, of a forward pass with the points cut.
    """
    twice = reached_twice(model, ends)
    if not twice:
        return
    first, *others = next(iter(twice.values()))
    instead = some(separators(model, run))
    advice = (
        f"No path leads around {instead}: take points of these"
        if instead
        else "No module would do instead: untie what is shared"
    )
    raise ValueError(
        f"a path leads around a feedback point, or a weight is shared: {some(twice)} would learn from {first!r} and by"
        f" backpropagation from {some(others)} as well. {advice}, or allow_skips=True to train so all the same"
    )


def check_other_outputs(out: Any, logits: Tensor) -> None:
    """Raise ValueError where the model computes a loss as it does its logits: the error would not go to the points.

    A loss is what has no more than one dimension. torch.compile's traces are not looked at.
    """
    if torch.compiler.is_compiling():
        return
    others = [*tensors_in(out)]
    if sum(other is logits for other in others) > 1:
        raise ValueError("the model returns its logits twice, expected once: a loss of the others would reach no point")
    for other in others:
        if other.dim() < 2 and other.grad_fn is not None and reached(other.grad_fn) & reached(logits.grad_fn):
            raise ValueError(
                "the model returns a loss of its logits, whose error would not reach the feedback points: call it"
                " without labels, and compute the loss from the logits that it returns"
            )


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
