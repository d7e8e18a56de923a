"""Which networks of torchvision, timm and transformers `DirectFeedback` takes, and whether its gradients are right.

Run:    python benchmarks/nets.py    (pip install timm transformers; without one of them, its rows are left out)
Prints the table of docs/nets.md, in some 5 minutes, and writes that page and benchmarks/results/nets.json.

What "yes" means is in `direct` and `layerwise`. The gradients that they compare with are plain autograd's.
"""

import argparse
import copy
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import feedback
from benchmarks.nets_to_try import CLASSES, NETS, Net
from benchmarks.raw import write_raw
from feedback import DirectFeedback
from training.machine import REPOSITORY, version

BATCH, USUAL_CLASSES = 4, 1000
RULES = ("DFA", "DKP", "LAS", "FA", "KP")
QUICK = ("nn.TransformerEncoder", "squeezenet1_1", "googlenet")
POOLING: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}
DROPOUT = ("p", "drop_prob", "dropout", "dropout_p", "attention_dropout")  # what modules call a probability
PAGE = """# Networks that were tried

Each network has random weights and a tiny input, in float64 and training mode without dropout; its points are the ends
of stages or blocks. [benchmarks/nets.py](../benchmarks/nets.py) wrote this page, in {minutes:.0f} minutes, with
{versions}:

```bash
python benchmarks/nets.py
```

- **DFA, DKP, LAS**: "yes" if the points are taken, if no parameter below a point learns with B = 0, and if with random
  B every parameter has the gradient of loss + sum of <h_l, signal_l> by plain autograd, with each h_l detached from
  what follows and signal_l worked out by hand; and B, where it learns, has its own. That is tried with `positions=None`
  and `"pooled"`; where the logits have positions, with `"own"` and `"pooled"`.
- **FA, KP**: "yes" if every parameter has backpropagation's gradient with B = W. The points play no part.
- **MiB of B**: at the usual size of network and input, with 1000 classes in float32, with `positions=None` and with
  `"pooled"`. Where the logits have positions, `"own"` takes as much as `"pooled"`. Text has 512 tokens. A language
  model's B grows with its vocabulary.

Gradients agree to 1e-9 of each parameter's norm. A number leads to the message of a refusal, below the table.

| network | points | {rules} | MiB of B | pooled |
|---|---|{dashes}---|---|
"""


def points_of(net: Net, model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(net.points, name)]


def batch(net: Net, size: int) -> Any:
    """A batch of images or texts, as `DirectFeedback` takes its example."""
    x = (
        torch.randint(CLASSES, (BATCH, size))
        if net.key == "input_ids"
        else torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    )
    return x if net.key is None else {net.key: x}


def logits_of(net: Net, model: nn.Module, x: Any, **target: Tensor) -> Tensor:
    out = model(x, **target) if net.key is None else model(**x, **target)
    if net.logits is None or isinstance(out, Tensor):  # a model may return them alone in eval mode
        return out
    return out[net.logits] if isinstance(out, Mapping) else getattr(out, net.logits)


def loss_of(net: Net, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(net.class_dim, 1), y)


def prepared(net: Net) -> tuple[nn.Module, Any, Tensor]:
    """The small network in float64 and training mode, without dropout; an input and its labels."""
    torch.manual_seed(0)
    model, x = net.small().double().train(), batch(net, net.sizes[0])
    for module in model.modules():
        for name in DROPOUT:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        logits = logits_of(net, copy.deepcopy(model), x)
    return model, x, torch.randint(CLASSES, logits.movedim(net.class_dim, -1).shape[:-1])


def signal(h: Tensor, error: Tensor, B: Tensor, class_dim: int, positions: str | None) -> Tensor:
    """What stands in for dL/dh: e @ B, where e and h have the positions that `positions` says."""
    if positions is None:
        return torch.einsum("nk,kd->nd", error, B.flatten(1)).view_as(h)
    h, error = h.movedim(class_dim, -1), error.movedim(class_dim, 1)
    if positions == "pooled":
        pooled = error.flatten(2).sum(2) if error.dim() > 2 else error
        share = (pooled @ B / math.prod(h.shape[1:-1])).view(len(h), *[1] * (h.dim() - 2), -1)
        return share.expand_as(h).movedim(-1, class_dim)
    readout = error.new_zeros(*error.shape[:2], *h.shape[1:-1], requires_grad=True)
    at_logits = POOLING[error.dim() - 2](readout, error.shape[2:])
    (error,) = torch.autograd.grad(at_logits, readout, error, create_graph=True)
    return (error.movedim(1, -1) @ B).movedim(-1, class_dim)


