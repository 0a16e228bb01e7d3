"""Images from a gradient that was shared: what a client's update gives away of what it was made of.

First what follows exactly (labels from the last bias, the input of a linear first layer), then a
search for images with such a gradient (Geiping et al. 2020, arXiv 2003.14053). Restarts are chosen
by the search's own objective: whoever inverts does not have the originals.

What normalising layers hide is an image's contrast about mid-grey, and smooth images have little:
where the gradient does not tell, what is found is given all that there is room for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from privacy.errors import LeakageError
from privacy.leakage import arguments
from privacy.leakage.signals import checked_logits
from privacy.validate import shown

__all__ = [
    "Inversion",
    "Reconstruction",
    "input_of_linear",
    "invert",
    "labels_of",
    "shared_gradient",
    "similarity",
]

Gradient = Mapping[str, Tensor]
_DECAYS = (3 / 8, 5 / 8, 7 / 8)
"""Of the steps, where the rate falls to a tenth."""
_GREY = 0.5
_ALL_BUT_FEW = 0.99
"""Of the pixels: what a search leaves at a bound by chance is cut off."""
_AS_ALIKE = 1.5
"""The distance of two gradients may grow so much by that, and still says nothing of contrast."""
_ROUNDING = 1e-6
_WINDOW = 7
"""Side of the squares over which structural similarity is taken."""


@final
@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How images are searched for: Adam on the sign of the gradient of 1 - cosine.

    Attributes:
        steps: Of each search, at least 1. A thousand find an image of 28 x 28 pixels; through a
            network of 50,000 weights a step takes 10 to 15 ms of one core, 35 ms for eight images.
        restarts: Searches from other noise, at least 1; the one with the least objective is kept.
        rate: Of Adam at first, > 0.
        total_variation: Weight of the mean step between neighbouring pixels, down and across, at
            least 0. Networks with pools and kinks need it; smooth ones do with a thousandth of it.
        seed: Of the noise.

    Raises:
        LeakageError: A value is out of range.
    """

    steps: int = 1200
    restarts: int = 1
    rate: float = 0.1
    total_variation: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("seed", 0)):
            arguments.whole(name, getattr(self, name), least=least)
        arguments.number("rate", self.rate, "a finite number > 0", lambda x: 0 < x < math.inf)
        weight = self.total_variation
        arguments.number("total_variation", weight, "a number >= 0", lambda x: 0 <= x < math.inf)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What was found: images in [0, 1], float `[n, c, height, width]`, with their labels.

    `objective` is where the search ended: 1 - cosine between their gradient and the one that was
    shared, plus their weighted total variation. 0 would be a gradient that is alike.
    """

    images: Tensor
    labels: Tensor
    objective: float


def shared_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy, by parameter: what a client of a plain round shares.

    Raises:
        LeakageError: The model does not answer with logits that have the labels' classes.

    Example:
        >>> gradient = shared_gradient(nn.Linear(2, 3), torch.zeros(1, 2), torch.tensor([1]))
        >>> sorted(gradient)
        ['bias', 'weight']
    """
    arguments.instance("model", model, nn.Module)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    logits = model(images)
    loss = F.cross_entropy(checked_logits(logits, labels), arguments.labels(labels))
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, (each.detach() for each in found), strict=True))


def labels_of(bias_gradient: Tensor, *, count: int) -> Tensor:
    """Labels of a batch from the gradient of the last layer's bias: int64 `[count]`, rising.

    It is the mean of probabilities less one-hot labels: for one example the one negative entry, for
    more the classes that pull it down most, each by 1 / count. Exact for one; for several where the
    model is not yet sure of anything.

    Args:
        bias_gradient: `[classes]`.
        count: Examples in the batch, at least 1.

    Raises:
        LeakageError: It is no vector, or `count` is below 1.

    Example:
        >>> labels_of(torch.tensor([0.3, -0.6, 0.3]), count=1)
        tensor([1])
    """
    arguments.floats("bias_gradient", bias_gradient, 1)
    arguments.whole("count", count, least=1)
    if not len(bias_gradient):
        raise LeakageError("bias_gradient: expected one of a class or more, got none")
    left, found = bias_gradient.detach().double().clone(), []
    for _ in range(count):
        least = int(left.argmin())
        found.append(least)
        left[least] += 1 / count
    return torch.tensor(sorted(found))


