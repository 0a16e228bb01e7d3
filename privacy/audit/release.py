"""Does nothing leave the step but the released gradient?

Parameters, buffers and the optimizer's state may change in the optimizer's step alone, and there by
nothing but the gradients that the audit read: the step is taken once more on copies.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

__all__ = ["Release"]


@final
class Release:
    """Watches one training's parameters, buffers and optimizer from step to step.

    A class because each step is compared with what the last one left.

    Args:
        model: The model under training.
        optimizer: Its optimizer.

    Attributes:
        unexplained: Largest change so far that no released gradient explains, as a part of the
            tensor that changed.
        replayed: Whether the optimizer's step could be taken once more on copies.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> release = Release(model, optimizer)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> release.before()
        >>> release.unexplained > 0.1
        True
        >>> release.close()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.unexplained = 0.0
        self.replayed = True
        self._model, self._optimizer = model, optimizer
        self._expected: dict[str, torch.Tensor] = {}
        self._left = self._state()
        self._handle = optimizer.register_step_post_hook(self._after)

    def close(self) -> None:
        """Takes the hook off again."""
        self._handle.remove()

    def before(self) -> None:
        """Called when the optimizer takes the gradients: nothing may have changed until now."""
        self._compare(self._left, self._state())
        self._expected = self._replay() if self.replayed else {}

    def _after(self, *_: Any) -> None:
        """The optimizer has stepped: by the gradients that were read, and by nothing else."""
        self._left = self._state()
        self._compare(self._expected, self._left)

    def _state(self) -> dict[str, torch.Tensor]:
        """Copies of everything that is kept from step to step, by name."""
        parameters = self._parameters()
        known = {id(parameter) for parameter in parameters}
        found: dict[str, torch.Tensor] = {
            n: p for n, p in self._model.named_parameters() if id(p) not in known
        }
        found |= {f"buffer {name}": buffer for name, buffer in self._model.named_buffers()}
        for number, parameter in enumerate(parameters):
            found[f"optimizer {number}"] = parameter
            state = self._optimizer.state.get(parameter, {})
            found |= {
                f"optimizer {number} {name}": value
                for name, value in state.items()
                if isinstance(value, torch.Tensor)
            }
        return {
            name: value.detach().clone()
            for name, value in found.items()
            if value.is_floating_point()
        }

    def _replay(self) -> dict[str, torch.Tensor]:
        """What the optimizer's parameters become by the gradients that they have now."""
        copies: dict[int, Any] = {}
        parameters = self._parameters()
        for parameter in parameters:
            twin = parameter.detach().clone().requires_grad_(parameter.requires_grad)
            twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
            copies[id(parameter)] = twin
        try:
            copy.deepcopy(self._optimizer, dict(copies)).step()
        except Exception:  # Whatever a foreign optimizer needs that a copy has not.
            self.replayed = False
            return {}
        return {
            f"optimizer {number}": copies[id(parameter)].detach()
            for number, parameter in enumerate(parameters)
        }

    def _parameters(self) -> list[torch.Tensor]:
        """The optimizer's parameters in its order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _compare(
        self, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
    ) -> None:
        """Notes the largest difference between two states, where both have a value."""
        for name in expected.keys() & found.keys():
            one, other = expected[name], found[name]
            if one.shape != other.shape:
                self.unexplained = math.inf
            elif one.numel():
                size = float(one.abs().max().clamp(min=1e-12))
                moved = float((other - one).abs().max()) / size
                # Not a number is no explanation either.
                self.unexplained = max(self.unexplained, math.inf if math.isnan(moved) else moved)
