"""The tape: what one backward pass said about each parameter's per-example gradients.

Layers write on it only while the private step runs its own backward pass. A forward pass, an
attack's gradients and an evaluation write nothing, so nothing of them can reach the clipped sum.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from privacy.clipping.gradients import PerExampleGradients, combine
from privacy.errors import StepError, UnsupportedLayer

__all__ = ["Tape"]


class _Watch(Protocol):
    """Knows what the model was when its rows were proved to be examples; see `watch.Watch`."""

    def enter(self, layer: str) -> tuple[bool, ...]: ...

    def check(self) -> None: ...

    def prove(self, seen: Iterable[tuple[bool, ...]]) -> None: ...


class Tape:
    """Collects per-example gradients while it records; a class: layers and step share its state."""

    def __init__(self) -> None:
        self._examples: int | None = None
        self._copies = 1
        self._parts: dict[nn.Parameter, list[PerExampleGradients]] = {}
        self._chosen: Tensor | None = None
        self._strayed: list[tuple[str, Tensor]] = []
        self._inputs: list[tuple[str, Tensor]] = []
        self._watch: _Watch | None = None
        self._seen: set[tuple[bool, ...]] = set()
        self._asked: set[tuple[int, int, int]] = set()

    def watched(self, watch: _Watch) -> None:
        """From now on the model is held against what it was."""
        self._watch = watch
        self._asked.clear()

    def enter(self, layer: str) -> tuple[bool, ...] | None:
        """The modes in which a recorded layer is called, for `passed`; refuses a changed model."""
        return None if self._watch is None else self._watch.enter(layer)

    def passed(self, modes: tuple[bool, ...] | None) -> None:
        """Notes in which modes a layer was called that a recording came through."""
        if modes is not None:
            self._seen.add(modes)

    def check(self) -> None:
        """Refuses a model that is not what it was."""
        if self._watch is not None:
            self._watch.check()

    def prove(self) -> None:
        """Refuses a recording of layers in modes in which examples mix."""
        seen, self._seen = self._seen, set()
        if self._watch is not None:
            self._watch.prove(seen)

    def due(self, *, examples: int, copies: int, graph: int = 0) -> bool:
        """Whether the first batch of a kind comes: the order of its rows is then to be proved.

        `graph` is a fingerprint of the losses' graph: a loss that is made in another way may mix.
        """
        kind = (examples if copies > 1 else 0, copies, graph)
        first = kind not in self._asked
        self._asked.add(kind)
        return first

    def ask_again(self) -> None:
        """Takes back every `due`: a proof of the rows' order failed."""
        self._asked.clear()

    @property
    def recording(self) -> bool:
        """Whether a private backward pass is running."""
        return self._examples is not None

    @contextmanager
    def record(self, *, examples: int, copies: int = 1) -> Iterator[None]:
        """Records one backward pass over so many examples, on an empty tape.

        A layer may see each `copies` times, in adjacent rows: the gradients of copies are added up.
        """
        if self.recording:
            raise StepError("a private backward pass is already running on this model")
        self._parts = {}
        self._seen = set()
        self._examples, self._copies = examples, copies
        try:
            yield
        finally:
            self._examples = None

    @contextmanager
    def trace(
        self, *, examples: int, copies: int, chosen: Tensor
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Looks whose rows a backward pass from `chosen` examples reaches; writes nothing else.

        Yields the layers in the order of the pass, each with whether others' rows were reached.
        """
        with self.record(examples=examples, copies=copies):
            self._chosen, self._strayed, self._inputs = chosen, [], []
            try:
                yield self._strayed
            finally:
                self._chosen = None

    @property
    def tracing(self) -> bool:
        """Whether a `trace` is under way."""
        return self._chosen is not None

    @torch.no_grad()
    def note(self, layer: str, inputs: Tensor, output_gradient: Tensor) -> None:
        """Notes whether a layer's gradient lies in other rows than those of the chosen examples.

        What is not finite proves nothing: a broken row times zero is broken too.
        """
        assert self._chosen is not None, "a trace is under way"
        rows = output_gradient.detach().reshape(len(output_gradient), -1)
        reached = ((rows != 0) & rows.isfinite()).any(1)
        own = self._chosen.repeat_interleave(self.copies(rows=len(rows), layer=layer))
        self._strayed.append((layer, (reached & ~own).any()))
        self._inputs.append((layer, inputs))

    def first_inputs(self) -> list[Tensor]:
        """What the model's first layer saw in the last trace, and an empty note of it."""
        inputs, self._inputs = self._inputs, []
        return [rows for layer, rows in inputs if layer == inputs[-1][0]]

    def reset(self) -> None:
        """Forgets a recording that something interrupted before it could end."""
        self._examples, self._parts, self._chosen, self._inputs = None, {}, None, []

    def copies(self, *, rows: int, layer: str) -> int:
        """How many adjacent rows are one example, where `layer` saw so many; refuses others.

        All copies, or as many as a pass has where the losses come from several.
        """
        adjacent, rest = divmod(rows, self._examples) if self._examples else (0, 0)
        if adjacent and not rest and self._copies % adjacent == 0:
            return adjacent
        raise UnsupportedLayer(
            f"{layer}: expected {self._examples} rows, one an example as in the losses, got "
            f"{rows}: rows that are not examples cannot be clipped one by one; keep the "
            "batch in dimension 0 and one loss an example"
        )

    def add(self, parameter: nn.Parameter, part: PerExampleGradients) -> None:
        """Writes down one use of `parameter`."""
        self._parts.setdefault(parameter, []).append(part)

    @torch.no_grad()
    def take(self) -> dict[nn.Parameter, PerExampleGradients]:
        """The gradients of every parameter that was used, and an empty tape again."""
        parts, self._parts = self._parts, {}
        return {parameter: combine(of_parameter) for parameter, of_parameter in parts.items()}
