"""Which weights of a model a backward pass reads to send the error on: what FA and KP replace by B, or must refuse.

A parameter is read where it is multiplied with an activation that needs a gradient. Where it is added, or scales each
feature of its own, no matrix is transported and its gradient stays exact: cls tokens, positions, layer scale,
normalisation. Every other use outside a layer that has a B is refused.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from feedback.attention import attention
from feedback.calls import tensors_in
from feedback.layerwise import CONVOLUTIONS, LayerFeedbackFunction, convolution_of, input_of, project, weights_of

# Operations by the names of their nodes in autograd's graph, without "Backward0"
LAYER = "LayerFeedbackFunction"  # of out, x, weight, ...
LOOKUPS = {"Embedding", "EmbeddingBag"}
ELEMENTWISE = {
    *("Add", "Sub", "Rsub", "Cat", "Stack", "Where", "MaskedFill", "IndexPut", "Maximum", "Minimum"),
    *("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm"),
    "PreluKernel",
}
SCALING = {"Mul", "Div", "Pow", "Lerp", "Addcmul", "Addcdiv"}  # elementwise, unless an activation is broadcast
EXPANDED = {"Expand", "Repeat"}
ADDED = {  # the operand that a product only adds
    **{"Addmm": 0, "Baddbmm": 0, "Addbmm": 0, "Addmv": 0, "Convolution": 2, "Linear": 2},
    **{"ScaledDotProductEfficientAttention": 3, "ScaledDotProductCudnnAttention": 3},
}


def feedback_layers(model: nn.Module, run: Callable[[], Any], as_weight: bool = False) -> dict[str, dict[str, Tensor]]:
    """Every layer of `model` that may have feedback, by name: its weights that need a B, by the name of their B.

    They are those that multiply what needs a gradient. `run()` runs an example once through the model, with gradients
    and uncompiled, and returns the output. With `as_weight` (KP), B gets W's gradients.

    Raises:
        ValueError: a parameter elsewhere that is multiplied with what needs a gradient (FA and KP would have to read
            it in the backward pass); a layer that is never reached, shares its weight with another, or pads or attends
            in a way that has no feedback; with `as_weight`, a weight that learns elsewhere, too; or no layer that
            needs feedback.
    """
    layers = {name: layer for name, layer in model.named_modules() if weights_of(name, layer)}
    reached: set[str] = set()

    def mark(name: str, layer: Any, inputs: tuple, named: dict[str, Any], out: Any) -> Any:
        reached.add(name)
        weights = {of: weight.detach() for of, weight in weights_of(name, layer).items()}
        if isinstance(layer, nn.MultiheadAttention):
            return attention(layer, functools.partial(project, layer, name, weights), *inputs, **named)
        x = input_of(inputs, named)
        return LayerFeedbackFunction.apply(None, out.detach(), x, layer.weight, layer.bias, weights[name])

    hooks = [
        layer.register_forward_hook(functools.partial(mark, name), prepend=True, with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with thawed(model) as learning:
            outputs = [*tensors_in(run())]
    finally:
        for hook in hooks:
            hook.remove()

    uses = uses_of_parameters(model, [out.grad_fn for out in outputs], learning)
    owners: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        if name in layers and name not in reached:
            raise ValueError(
                f"layer {name!r} was never reached in the forward pass in eval mode, expected it to be called: a"
                " product with its weight taken elsewhere has no feedback"
            )
        for of, parameter in module.named_parameters(recurse=False):
            if parameter in uses.multiplied:
                raise ValueError(
                    f"module {name!r} is a {type(module).__name__} with weights that FA and KP have no feedback for:"
                    f" {uses.multiplied[parameter]} multiplies {of!r} with what needs a gradient. Have that done by an"
                    " nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.MultiheadAttention, and no class of"
                    f" {type(module).__module__}"
                )
        if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
            raise ValueError(f"layer {name!r} has add_bias_kv or add_zero_attn, expected neither for FA and KP")
        for weight in weights_of(name, module).values():
            if weight in owners:
                raise ValueError(f"layer {name!r} shares its weight with {owners[weight]!r}, expected its own")
            owners[weight] = name
    found = {}
    for name, layer in layers.items():
        found[name] = {of: weight for of, weight in weights_of(name, layer).items() if weight in uses.fed}
        if found[name] and isinstance(layer, CONVOLUTIONS):
            convolution_of(layer)
        for weight in found[name].values():
            if as_weight and weight in uses.elsewhere:
                raise ValueError(tied(model, name, weight, uses.elsewhere[weight]))
    if not any(found.values()):
        raise ValueError(
            "no layer needs feedback: expected an nn.Conv2d, nn.Linear or the like whose input needs a gradient"
        )
    return found


@contextmanager
def thawed(model: nn.Module) -> Iterator[set[Tensor]]:
    """Let every parameter require a gradient; yield those that do so anyway."""
    learning: set[Tensor] = {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield learning
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def tied(model: nn.Module, layer: str, weight: Tensor, kind: str) -> str:
    """Say why KP does not take a weight that has a second use."""
    own = set(model.get_submodule(layer).modules())
    others = [
        name for name, module in model.named_modules() if module not in own and weight in {*module._parameters.values()}
    ]
    where = repr(others[0]) if others else "the model"
    return (
        f"layer {layer!r} shares its weight with {where}, which has it in {kind}, expected its own: KP's B would not"
        " follow a weight that learns elsewhere, too. Give the layer a copy of it, or take FA"
    )


class Uses(NamedTuple):
    """How the parameters of a model are used; an operation's name stands for where.

    Attributes:
        fed: weights of layers that have feedback, whose input needs a gradient.
        multiplied: parameters that are multiplied, outside such layers, with what needs a gradient.
        elsewhere: parameters with any use that is not as the weight of such a layer.
    """

    fed: set[Tensor]
    multiplied: dict[Tensor, str]
    elsewhere: dict[Tensor, str]


def uses_of_parameters(model: nn.Module, roots: Iterable[Any], learning: Set[Tensor]) -> Uses:
    """Walk autograd's graph from the leaves up, and follow each parameter until it meets an activation.

    Args:
        model: all of its parameters require a gradient, so that they are in the graph.
        roots: the nodes of its outputs; its layers that have feedback are `LAYER` nodes.
        learning: the parameters that are trained; an activation needs a gradient if it depends on one of them.

    Raises:
        ValueError: a reentrant checkpoint, whose graph is not to be seen.
    """
    learns: dict[Any, bool] = {None: False}
    made_of: dict[Any, set[Tensor]] = {None: set()}  # parameters, if a node depends on nothing else in the graph
    parameters = set(model.parameters())
    uses = Uses(set(), {}, {})
    for node in leaves_first(roots):
        kind = kind_of(node)
        if kind == "CheckpointFunction":
            raise ValueError("a reentrant checkpoint hides its layers: checkpoint them with use_reentrant=False")
        if hasattr(node, "variable"):
            learns[node], made_of[node] = node.variable in learning, {node.variable} & parameters
            continue
        operands = [operand for operand, _ in node.next_functions]
        learns[node], made_of[node] = any(learns[operand] for operand in operands), set()
        together: set[Tensor] = set().union(*(made_of[operand] for operand in operands))
        if kind == LAYER:
            _, x, weight, *_ = operands
            uses.fed.update(made_of[weight] if learns[x] else ())
            uses.elsewhere.update(dict.fromkeys(made_of[x], kind))
            continue
        for (i, operand), (j, other) in itertools.permutations(enumerate(operands), 2):
            if made_of[operand] and learns[other] and reads(node, i, j, bool(made_of[other])):
                uses.multiplied.update(dict.fromkeys(made_of[operand], kind))
        if kind not in LOOKUPS and all(made_of[operand] for operand in operands if operand is not None):
            made_of[node] = together
        else:
            uses.elsewhere.update(dict.fromkeys(together, kind))
    return uses


def leaves_first(roots: Iterable[Any]) -> list[Any]:
    """The nodes of autograd's graph under `roots`, each after those that it sends gradients to."""
    order: dict[Any, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order[node] = None
        elif node is not None and node not in order:
            stack.append((node, True))
            stack.extend((operand, False) for operand, _ in node.next_functions)
    return list(order)


def kind_of(node: Any) -> str:
    """Its name without Backward0."""
    return node.name().partition("Backward")[0]


def reads(node: Any, i: int, j: int, both_parameters: bool) -> bool:
    """Whether operand `j` gets its gradient through a product with `i`, a parameter, that is not elementwise."""
    kind = kind_of(node)
    if kind in SCALING and not both_parameters:
        operand, output = node.next_functions[j]
        broadcast = operand._input_metadata[output].shape != node._input_metadata[0].shape
        return broadcast or kind_of(operand) in EXPANDED
    return kind not in ELEMENTWISE | SCALING and ADDED.get(kind) not in (i, j)
