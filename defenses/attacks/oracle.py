"""The model as a search asks it, many times, about the images that still stand.

What makes many questions cheap is kept here: the memory format in which convolutions are fast, no
graph where no gradient is asked for, one check of the answers and not one a step. `Victim` is the
same model in the units and the precision that torchattacks and the attacks by penalty expect.

Beside it is what a search reads off the answers: margins, leads, the likeliest wrong classes. To
be used within an `attack_scope`.
"""

import math
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor, nn

from defenses.errors import AttackError
from defenses.scope import check_logits, home_of
from defenses.threat import ThreatModel

__all__ = [
    "Expectation",
    "Oracle",
    "Search",
    "Victim",
    "channels_last",
    "check_slope",
    "lead",
    "likeliest_wrong",
    "margin",
    "mean_of",
    "pixels_of",
    "unit_images",
    "until_fooled",
    "widened",
]

Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From rows and classes (int64, [k] each) to their images, [k, ...], and which are won, [k]."""

_PIXELS = 2**17  # at once: a network is hardly faster on more, and needs little memory for them


@final
class Oracle:
    """A model with its usual layout and precision out of sight.

    On a CPU the images are given to it channels-last, in which torch's pools and convolutions are
    up to three times as fast; a model that cannot read them so (its forward calls `view`) gets the
    layout that they came in. The answers are those of the model to rounding. `images` are a batch
    as the model expects it, `classes` what it must have logits for; `draws` is how often it is
    asked each question.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, classes: Tensor, *, draws: int = 1
    ) -> None:
        self._model, self._dtype, self._draws = model, images.dtype, draws
        self._at_once = max(_PIXELS // images[0].numel(), len(images))
        self._largest_class = int(classes.max())
        self._channels_last = images.device.type == "cpu" and images.ndim == 4
        self._checked: set[bool] = set()

    @property
    def at_once(self) -> int:
        """How many images to ask about together where that can be chosen; at least the batch."""
        return self._at_once

    def logits(self, images: Tensor) -> Tensor:
        """The logits, [k, classes], without a graph; the mean over the draws.

        In the dtype of the images, [k, channels, ...], k >= 1, which is at least float32.
        """
        with torch.no_grad():
            total = self._answer(images, differentiable=False)[1]
            for _ in range(self._draws - 1):
                total = total + self._answer(images, differentiable=False)[1]
        return total if self._draws == 1 else total / self._draws

    def wrong(self, images: Tensor, labels: Tensor) -> Tensor:
        """The share of the draws in which the model sees another class than the label, [k]."""
        total = images.new_zeros(len(images))
        with torch.no_grad():
            for _ in range(self._draws):
                total += self._answer(images, differentiable=False)[1].argmax(1) != labels
        return total / self._draws

    def gradient(
        self, images: Tensor, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of an objective by the pixels, and all that was found on the way.

        Of several draws values and gradients are the means, of each draw's objective; the logits
        are those of the draw in which the objective was lowest: what holds for them holds for
        nearly all. The objective gives a value a row, each of its own row only; images are in at
        least float32, and so is what is returned, without graphs.
        """
        logits, values, gradient = self._draw(images, objective)
        least, draws = values, self._draws
        for _ in range(draws - 1):
            others, more, slope = self._draw(images, objective)
            logits = torch.where((more < least)[:, None], others, logits)
            least = torch.minimum(more, least)
            values, gradient = values + more, gradient + slope
        return (
            (logits, values, gradient) if draws == 1 else (logits, values / draws, gradient / draws)
        )

    def _draw(
        self, images: Tensor, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaf, logits = self._answer(images, differentiable=True)
        values = objective(logits)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return logits.detach(), values.detach(), gradient.to(images.dtype)

    def _answer(self, images: Tensor, *, differentiable: bool) -> tuple[Tensor, Tensor]:
        """The images as the model got them, and its logits, checked the first time."""
        leaf = self._laid_out(images.detach()).requires_grad_(differentiable)
        try:
            logits = self._model(leaf)
        except RuntimeError as error:
            if not self._channels_last or "view size is not compatible" not in str(error):
                raise
            self._channels_last = False
            return self._answer(images, differentiable=differentiable)
        if differentiable not in self._checked:  # at its first answer of either kind
            logits = check_logits(
                logits, count=len(images), largest_label=self._largest_class, error=AttackError
            )
            if differentiable:
                check_slope(logits)
            self._checked.add(differentiable)
        return leaf, logits.to(images.dtype)

    def _laid_out(self, images: Tensor) -> Tensor:
        """The images in the model's dtype and the layout in which it is asked."""
        images = images.to(self._dtype)
        if self._channels_last:
            return channels_last(images)
        return images.contiguous().view_as(images)


def channels_last(images: Tensor) -> Tensor:
    """The same images with the strides of channels-last, for one channel too.

    There both layouts hold the same numbers, and only the strides tell torch which to compute in.
    """
    _, channels, height, width = images.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return images.contiguous(memory_format=torch.channels_last).as_strided(images.shape, strides)


@final
class Victim:
    """The model in images of [0, 1] and float32, behind which torchattacks' faults are corrected.

    It maps [0, 1] onto the threat model's bounds and float32 onto the model's dtype, hides channels
    that the model does not take, gives recordings and volumes their axes back, and has no training
    flags that a careless attack could switch. Its logits are a copy, which an attack may overwrite.
    """

    training = False

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        *,
        images: Tensor,
        largest_class: int,
        fewest_classes: int = 2,
    ) -> None:
        self._model, self._threat, self._shape = model, threat, images.shape[1:]
        self._largest_class, self._fewest_classes = largest_class, fewest_classes
        self._anchor = torch.empty(0, device=images.device)
        self._checked: set[bool] = set()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor, from which torchattacks reads the device."""
        yield self._anchor

    def train(self) -> None:
        """Nothing: the scope keeps the modes."""

    def eval(self) -> None:
        """Nothing: the scope keeps the modes."""

    def __call__(self, unit: Tensor) -> Tensor:
        """The logits of images in [0, 1], [n, classes], checked the first time."""
        # Through a flat view, so that the gradient comes back contiguous from a channels-last
        # model: torchattacks calls `view` on it.
        seen = unit.flatten().view_as(unit)[:, : self._shape[0]]
        pixels = pixels_of(seen.reshape(-1, *self._shape), self._threat)
        logits: Tensor = self._model(pixels.to(home_of(self._model, pixels)[1]))
        watched = torch.is_grad_enabled() and pixels.requires_grad
        if watched not in self._checked:
            self._check(pixels, logits, watched=watched)
            self._checked.add(watched)
        return logits.to(unit.dtype, copy=True)

    def _check(self, pixels: Tensor, logits: object, *, watched: bool) -> None:
        logits = check_logits(
            logits, count=len(pixels), largest_label=self._largest_class, error=AttackError
        )
        if logits.shape[1] < self._fewest_classes:
            raise AttackError(
                f"this attack's loss compares {self._fewest_classes} logits, but the model has "
                f"{logits.shape[1]} classes; use apgd with its cross-entropy loss"
            )
        if watched:
            check_slope(logits)


@final
class Expectation(nn.Module):
    """A random model as one that answers with the mean of several draws (Athalye et al. 2018).

    After arXiv 1802.00420, for attacks that know of no draws. Those that follow a loss of ours take
    the mean of each draw's gradient instead.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self._model, self._draws = model, draws

    def forward(self, images: Tensor) -> Tensor:
        """The mean logits, [n, classes]."""
        answers = [self._model(images) for _ in range(self._draws)]
        return torch.stack(answers).mean(0)


def mean_of(model: nn.Module, draws: int) -> nn.Module:
    """The model itself for one draw, else its expectation."""
    return model if draws == 1 else Expectation(model, draws)


def check_slope(logits: Tensor) -> None:
    """Refuses logits, differentiable ones asked for, that the images have no gradient of."""
    if not logits.requires_grad:
        raise AttackError(
            "model: no gradient reaches the images (is part of it detached or under no_grad?); use "
            "an attack that needs none, such as square"
        )


def widened(images: Tensor) -> Tensor:
    """Images in at least float32: half precision has no room for a search."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def unit_images(images: Tensor, threat: ThreatModel) -> Tensor:
    """Images mapped from the threat model's bounds onto [0, 1], at least float32, contiguous."""
    return ((widened(images) - threat.bounds[0]) / threat.width).contiguous()


def pixels_of(unit: Tensor, threat: ThreatModel) -> Tensor:
    """Images mapped back from [0, 1] onto the threat model's bounds."""
    return unit if threat.bounds == (0.0, 1.0) else threat.bounds[0] + threat.width * unit


def until_fooled(
    images: Tensor,
    standing: Tensor,
    aims: Tensor,
    search: Search,
    *,
    at_once: int,
    grade: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Searches again and again, each time for the images that stood up to the searches before.

    The first search finds most of what is found. Of the others several run side by side where few
    images stand, the more the fewer. `aims` has the class that each search is given for each image,
    [n, searches]. What is returned won, or is what the last search gave; with a `grade`, for a
    random model, whose images may fool now and then without being won, the best.
    """
    found, rows, done = images.clone(), standing.nonzero().flatten(), 0
    best = torch.full(standing.shape, -torch.inf, device=images.device, dtype=images.dtype)
    while len(rows) > 0 and done < aims.shape[1]:
        together = min(max(at_once // len(rows), 1), aims.shape[1] - done) if done else 1
        aim = aims[rows, done : done + together].T.flatten()
        candidates, won = search(rows.repeat(together), aim)
        won = won.view(together, len(rows))
        fooled = won.any(0)
        number = torch.where(fooled, won.int().argmax(0), together - 1)
        better = torch.ones_like(fooled)
        if grade is not None:
            marks = grade(rows.repeat(together), candidates).view(together, len(rows))
            mark, number = torch.where(won, torch.inf, marks).max(0)
            better = mark > best[rows]
            best[rows] = torch.where(better, mark, best[rows])
        chosen = candidates[number * len(rows) + torch.arange(len(rows), device=rows.device)]
        found[rows[better]] = chosen[better]
        rows, done = rows[~fooled], done + together
    return found


def margin(logits: Tensor, classes: Tensor, *, targeted: bool) -> Tensor:
    """By how much the model still holds out, [n]: below 0 where it is fooled.

    The true class's logit above the best other one, or with `targeted` the best other one above the
    target's.
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, classes.unsqueeze(1), -torch.inf).amax(dim=1)
    return others - own if targeted else own - others


def lead(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """By how much the targets' logits are above the labels', [n]."""
    pair = logits.gather(1, torch.stack([labels, targets], dim=1))
    return pair[:, 1] - pair[:, 0]


def likeliest_wrong(logits: Tensor, labels: Tensor, most: int) -> Tensor:
    """The wrong classes of each image, the likeliest first, [n, min(most, classes - 1)]."""
    first = logits.scatter(1, labels[:, None], math.inf)
    return first.argsort(dim=1, descending=True)[:, 1 : most + 1]