def by_hand(
    net: Net, model: nn.Module, rule: str, matrices: Mapping[str, Tensor], x: Any, y: Tensor, positions: str | None
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The gradient of loss + sum of <h_l, signal_l> for each parameter, and of the sum alone; None where there is none.

    The first has B's gradients at its end. By DKP they are the sum's. By LAS they are those of the loss at the readout
    of h_l, which is the gradient of <h_l, signal_l> by e.
    """
    taps: dict[str, Tensor] = {}

    def cut(name: str) -> Callable[..., Tensor]:
        return lambda module, inputs, h: taps.setdefault(name, h).detach()

    for name in matrices:
        model.get_submodule(name).register_forward_hook(cut(name))
    logits = logits_of(net, model, x)
    loss = loss_of(net, logits, y)
    error = torch.autograd.grad(loss, logits, retain_graph=True)[0].requires_grad_()
    sent = {
        name: (h * signal(h.detach(), error, matrices[name], net.class_dim, positions)).sum()
        for name, h in taps.items()
    }
    both, below = (
        torch.autograd.grad(total, [*model.parameters()], retain_graph=True, allow_unused=True)
        for total in (sum(sent.values(), loss), sum(sent.values(), torch.zeros_like(loss)))
    )
    of_B: list[Tensor] = []
    for name, B in matrices.items():
        total = sent[name]
        if rule == "LAS":
            (readout,) = torch.autograd.grad(total, error, create_graph=True)
            total = loss_of(net, readout, y)
        of_B += torch.autograd.grad(total, B, retain_graph=True) if rule != "DFA" else ()
    return [*both, *of_B], below


def compared(model: nn.Module, expected: Sequence[Tensor | None]) -> str:
    """ "yes", or the first parameter whose gradient differs by more than 1e-9 of its norm; None counts as zero."""
    floor = 1e-14 * max(grad.norm().item() for grad in expected if grad is not None)
    for (name, parameter), grad in zip(model.named_parameters(), expected, strict=True):
        got, wanted = (torch.zeros_like(parameter) if g is None else g for g in (parameter.grad, grad))
        if not (got - wanted).norm() <= 1e-9 * wanted.norm() + floor:
            return f"the gradient of {name!r} differs by {(got - wanted).norm() / wanted.norm():.1e} of its norm"
    return "yes"


def wrapped(net: Net, model: nn.Module, rule: str, x: Any, positions: str | None = None) -> DirectFeedback:
    points, copied = points_of(net, model), copy.deepcopy(model)
    return DirectFeedback(copied, points, rule, x, logits=net.logits, class_dim=net.class_dim, positions=positions)


def direct(net: Net, model: nn.Module, rule: str, x: Any, y: Tensor, positions: str | None) -> str:
    """ "yes" if the gradients are those by hand, and with B = 0 nothing learns below a point; or what is not so."""
    wrapper = wrapped(net, model, rule, x, positions)
    matrices = dict(zip(wrapper.points, (B.detach().clone().requires_grad_() for B in wrapper.matrices()), strict=True))
    expected, below = by_hand(net, copy.deepcopy(model), rule, matrices, x, y, positions)
    loss_of(net, logits_of(net, wrapper, x, target=y), y).backward()
    if (answer := compared(wrapper, expected)) != "yes":
        return answer
    wrapper.zero_grad()
    for B in wrapper.matrices():
        B.data.zero_()
    loss_of(net, logits_of(net, wrapper, x, target=y), y).backward()
    learning = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in wrapper.model.parameters()]
    if any(learns for learns, grad in zip(learning, below, strict=True) if grad is not None):
        return "with B = 0, a parameter below a point learns"
    return "yes" if any(grad is not None and grad.any() for grad in below) else "nothing learns below a point"


def layerwise(net: Net, model: nn.Module, rule: str, x: Any, y: Tensor) -> str:
    """ "yes" if the gradients are backpropagation's where B is W; or what differs."""
    wrapper, plain = wrapped(net, model, rule, x), copy.deepcopy(model)
    weights = {name.replace(".", "_"): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, B in wrapper.feedback.state_dict(keep_vars=True).items():
        B.data.copy_(weights[name if name in weights else f"{name}_weight"])
    for module in (wrapper, plain):
        loss_of(net, logits_of(net, module, x), y).backward()
    return compared(wrapper.model, [parameter.grad for parameter in plain.parameters()])


def memory(net: Net, positions: bool) -> dict[str, Any]:
    """The points of the usual network and the MiB of B, whole (unless the logits have positions) and pooled."""
    with torch.no_grad():
        try:
            with torch.device("meta"):
                model = net.usual().double().eval()
        except NotImplementedError:  # by a model whose constructor reads values, which that device does not have
            model = net.usual().double().eval().to("meta")
        shapes: dict[str, torch.Size] = {}
        for name in points_of(net, model):
            note = partial(shapes.setdefault, name)
            model.get_submodule(name).register_forward_hook(lambda module, inputs, h, note=note: note(h.shape) and None)
        with torch.device("meta"):
            logits_of(net, model, batch(net, net.sizes[1]))
    mib = 4 * USUAL_CLASSES / 2**20
    whole = None if positions else mib * sum(math.prod(shape[1:]) for shape in shapes.values())
    return {
        "points": [*shapes],
        "MiB": whole,
        "MiB_pooled": mib * sum(shape[net.class_dim] for shape in shapes.values()),
    }


def tried(net: Net) -> dict[str, Any]:
    """A row: the answer for each rule, and the memory of B if direct rules are taken."""
    model, x, y = prepared(net)
    variants: list[str | None] = ["own" if y.dim() > 1 else None, "pooled"]
    row: dict[str, Any] = {"network": net.name, "points": points_of(net, model), "MiB": None, "MiB_pooled": None}
    for rule in RULES:
        try:
            if feedback.RULES[rule].layerwise:
                answers = [layerwise(net, model, rule, x, y)]
            else:
                answers = [direct(net, model, rule, x, y, positions) for positions in variants]
        except ValueError as refusal:
            answers = [str(refusal)]
        row[rule] = next((answer for answer in answers if answer != "yes"), "yes")
    return row | (memory(net, y.dim() > 1) if row["DFA"] == "yes" else {})


def page(rows: list[dict[str, Any]], minutes: float) -> str:
    """docs/nets.md; what is not "yes" becomes a number, and follows the table."""
    notes: dict[str, int] = {}
    lines = []
    for row in rows:
        first, *others = row["points"]
        points = f"`{first}`" + (f" to `{others[-1]}` ({len(row['points'])})" if others else "")
        answers = [
            row[rule] if row[rule] == "yes" else f"({notes.setdefault(row[rule], len(notes) + 1)})" for rule in RULES
        ]
        mib = ["" if row[key] is None else f"{row[key]:,.1f}" for key in ("MiB", "MiB_pooled")]
        lines.append("| " + " | ".join([row["network"], points, *answers, *mib]) + " |")
    versions = ", ".join(f"{package} {version(package)}" for package in NETS if version(package))
    top = PAGE.format(minutes=minutes, versions=versions, rules=" | ".join(RULES), dashes="---|" * len(RULES))
    return top + "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]) + "\n"


def main() -> None:
    """Try the networks; print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three networks, to see that it runs; writes nothing")
    args = parser.parse_args()
    nets: list[Net] = []
    for package, nets_of in NETS.items():
        try:
            nets += nets_of()
        except ImportError as error:
            print(f"the networks of {package} are left out: {error}")
    nets = [net for net in nets if net.name in QUICK or not args.quick]
    start = time.perf_counter()
    rows = [tried(net) for net in tqdm(nets, unit="network", leave=False, disable=None)]
    text = page(rows, (time.perf_counter() - start) / 60)
    print(text)
    if not args.quick:
        write_raw("nets", torch.device("cpu"), rows, REPOSITORY / "benchmarks" / "results")  # whose commit is this one
        (REPOSITORY / "docs" / "nets.md").write_text(text)


if __name__ == "__main__":
    main()
