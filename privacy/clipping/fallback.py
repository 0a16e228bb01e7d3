"""Any other layer that holds parameters, through `torch.func`: exact, and slow.

It costs one more forward and backward pass, vectorised over the examples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from privacy.clipping.gradients import Instantiated, Parts, Saved
from privacy.errors import UnsupportedLayer

__all__ = ["FallbackRule"]


class FallbackRule:
    """The rule of a layer that has none of its own.

    The layer must map one tensor to one tensor, examples in dimension 0 of both, and give the same
    output when it runs again: a Dropout inside it is refused.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer = layer
        self.name = name
        self.parameters = tuple(layer.parameters())
        self._plain_forward = layer.forward

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer itself."""
        output = self._plain_forward(inputs)
        if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            raise UnsupportedLayer(
                f"{self.name}: expected {type(self.layer).__name__} to map a batch to one tensor "
                "with the same number of rows; replace it, or freeze its parameters"
            )
        return output, ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """By running the layer again, on the whole batch."""
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._plain_forward(leaf), leaf, output_gradient)
        return gradient

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """By running the layer again, vectorised over the examples, each a batch of one."""
        plain = _Plain(self.layer, self._plain_forward)
        named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        values = {name: p.detach() for name, p in named.items()}

        def of_example(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
            def run(current: dict[str, Tensor]) -> Tensor:
                output: Tensor = torch.func.functional_call(plain, current, (x.unsqueeze(0),))
                return output.squeeze(0)

            pull_back = torch.func.vjp(run, values)[1]
            (gradients,) = pull_back(dy)
            return dict(gradients)

        try:
            gradients = torch.func.vmap(of_example)(inputs, output_gradient)
        except RuntimeError as error:
            raise UnsupportedLayer(self._cannot(error)) from error
        return [(named[name], Instantiated([gradient])) for name, gradient in gradients.items()]

    def _cannot(self, error: RuntimeError) -> str:
        """Why it cannot, and the cure: mostly it need not be recorded whole."""
        why = "draws random numbers" if "random" in str(error) else "decides by its input's values"
        own = ", ".join(name for name, _ in self.layer.named_parameters(recurse=False))
        inside = any(True for _ in self.layer.children())
        whole = (
            f"; because it holds {own} itself, all that is inside of it is run with it: move {own} "
            "into a small module of its own, whose forward uses nothing else"
            if own and inside
            else "; move its parameters into layers of their own"
        )
        return (
            f"{self.name}: {type(self.layer).__name__} {why}, so it cannot run on one example at a "
            f"time{whole}, or freeze them: {error}"
        )


class _Plain(nn.Module):
    """The layer with its own forward, whatever its `forward` attribute says now."""

    def __init__(self, layer: nn.Module, plain_forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self._plain_forward = plain_forward

    def forward(self, inputs: Tensor) -> Any:
        return self._plain_forward(inputs)
