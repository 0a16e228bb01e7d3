"""What the rule of a layer is: its mathematics, in one of three forms.

A `LayerRule` maps one tensor to one tensor; a `ComposedRule` writes a layer out in pieces, of which
each has a `LayerRule` or, with more inputs, `SeveralInputs`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from privacy.clipping.gradients import Parts, Saved

__all__ = [
    "AddsCopies",
    "ComposedRule",
    "InOnePass",
    "LayerRule",
    "Record",
    "Rule",
    "Rules",
    "SeveralInputs",
]


class LayerRule(Protocol):
    """One layer's mathematics; it keeps nothing between calls but through `saved`.

    Called in the order: `forward`, then in backward `per_example_gradients` and `input_gradient`.
    """

    parameters: tuple[nn.Parameter, ...]

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and tensors to save beside the input."""

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The gradient at the layer's input."""

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """One entry for each trainable parameter of the layer."""


@runtime_checkable
class AddsCopies(Protocol):
    """A rule that adds up an example's copies at less cost than after each row's gradient."""

    def gradients_of_copies(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor, *, copies: int
    ) -> Parts:
        """`per_example_gradients` of examples that are `copies` adjacent rows each."""


@runtime_checkable
class InOnePass(Protocol):
    """A rule whose two gradients share work: where both are wanted, one call gives them."""

    def in_one_pass(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor
    ) -> tuple[Tensor, Parts]:
        """`input_gradient` and `per_example_gradients`."""


class SeveralInputs(Protocol):
    """The rule of a piece of a layer that has no input, or more than one, and one output."""

    parameters: tuple[nn.Parameter, ...]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The piece's output, and nothing to save beside the inputs."""

    def input_gradients(
        self, inputs: Sequence[Tensor], output_gradient: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient at each input that is wanted."""

    def gradients_of_each(self, inputs: Sequence[Tensor], output_gradient: Tensor) -> Parts:
        """One entry for each trainable parameter of the piece."""


class Record(Protocol):
    """Runs one piece of a layer so that its gradients are recorded."""

    def __call__(self, rule: LayerRule | SeveralInputs, /, *inputs: Tensor) -> Tensor:
        """The piece's output."""


@runtime_checkable
class ComposedRule(Protocol):
    """A layer written out as plain operations and pieces, of which each has a `LayerRule`.

    For layers of several inputs or outputs, and those that draw random numbers: what is between the
    pieces is plain autograd, and runs once.
    """

    parameters: tuple[nn.Parameter, ...]

    def compose(self, record: Record, *inputs: Any, **settings: Any) -> Any:
        """What the layer gives; each of `parameters` is used through `record` alone."""


Rule = LayerRule | ComposedRule
Rules = Callable[[nn.Module, str], Rule]
"""Finds the rule of a layer, given the layer and its dotted name."""
