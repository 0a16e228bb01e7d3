"""The graph of the losses: what it is made of, and the layers at which they begin.

A loss that begins to mix examples in the middle of a training has another graph from then on, or
gradients in other places at its head; neither can be seen from the losses' values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from privacy.clipping.tape import Tape

__all__ = ["Graph", "graph_of"]

_REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class Graph:
    """What a walk through a graph found.

    Attributes:
        fingerprint: The same for graphs of the same operations put together in the same way, in
            this process.
        heads: The recorded layers from which the losses are made with no other one between, each
            its name and its node of the graph.
        hidden: Whether a part of it exists in a backward pass only (a reentrant checkpoint), which
            cannot stop half way.
    """

    fingerprint: int
    heads: tuple[tuple[str, Any], ...]
    hidden: bool


def graph_of(losses: torch.Tensor, tape: Tape) -> Graph:
    """Walks from the losses to the leaves; about a microsecond a node."""
    start: Any = losses.grad_fn
    if start is None:
        return Graph(0, (), hidden=False)
    numbers, order = {start: 0}, [start]
    shape: list[Any] = []
    for node in order:
        shape.append(type(node))
        for following, _ in node.next_functions:
            if following is not None and following not in numbers:
                numbers[following] = len(order)
                order.append(following)
            shape.append(numbers.get(following))
    hidden = any(type(node).__name__ == _REENTRANT for node in order)
    return Graph(hash(tuple(shape)), _heads(start, tape), hidden)


def _heads(start: Any, tape: Tape) -> tuple[tuple[str, Any], ...]:
    """The recorded layers' nodes that are reached without passing another one."""
    heads: list[tuple[str, Any]] = []
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if getattr(node, "tape", None) is tape:
            heads.append((node.layer, node))
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return tuple(heads)
