"""Models that draw random numbers: states that are put back, and passes that draw the same.

A layer that mixes examples in some passes only (MixStyle, say) is not seen in one. Where a model
draws, many are looked at.
"""

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["drawn_alike", "draws", "random_states_kept"]

_PASSES = 96
"""What mixes in one of 20 passes is seen in one of these with a probability of 99 percent."""
_APART = 997
"""Numbers passed over between two passes: the next one begins elsewhere."""

Run = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """The global random states are afterwards what they were; none is seeded."""
    python, mtrand = random.getstate(), np.random.mtrand
    numpy = mtrand.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        mtrand.set_state(numpy)


def draws(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether a forward pass takes numbers from a global generator, in the present modes.

    Torch's own dropout is not counted: each of its numbers is for one element. A generator of the
    model's own is not seen.
    """
    own = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    plain = [m for m in own if type(m).__module__.startswith("torch.nn.")]
    try:
        for module in plain:
            vars(module)["training"] = False
        with random_states_kept(images.device), torch.no_grad():
            before = _states(images.device)
            model(images)
            return before != _states(images.device)
    finally:
        for module in plain:
            vars(module)["training"] = True


@torch.no_grad()
def drawn_alike(
    run: Run, images: torch.Tensor, others: torch.Tensor
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Passes in pairs that draw the same numbers, each pair others.

    Args:
        images: Examples [n, ...].
        others: What stands in the place of every second one's copy, [n, ...].

    Yields:
        The outputs of examples that are the same in both passes, [n, ...], beside examples of which
        the second pass has others.
    """
    rows = torch.stack([images, images], 1).flatten(0, 1)
    changed = torch.stack([images, others], 1).flatten(0, 1)
    with random_states_kept(images.device):
        for _ in range(_PASSES):
            yield run(rows)[::2], run(changed)[::2]
            torch.rand(_APART, device=images.device)
            torch.rand(_APART)
            np.random.mtrand.random_sample(_APART)
            for _ in range(_APART):
                random.random()  # noqa: S311 - it passes them over


def _states(device: torch.device) -> list[Any]:
    """The global random states, to be compared."""
    numpy = np.random.mtrand.get_state(legacy=False)["state"]
    torches = [torch.get_rng_state()]
    if device.type == "cuda":
        torches.append(torch.cuda.get_rng_state(device))
    return [
        random.getstate(),
        {name: np.asarray(value).tolist() for name, value in numpy.items()},
        *(state.tolist() for state in torches),
    ]
