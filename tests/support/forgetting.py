"""A small classification problem, nets that fit it, and a group of people who leave."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES, WIDTH = 3, 6


class Net(nn.Sequential):
    """Two layers, whose first may be asked for its features."""

    def __init__(self, *, hidden: int = 24, classes: int = CLASSES) -> None:
        super().__init__(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self[1](self[0](images))
        return found


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Images and labels of who stays, who leaves, and strangers."""

    retain: tuple[Tensor, Tensor]
    forget: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def drawn(count: int, seed: int, *, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """Noisy clusters; the share `wrong` has other labels, which only memory can tell."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    centres = 2.0 * torch.eye(CLASSES, WIDTH)
    images = centres[labels] + 0.5 * torch.randn(count, WIDTH, generator=random)
    flipped = torch.rand(count, generator=random) < wrong
    shift = torch.randint(1, CLASSES, (count,), generator=random)
    return images, torch.where(flipped, (labels + shift) % CLASSES, labels)


def problem(*, forgotten: int = 40, stayed: int = 120) -> Problem:
    """People who leave half have labels that a model knows by memory alone."""
    return Problem(
        retain=drawn(stayed, 1),
        forget=drawn(forgotten, 2, wrong=0.5),
        test=drawn(300, 3),
    )


def trained(parts: list[tuple[Tensor, Tensor]], seed: int, *, steps: int = 120) -> Net:
    """A net that fits these examples, by full batches."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = Net(hidden=64)
    images = torch.cat([part[0] for part in parts])
    labels = torch.cat([part[1] for part in parts])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share that is answered right."""
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).float().mean())
