"""The shortest change that fools, by penalty: length + c times the margin, c searched per example.

CW in l2 (Carlini & Wagner 2017, arXiv 1608.04644) and EAD in l1 (Chen et al. 2018, arXiv
1709.04114). Each image has its own c, so that the result does not depend on the rest of the batch.
A change that is longer than eps is shortened.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.attacks.oracle import Victim, margin, mean_of, pixels_of, unit_images

__all__ = ["CW", "EADEN", "EADL1", "shortest_change"]

# A variable begins this far from where the sine is flat: 5e-5 of half the range of a pixel.
_OFF_THE_BOUND = 0.01

_Margin = Callable[[Tensor, Tensor], Tensor]
"""From images in [0, 1], [k, ...], and which rows they are of, [k], to their margins, [k]."""


def shortest_change(
    descend: Callable[[Tensor], tuple[Tensor, Tensor]],
    clean: Tensor,
    *,
    constant: float,
    tries: int,
) -> Tensor:
    """Tries a c per image, ten times more where it failed, halfway back where it fooled.

    `descend` goes from c [n] to images and their lengths [n], infinite where none was found. Where
    no c works the image stays clean.
    """
    best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
    low, high = torch.zeros_like(best_length), best_length.clone()
    c = torch.full_like(best_length, constant)
    for _ in range(tries):
        found, length = descend(c)
        shorter, fooled = length < best_length, length < torch.inf
        best[shorter], best_length = found[shorter], torch.minimum(length, best_length)
        low, high = torch.where(fooled, low, c), torch.where(fooled, c, high)
        c = torch.where(high < torch.inf, (low + high) / 2, c * 10)
    return best


@dataclass(frozen=True, kw_only=True, repr=False)
class _ByPenalty(Attack):
    """What these attacks share: all but how one c is tried."""

    targeted = True

    @abstractmethod
    def _descend(self, margins: _Margin, clean: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The shortest images that fool by these c, [n], and their lengths, [n], or infinity."""

    @abstractmethod
    def _constants(self) -> tuple[float, int]:
        """The first c, and how many are tried."""

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        threat = self.threat
        classes, targeted = (labels, False) if targets is None else (targets, True)
        clean = unit_images(images, threat)
        victim = Victim(
            mean_of(model, self.draws),
            threat,
            images=images,
            largest_class=int(torch.maximum(labels, classes).max()),
        )

        def margins(unit: Tensor, rows: Tensor) -> Tensor:
            return margin(victim(unit), classes[rows], targeted=targeted)

        constant, tries = self._constants()
        found = shortest_change(
            lambda c: self._descend(margins, clean, c), clean, constant=constant, tries=tries
        )
        return threat.project(images, pixels_of(found, threat).to(images.dtype))


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class CW(_ByPenalty):
    """The attack of Carlini & Wagner, for any image.

    As published, pixels are tanh of a free variable, and a pixel on a bound is at infinity: it
    never moves, and on digits most pixels are there. Here a pixel is the sine of its variable: a
    bound is at a finite distance, and a step leaves it.

    Attributes:
        c: The first constant.
        kappa: By how much another class must win.
        steps: Of Adam for each constant; an image whose loss no longer falls stops earlier.
        lr: The learning rate of Adam.
        binary_search_steps: How many constants are tried.

    Example:
        >>> from defenses import ThreatModel
        >>> CW(ThreatModel(norm="l2", eps=0.5), c=2.0).settings
        {'c': 2.0, 'kappa': 0.0, 'steps': 100, 'lr': 0.1, 'binary_search_steps': 5}
    """

    name = "cw"
    norms = ("l2",)

    c: float = 1.0
    kappa: float = 0.0
    steps: int = 100
    lr: float = 0.1
    binary_search_steps: int = 5

    def _constants(self) -> tuple[float, int]:
        return self.c, self.binary_search_steps

    def _descend(self, margins: _Margin, clean: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Adam on squared length + c times the margin; a row whose loss no longer falls leaves."""
        best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
        edge = math.cos(_OFF_THE_BOUND)
        rows = torch.arange(len(clean), device=clean.device)
        variable = torch.asin((2 * clean - 1).clamp(-edge, edge))
        first, second = torch.zeros_like(clean), torch.zeros_like(clean)
        before = best_length.clone()
        for step in range(1, self.steps + 1):
            unit = (torch.sin(variable.requires_grad_()) + 1) / 2
            length = (unit - clean[rows]).square().flatten(1).sum(dim=1)
            held = margins(unit, rows)
            loss = length + c[rows] * (held + self.kappa).relu()
            (gradient,) = torch.autograd.grad(loss.sum(), variable)
            unit, length, held = unit.detach(), length.detach(), held.detach()
            shorter = (held < 0) & (held <= -self.kappa) & (length < best_length[rows])
            best[rows[shorter]], best_length[rows[shorter]] = unit[shorter], length[shorter]
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            rate = self.lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            variable = variable.detach() - rate * first / (second.sqrt() + 1e-8)
            if step % max(self.steps // 10, 1) == 0:
                falling = loss.detach() < 0.9999 * before
                rows, variable, first, second = (
                    each[falling] for each in (rows, variable, first, second)
                )
                before = loss.detach()[falling]
                if len(rows) == 0:
                    break
        return best, best_length


@dataclass(frozen=True, kw_only=True, repr=False)
class _ElasticNet(_ByPenalty):
    """EAD: squared l2 length + beta times l1 length + c times the margin, by FISTA."""

    norms = ("l1",)

    kappa: float = 0.0
    lr: float = 0.01
    binary_search_steps: int = 9
    max_iterations: int = 100
    initial_const: float = 0.001
    beta: float = 0.01  # 0.001, as published, fools 9 of 60 digits fewer in an l1 ball

    @abstractmethod
    def _length(self, change: Tensor) -> Tensor:
        """What is to be shortest, of changes [n, pixels]."""

    def _constants(self) -> tuple[float, int]:
        return self.initial_const, self.binary_search_steps

    def _descend(self, margins: _Margin, clean: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """FISTA: a gradient step on the smooth part, shrinkage to the clean image, momentum."""
        best, best_length = clean.clone(), clean.new_full(clean.shape[:1], torch.inf)
        every = torch.arange(len(clean), device=clean.device)
        steps, last, ahead = self.max_iterations, clean, clean
        for step in range(steps):
            ahead = ahead.detach().requires_grad_()
            smooth = (ahead - clean).square().flatten(1).sum(dim=1)
            loss = c * (margins(ahead, every) + self.kappa).relu() + smooth
            (gradient,) = torch.autograd.grad(loss.sum(), ahead)
            rate = self.lr * (1 - step / steps) ** 0.5
            change = ahead.detach() - rate * gradient - clean
            change = change.sign() * (change.abs() - self.beta).relu()
            current = (clean + change).clamp(0, 1)
            with torch.no_grad():
                held = margins(current, every)
            measured = self._length((current - clean).flatten(1))
            shorter = (held < 0) & (held <= -self.kappa) & (measured < best_length)
            best[shorter], best_length[shorter] = current[shorter], measured[shorter]
            ahead = (current + (step + 1) / (step + 4) * (current - last)).clamp(0, 1)
            last = current
        return best, best_length


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class EADL1(_ElasticNet):
    """EAD, the elastic-net attack, that keeps what is shortest in l1.

    Attributes:
        kappa: By how much another class must win.
        lr: Length of the first steps; it falls with the square root of the steps that are left.
        binary_search_steps: How many constants are tried.
        max_iterations: Steps for each constant.
        initial_const: The first constant.
        beta: Weight of the l1 length, by which each step also shrinks the change of each pixel.

    Example:
        >>> from defenses import ThreatModel
        >>> EADL1(ThreatModel(norm="l1", eps=5.0), max_iterations=50).max_iterations
        50
    """

    name = "eadl1"

    def _length(self, change: Tensor) -> Tensor:
        return change.abs().sum(dim=1)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class EADEN(_ElasticNet):
    """As `EADL1`, but it keeps what is shortest in squared l2 length + beta times l1 length.

    Example:
        >>> from defenses import ThreatModel
        >>> EADEN(ThreatModel(norm="l1", eps=5.0)).beta
        0.01
    """

    name = "eaden"

    def _length(self, change: Tensor) -> Tensor:
        return change.square().sum(dim=1) + self.beta * change.abs().sum(dim=1)
