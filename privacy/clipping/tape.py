"""The tape: what one backward pass said about each parameter's per-example gradients.

Layers write on it only while the private step runs its own backward pass. A forward pass, an
attack's gradients and an evaluation write nothing, so nothing of them can reach the clipped sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from privacy.clipping.gradients import PerExampleGradients, combine
from privacy.errors import StepError, UnsupportedLayer

__all__ = ["Tape"]


class Tape:
    """Collects per-example gradients while it records; a class: layers and step share its state.

    Example:
        >>> tape = Tape()
        >>> with tape.record(examples=4):
        ...     tape.recording
        True
        >>> tape.recording
        False
    """

    def __init__(self) -> None:
        self._examples: int | None = None
        self._copies = 1
        self._parts: dict[nn.Parameter, list[PerExampleGradients]] = {}

    @property
    def recording(self) -> bool:
        """Whether a private backward pass is running.

        Example:
            >>> Tape().recording
            False
        """
        return self._examples is not None

    @contextmanager
    def record(self, *, examples: int, copies: int = 1) -> Iterator[None]:
        """Records one backward pass over `examples` examples, on an empty tape.

        Args:
            examples: How many.
            copies: A layer may see each example this many times, in rows that follow one another:
                the gradients of its copies are added up.

        Raises:
            StepError: A recording is running already.

        Example:
            >>> tape = Tape()
            >>> with tape.record(examples=1):
            ...     pass
        """
        if self.recording:
            raise StepError("a private backward pass is already running on this model")
        self._parts = {}
        self._examples, self._copies = examples, copies
        try:
            yield
        finally:
            self._examples = None

    def reset(self) -> None:
        """Forgets a recording that something interrupted before it could end.

        Example:
            >>> Tape().reset()
        """
        self._examples, self._parts = None, {}

    def copies(self, *, rows: int, layer: str) -> int:
        """How many adjacent rows are one example, where `layer` saw so many rows.

        Raises:
            UnsupportedLayer: Another number of rows than the losses have: they are not examples.

        Example:
            >>> tape = Tape()
            >>> with tape.record(examples=2, copies=3):
            ...     tape.copies(rows=6, layer="fc"), tape.copies(rows=2, layer="fc")
            (3, 1)
        """
        if rows == self._examples:
            return 1
        if self._examples is not None and rows == self._examples * self._copies:
            return self._copies
        raise UnsupportedLayer(
            f"{layer}: expected {self._examples} rows, one an example as in the losses, got "
            f"{rows}: rows that are not examples cannot be clipped one by one; keep the "
            "batch in dimension 0 and one loss an example"
        )

    def add(self, parameter: nn.Parameter, part: PerExampleGradients) -> None:
        """Writes down one use of `parameter`.

        Example:
            >>> from privacy.clipping.gradients import Instantiated
            >>> tape, weight = Tape(), nn.Linear(2, 1).weight
            >>> with tape.record(examples=1):
            ...     tape.add(weight, Instantiated([weight.unsqueeze(0)]))
            >>> list(tape.take()) == [weight]
            True
        """
        self._parts.setdefault(parameter, []).append(part)

    @torch.no_grad()
    def take(self) -> dict[nn.Parameter, PerExampleGradients]:
        """The gradients of every parameter that was used, and an empty tape again.

        Example:
            >>> Tape().take()
            {}
        """
        parts, self._parts = self._parts, {}
        return {parameter: combine(of_parameter) for parameter, of_parameter in parts.items()}
