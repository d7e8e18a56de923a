"""How a model is called, and where its output has the logits."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from feedback.checks import shape_of


def arguments(example: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments: a tuple is the first, a dict the second, anything else is one argument."""
    if isinstance(example, tuple):
        return example, {}
    return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})


def tensors_in(value: Any, around: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Every Tensor in nested dicts, lists, tuples and attributes; `around` are the ids of what `value` is in."""
    items: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        items = vars(value).values()
    if id(value) not in around:  # an object may have itself in it
        for item in items:
            yield from tensors_in(item, (*around, id(value)))


def logits_in(output: Any, key: str | int | None) -> Any:
    """The model's output, or what it has under `key`, if it is more than a Tensor: an attribute, a key or an index.

    Raises:
        ValueError: it has none.
    """
    if key is None or isinstance(output, Tensor):
        return output
    if not isinstance(output, Mapping) and isinstance(key, str) and hasattr(output, key):
        return getattr(output, key)
    if isinstance(output, (Mapping, list, tuple)):
        try:
            return output[key_in(output, key)]
        except (LookupError, TypeError):
            pass
    raise ValueError(f"the model returns {described(output)}, expected logits in it at {key!r}")


def key_in(output: Any, key: str | int) -> Any:
    """The key of a Mapping for an index, as Hugging Face's outputs take one; else `key`."""
    return [*output][key] if isinstance(output, Mapping) and isinstance(key, int) and key not in output else key


def with_logits(output: Any, key: str | int | None, logits: Tensor) -> Any:
    """A copy of the model's output with other logits."""
    if key is None or isinstance(output, Tensor):
        return logits
    if type(output) is dict:
        return {**output, key_in(output, key): logits}
    if isinstance(output, tuple):
        if isinstance(key, str):
            return output._replace(**{key: logits})  # type: ignore[attr-defined]
        items = [*output]
        items[key] = logits
        return getattr(type(output), "_make", type(output))(items)
    if isinstance(output, (Mapping, list)):
        output = copy.copy(output)
        output[key_in(output, key)] = logits  # type: ignore[index]
        return output
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{str(key): logits})  # type: ignore[type-var]
    output = copy.copy(output)
    setattr(output, str(key), logits)
    return output


def described(output: Any) -> str:
    """For messages: an output's type, and what it has where."""
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {list(output)}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}"
    return shape_of(output)
