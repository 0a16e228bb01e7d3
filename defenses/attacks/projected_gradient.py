"""Projected gradient ascent on the images: the inner loop of attacks and of adversarial training.

Written for speed: each step overwrites the images of the last one in whatever memory format they
have, nothing waits for the device between steps, and the logits are checked once. Tried and left
out, since they gained nothing on a CPU: pieces of a batch that fit its cache, bfloat16 without
AMX (with it, for convolutions alone, training has `precision`), torch.compile, and convolutions'
input gradients as forward convolutions of turned weights. What is left is the model's own forward
pass and its gradient to the images: 0.7 to 0.9 of a plain step.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from defenses.attacks.oracle import check_slope
from defenses.errors import AttackError
from defenses.scope import check_logits
from defenses.threat import ThreatModel

__all__ = ["projected_gradient", "random_start"]

# Added to lengths that divide; torchattacks' constant, so that results agree.
_SMALLEST_LENGTH = 1e-10

_Loss = Callable[[Tensor, Tensor], Tensor]


def projected_gradient(
    model: nn.Module,
    clean: Tensor,
    threat: ThreatModel,
    loss: _Loss,
    reference: Tensor,
    *,
    start: Tensor,
    steps: int,
    step_size: float,
    until_fooled: bool = False,
    draws: int = 1,
) -> Tensor:
    """Climbs the loss from `start`, projecting onto the threat model's set after every step.

    For `linf` a step is the gradient's sign, for `l2` its direction, each image by itself (Madry
    et al. 2018, arXiv 1706.06083). To be called within an `attack_scope`.

    Args:
        loss: From logits and reference to losses, [n] or their sum; each of its own row only.
        reference: What the loss compares with, [n, ...]; labels are int64, [n].
        start: It need not lie in the ball and is not changed; its memory format and dtype are kept.
        until_fooled: Whether an image stays where it is once its logits do not favour its label;
            `reference` is the labels then.
        draws: How often to ask a model that answers at random at each step: the gradient is the
            mean of those of each draw's loss, and an image is fooled if it is in every draw.
    """
    if threat.norm not in ("linf", "l2"):
        raise AttackError(f"norm: expected linf or l2 for projected gradient, got {threat.norm}")
    climb = _climb_until_fooled if until_fooled else _climb
    way = _Way(loss, steps, partial(_mover, threat=threat, step_size=step_size), draws)
    with _layout_kept(model):
        return climb(model, clean, reference, start.detach(), way)


def random_start(clean: Tensor, threat: ThreatModel, *, reach: float) -> Tensor:
    """Draws a point around each image from torch's global generator, clipped to the bounds.

    For `linf` uniform in the cube of half-width `reach`, for `l2` in a random direction at a
    uniform share of `reach`, as torchattacks does. The memory format is that of the images.
    """
    noise = torch.empty_like(clean)
    if threat.norm == "linf":
        noise.uniform_(-reach, reach)
    else:
        noise.normal_()
        length = _length(noise)
        noise.mul_(torch.zeros_like(length).uniform_(0, 1) / length * reach)
    return noise.add_(clean).clamp_(*threat.bounds)


@dataclass(frozen=True)
class _Way:
    """What is climbed, and by which steps."""

    loss: _Loss
    steps: int
    mover: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]
    draws: int


def _climb(model: nn.Module, clean: Tensor, reference: Tensor, start: Tensor, way: _Way) -> Tensor:
    """All steps, always of the whole batch."""
    loss, move = way.loss, way.mover(clean)
    current = start.clone()
    for number in range(way.steps):
        logits = model(current.requires_grad_())
        if number == 0:
            _check(logits, reference)
        gradient = _slope(loss(logits, reference), current)
        for _ in range(way.draws - 1):
            gradient += _slope(loss(model(current), reference), current)
        current = move(current.detach(), gradient)
    return current


def _climb_until_fooled(
    model: nn.Module, clean: Tensor, labels: Tensor, start: Tensor, way: _Way
) -> Tensor:
    """All steps; the rows that are fooled leave the batch, so that it shrinks."""
    loss, draws = way.loss, way.draws
    found, rows = start.clone(), torch.arange(len(start), device=start.device)
    current = start.clone()
    for number in range(way.steps):
        logits = model(current.requires_grad_())
        if number == 0:
            _check(logits, labels)
        right = logits.argmax(dim=1) == labels
        if draws == 1 and not right.any():
            break
        gradient = _slope(loss(logits, labels), current)
        for _ in range(draws - 1):
            logits = model(current)
            right |= logits.argmax(dim=1) == labels
            gradient += _slope(loss(logits, labels), current)
        standing = right.nonzero().squeeze(1)
        if len(standing) == 0:
            break
        current = current.detach()
        if len(standing) < len(rows):
            rows, clean, labels = rows[standing], clean[standing], labels[standing]
            current, gradient = current[standing], gradient[standing]
        current = way.mover(clean)(current, gradient)
        found[rows] = current
    return found


def _slope(losses: Tensor, images: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return gradient


def _mover(
    clean: Tensor, threat: ThreatModel, step_size: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """One step and its projection, in place, as a function of the images and the gradient."""
    low, high = threat.bounds
    if threat.norm == "linf":
        lowest = (clean - threat.eps).clamp_(min=low)
        highest = (clean + threat.eps).clamp_(max=high)

        def move(current: Tensor, gradient: Tensor) -> Tensor:
            return current.add_(gradient.sign(), alpha=step_size).clamp_(lowest, highest)

        return move

    def move_straight(current: Tensor, gradient: Tensor) -> Tensor:
        current.addcmul_(gradient, step_size / (_length(gradient) + _SMALLEST_LENGTH)).sub_(clean)
        shrink = (threat.eps / _length(current)).clamp_(max=1.0)
        return current.mul_(shrink).add_(clean).clamp_(low, high)

    return move_straight


def _length(images: Tensor) -> Tensor:
    """The l2 length of each image, [n, 1, ...]."""
    dims = tuple(range(1, images.ndim))
    length: Tensor = torch.linalg.vector_norm(images, dim=dims, keepdim=True)
    return length


@contextmanager
def _layout_kept(model: nn.Module) -> Iterator[None]:
    """Gradients come back through `nn.Flatten` in the layout of what went in.

    They would come back contiguous, and every layer before would then compute on two layouts: 6 %
    of a step of a small channels-last network.
    """

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        image = inputs[0]
        if image.requires_grad and image.is_contiguous(memory_format=torch.channels_last):
            image.register_hook(  # type: ignore[no-untyped-call]
                partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
            )

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.Flatten):
                undo.callback(module.register_forward_pre_hook(keep).remove)
        yield


def _check(logits: object, reference: Tensor) -> None:
    largest = 0 if reference.is_floating_point() else int(reference.max())
    check_slope(
        check_logits(logits, count=len(reference), largest_label=largest, error=AttackError)
    )