def input_of_linear(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The input of a linear layer, `[inputs]`, where one example alone went through it: exactly.

    Each row of the weights' gradient is the input times the entry of the bias' gradient (Geiping et
    al. 2020, proposition 3.1).

    Raises:
        LeakageError: Shapes do not fit, or no unit was active.

    Example:
        >>> input_of_linear(torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([0.0, 2.0]))
        tensor([1., 2.])
    """
    arguments.floats("weight_gradient", weight_gradient, 2)
    arguments.floats("bias_gradient", bias_gradient, 1)
    if weight_gradient.shape[:1] != bias_gradient.shape:
        raise LeakageError(
            f"gradient: expected those of a linear layer and its bias, got "
            f"{list(weight_gradient.shape)} and {list(bias_gradient.shape)}"
        )
    unit = int(bias_gradient.abs().argmax())
    if not bias_gradient[unit]:
        raise LeakageError("gradient: expected a unit that was active, got zeros alone")
    return weight_gradient[unit] / bias_gradient[unit]


def invert(
    model: nn.Module,
    gradient: Gradient,
    *,
    shape: tuple[int, int, int],
    labels: Tensor,
    inversion: Inversion | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Reconstruction:
    """Searches for images whose gradient points where the one that was shared does.

    Guarantee: the model's parameters, their gradients and its mode are what they were; the global
    random state is not moved.

    Args:
        model: That of the client, with the parameters at which the gradient was taken.
        gradient: By parameter name, as `shared_gradient` gives it; all of the model's.
        shape: Channels, height and width of an image.
        labels: `[n]`, as found by `labels_of`, or known.
        inversion: How to search.
        stop: Asked after each step; True ends the search with what was found.

    Raises:
        LeakageError: The gradient is not of this model, or is 0, or an argument is of another kind.
    """
    inversion = Inversion() if inversion is None else inversion
    arguments.instance("inversion", inversion, Inversion)
    arguments.instance("model", model, nn.Module)
    arguments.called("stop", stop, "a function that says whether to stop")
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise LeakageError(f"shape: expected channels, height and width, got {shown(shape)}")
    for side in shape:
        arguments.whole("shape", side, least=1)
    labels = arguments.labels(labels)
    if not len(labels) or int(labels.min()) < 0:
        raise LeakageError(f"labels: expected one or more, of at least 0, got {shown(labels)}")
    wanted = _of_model(model, gradient)
    random = torch.Generator().manual_seed(inversion.seed)
    best: Reconstruction | None = None
    for _ in range(inversion.restarts):
        found = _search(model, wanted, labels, shape, inversion, random, stop)
        if best is None or found.objective < best.objective:
            best = found
        if stop():
            break
    assert best is not None
    return best


def similarity(found: Tensor, original: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB, and structural similarity, of an image in [0, 1].

    Structural similarity is the mean over squares of 7 x 7 pixels (Wang et al. 2004), or over the
    whole of a smaller image.

    Args:
        found: `[c, height, width]`.
        original: The same.

    Raises:
        LeakageError: Shapes differ.

    Example:
        >>> image = torch.rand(1, 8, 8)
        >>> similarity(image, image)
        (inf, 1.0)
    """
    arguments.floats("found", found, 3)
    arguments.floats("original", original, 3)
    if found.shape != original.shape:
        raise LeakageError(
            f"images: expected two of one shape, got {list(found.shape)} and {list(original.shape)}"
        )
    one, other = found.double(), original.double()
    error = float((one - other).square().mean())
    size = min(_WINDOW, *one.shape[1:])
    pooled = [
        F.avg_pool2d(each[None], size, 1) for each in (one, other, one**2, other**2, one * other)
    ]
    mine, theirs, mine2, theirs2, both = pooled
    spread = (mine2 - mine**2, theirs2 - theirs**2, both - mine * theirs)
    light = (2 * mine * theirs + 1e-4) / (mine**2 + theirs**2 + 1e-4)
    structure = (2 * spread[2] + 9e-4) / (spread[0] + spread[1] + 9e-4)
    ratio = math.inf if error == 0 else -10 * math.log10(error)
    return ratio, float((light * structure).mean())


def _of_model(model: nn.Module, gradient: Gradient) -> dict[str, Tensor]:
    """The gradient in the order of the model's parameters, or refused."""
    for name, each in arguments.named("gradient", gradient, "gradients").items():
        arguments.instance(f"gradient: {name}", each, Tensor)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name in named.keys() | gradient.keys():
        shapes = [list(each[name].shape) if name in each else "none" for each in (named, gradient)]
        if shapes[0] != shapes[1]:
            raise LeakageError(
                f"gradient: expected {shapes[0]} for {name}, got {shapes[1]}; give that of this "
                "model's own parameters"
            )
    found = {name: gradient[name].detach() for name in named}
    if not any(bool(each.any()) for each in found.values()):
        raise LeakageError("gradient: expected one that is not 0 everywhere; nothing is in this")
    return found


def _search(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    labels: Tensor,
    shape: tuple[int, int, int],
    inversion: Inversion,
    random: torch.Generator,
    stop: Callable[[], bool],
) -> Reconstruction:
    images = torch.rand(len(labels), *shape, generator=random).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=inversion.rate)
    decays = [math.ceil(inversion.steps * share) for share in _DECAYS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, decays, gamma=0.1)
    own = {name: each.detach().requires_grad_() for name, each in model.named_parameters()}

    def objective() -> Tensor:
        unlike = _distance(model, own, wanted, labels, images)
        return unlike + inversion.total_variation * _roughness(images)

    try:
        value = objective()
    except (RuntimeError, IndexError, ValueError) as error:
        raise LeakageError(
            f"model: expected one that takes {len(labels)} images of {list(shape)} and has the "
            f"classes of their labels, got an error: {error}"
        ) from error
    for _ in range(inversion.steps):
        (slope,) = torch.autograd.grad(value, images)
        images.grad = slope.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        value = objective()
        if stop():
            break
    found = images.detach()
    raised = _at_full_contrast(found)
    before, after = (
        float(_distance(model, own, wanted, labels, each).detach()) for each in (found, raised)
    )
    return Reconstruction(
        images=raised if after <= _AS_ALIKE * before + _ROUNDING else found,
        labels=labels,
        objective=float(value.detach()),
    )


def _distance(
    model: nn.Module,
    own: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    labels: Tensor,
    images: Tensor,
) -> Tensor:
    """1 - cosine between the images' gradient and the one that is wanted."""
    loss = F.cross_entropy(functional_call(model, dict(own), (images,)), labels)
    found = torch.autograd.grad(loss, [own[name] for name in wanted], create_graph=True)
    pairs = list(zip(found, wanted.values(), strict=True))
    product = torch.stack([(one * other).sum() for one, other in pairs]).sum()
    lengths = [
        torch.stack([each.square().sum() for each in side]).sum()
        for side in zip(*pairs, strict=True)
    ]
    return 1 - product / (lengths[0] * lengths[1]).clamp_min(1e-30).sqrt()


def _roughness(images: Tensor) -> Tensor:
    """The mean step from a pixel to the next, down and across."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    return down + across


def _at_full_contrast(images: Tensor) -> Tensor:
    """Each farther from grey, until a bound is met by more than a few pixels, which are cut off."""
    away = images - _GREY
    most = away.abs().flatten(1).quantile(_ALL_BUT_FEW, dim=1).clamp_min(1e-6)
    return (_GREY + away * (_GREY / most)[:, None, None, None]).clamp(0, 1)
