"""Certified noisy fine-tuning: clipped and noised steps on who stays, until nobody tells who left.

Koloskova, Allouah, Jaggi, Guerraoui, Koyejo 2025, arXiv 2506.06985, with clipped gradients; counted
by the trade-off curve of a Gaussian, which the Rényi divergence of the paper is the looser form of.

Why it holds. Two models that begin within 2 C0 of each other take the same steps: a step brings
them closer by the factor c = 1 - learning rate * weight decay, and two clipped gradients apart by
2 * learning rate * C1 at most. So after T steps without noise they are within

    distance = 2 C0 c^T + 2 learning rate C1 (1 + c + ... + c^(T-1)).

Shifted interpolation (Bok, Su, Altschuler 2024, arXiv 2403.00278) lets the noise of each step hide
a share of that distance, the later the more, since what is hidden early would have shrunk by
itself. The best shares, by Cauchy and Schwarz, are in step t as c^(T-t); none is more than what is
left to hide; and together they cost what one Gaussian does of variance

    sigma^2 (1 + c^2 + ... + c^(2T-2)).

No smoothness and no convexity is asked for. Two runs whose gradients are apart as far as they may
all the way reach the bound.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from privacy.errors import PlanError, PrivacyError, UnlearningError
from privacy.noise import SecureGenerator
from privacy.statistics import gdp_delta, gdp_epsilon, gdp_mu
from privacy.validate import check_module, positive, real, shown, whole

__all__ = ["Loss", "NoisyFinetuning", "noisy_finetune"]

Loss = Callable[[nn.Module, Any, Any], Tensor]
"""Losses `[n]` of a model on images and labels, or their mean."""

_ROUNDING = 1e-9
"""Norms are taken this much larger than float64 sums say, so that none passes its bound."""


@final
@dataclass(frozen=True, kw_only=True)
class NoisyFinetuning:
    """What a certified noisy fine-tuning will do, fixed before it starts.

    Guarantee: a model that went through it is (`epsilon(delta)`, delta)-indistinguishable, in both
    directions, from one that was trained without the people who leave and then went through the
    same: the same steps, on batches that hold none of them. This is no statement about plain
    re-training, nor about the people who stay. It is of the weights at the end: what was seen on
    the way (losses, the norm of the weights before) is not covered. Any further training on who
    stays keeps it. None of these values may follow from the data of the people who leave. At a
    small epsilon the noise leaves next to nothing of the weights, so that the model is to be
    trained on who stays afterwards; docs/how-to/erasure.md has measured what that comes to.

    Attributes:
        initial_norm: C0, the L2 norm to which all trained weights together are clipped first, > 0.
        gradient_norm: C1, the L2 norm to which each batch's gradient is clipped, > 0.
        learning_rate: > 0.
        weight_decay: At least 0, and below 1 / learning_rate.
        steps: How many, at least 1.
        noise_deviation: Standard deviation of what is added to each weight in each step, > 0; None
            until given or calibrated.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> plan = NoisyFinetuning(
        ...     initial_norm=1.0, gradient_norm=1.0, learning_rate=0.05, weight_decay=1.0, steps=100
        ... ).calibrate(epsilon=1.0, delta=1e-5)
        >>> round(plan.distance, 3), round(plan.mu, 3), plan.epsilon(1e-5) <= 1.0
        (2.0, 0.268, True)
    """

    initial_norm: float
    gradient_norm: float
    learning_rate: float
    steps: int
    weight_decay: float = 0.0
    noise_deviation: float | None = None

    def __post_init__(self) -> None:
        for name in ("initial_norm", "gradient_norm", "learning_rate"):
            positive(name, getattr(self, name))
        whole("steps", self.steps)
        if not 0 <= real("weight_decay", self.weight_decay) * self.learning_rate < 1:
            raise PlanError(
                f"weight_decay: expected a number from 0 to below 1 / learning_rate, "
                f"{1 / self.learning_rate:.6g}, got {self.weight_decay}"
            )
        if self.noise_deviation is not None:
            positive("noise_deviation", self.noise_deviation)

    @property
    def distance(self) -> float:
        """How far apart two models can be at the end, but for the noise."""
        kept = math.exp(self.steps * self._log_contraction)
        apart = 2 * self.learning_rate * self.gradient_norm
        return 2 * self.initial_norm * kept + apart * self._powers(1)

    @property
    def mu(self) -> float:
        """The whole of it is mu-GDP: no better told than one Gaussian from another mu away.

        Raises:
            PlanError: The plan has no noise yet.
        """
        return self.distance / (self._noise * math.sqrt(self._powers(2)))

    def epsilon(self, delta: float) -> float:
        """The least epsilon at which the guarantee holds with this delta, in (0, 1).

        Raises:
            PlanError: The plan has no noise yet, or `delta` is not in (0, 1).
        """
        return gdp_epsilon(self.mu, delta)

    def delta(self, epsilon: float) -> float:
        """The least delta at which the guarantee holds with this epsilon, at least 0.

        Raises:
            PlanError: The plan has no noise yet, or `epsilon` is negative or no finite number.
        """
        if not real("epsilon", epsilon) >= 0:
            raise PlanError(f"epsilon: expected a number >= 0, got {epsilon}")
        return gdp_delta(self.mu, epsilon)

    def calibrate(self, *, epsilon: float, delta: float) -> "NoisyFinetuning":
        """The same plan with the least noise at which it is (epsilon, delta).

        Raises:
            PlanError: `epsilon` is not above 0, or `delta` not in (0, 1).
        """
        mu = gdp_mu(positive("epsilon", epsilon), delta)
        return replace(self, noise_deviation=self.distance / (mu * math.sqrt(self._powers(2))))

    @property
    def _noise(self) -> float:
        if self.noise_deviation is None:
            raise PlanError(
                "the plan has no noise yet: call plan.calibrate(epsilon=..., delta=...) or give "
                "it a noise_deviation"
            )
        return self.noise_deviation

    @property
    def _log_contraction(self) -> float:
        return math.log1p(-self.learning_rate * self.weight_decay)

    def _powers(self, of: int) -> float:
        """1 + c^of + c^(2 of) + ..., one power a step; without cancellation where c is near 1."""
        log = of * self._log_contraction
        return math.expm1(self.steps * log) / math.expm1(log) if log else float(self.steps)


def noisy_finetune(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    plan: NoisyFinetuning,
    *,
    trained: Collection[str] | None = None,
) -> None:
    """Fine-tunes a model, in place, as the plan says: afterwards its guarantee holds for it.

    The weights are clipped to `initial_norm`. Each step takes the gradient of the mean loss of a
    batch, clips it to `gradient_norm`, and adds noise of our own generator, whose key comes from
    the operating system: no seed moves it. The weights are kept in float64 on the way, whatever the
    model's own type is, and rounded to that in the end. Nothing is returned, since nothing but the
    weights is covered.

    What the caller answers for: `batches` hold nobody who leaves, and were not chosen by them; and
    what is *not* trained here, frozen parameters and buffers (a normalisation's statistics), never
    saw those people, as features made by formulas or on public data have not. Who cannot say so
    trains all parameters. Modes are left as they are.

    Args:
        model: Any module; it may mix examples of a batch, but not keep statistics of them.
        batches: Pairs of images and labels of who stays, a step each; gone through again from the
            beginning where there are fewer than steps.
        loss: Losses `[n]` of the model on images and labels, or their mean.
        plan: With its noise.
        trained: Names of the parameters that are trained, as `named_parameters` gives them; None
            for all, which must then be trainable.

    Raises:
        UnlearningError: The model, its parameters, the batches or a loss are not as said. The model
            is as it was before.
        PlanError: The plan has no noise.
    """
    if not isinstance(plan, NoisyFinetuning):
        raise UnlearningError(f"plan: expected a NoisyFinetuning, got {shown(plan)}")
    if not callable(loss):
        raise UnlearningError(
            f"loss: expected a function of model, images and labels, got {loss!r}"
        )
    parameters = _trained_parameters(model, trained)
    before, buffers = [each.detach().clone() for each in parameters], _buffers(model)
    try:
        _finetune(model, parameters, _repeated(batches), loss, plan)
    except BaseException:
        _write(parameters, before)
        _put_back(model, buffers)
        raise


def _finetune(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batches: Iterator[tuple[Any, Any]],
    loss: Loss,
    plan: NoisyFinetuning,
) -> None:
    noise, generator = plan._noise, SecureGenerator()
    buffers = _buffers(model)
    state = _clipped(_flat(parameters), plan.initial_norm)
    if state is None:
        raise UnlearningError(
            "model: expected finite weights, got some that are not; what is left of a training "
            "that diverged cannot be fine-tuned: train it anew"
        )
    contraction = 1 - plan.learning_rate * plan.weight_decay
    for step in range(plan.steps):
        _write(parameters, _like(state, parameters))
        found = _clipped(_gradient(model, parameters, next(batches), loss), plan.gradient_norm)
        if found is None:
            raise UnlearningError(
                f"loss: expected a finite gradient, got one that is not, in step {step + 1}; plan "
                "a smaller learning rate, less noise, or a weight decay"
            )
        _check_buffers(model, buffers)
        state = contraction * state - plan.learning_rate * found
        generator.perturb([state], deviation=noise)
    _write(parameters, _like(state, parameters))


def _trained_parameters(model: nn.Module, trained: Collection[str] | None) -> list[nn.Parameter]:
    """The parameters by their names, each once; all of them must be numbers that can be trained."""
    try:
        named = dict(check_module(model).named_parameters())
    except PrivacyError as error:
        raise UnlearningError(str(error)) from None
    if isinstance(trained, str) or not (trained is None or isinstance(trained, Collection)):
        raise UnlearningError(f"trained: expected names of parameters, got {shown(trained)}")
    names = list(named if trained is None else dict.fromkeys(trained))
    unknown = [name for name in names if name not in named]
    if unknown or not names:
        raise UnlearningError(
            f"trained: expected names of the model's parameters, {', '.join(named) or 'none'}, got "
            f"{shown(unknown or names)}"
        )
    frozen = [name for name in names if not named[name].requires_grad]
    if frozen:
        raise UnlearningError(
            f"{', '.join(frozen)}: expected parameters that are trained, got frozen ones; unfreeze "
            "them, or, if they never saw the people who leave, name the others in trained="
        )
    wrong = [name for name in names if not named[name].is_floating_point()]
    if wrong:
        raise UnlearningError(f"{', '.join(wrong)}: expected real numbers, got {named[wrong[0]]}")
    return [named[name] for name in names]


def _repeated(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Batch after batch, from the beginning again where they end."""
    if not isinstance(batches, Iterable):
        raise UnlearningError(f"batches: expected pairs of images and labels, got {shown(batches)}")
    while True:
        count = 0
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise UnlearningError(
                    f"batches: expected pairs of images and labels, got {type(batch).__name__}"
                )
            count += 1
            yield batch[0], batch[1]
        if not count:
            raise UnlearningError(
                "batches: expected one for each step, or some that can be gone through again, got "
                "an end; give a list or a DataLoader of who stays"
            )


def _gradient(
    model: nn.Module, parameters: list[nn.Parameter], batch: tuple[Any, Any], loss: Loss
) -> Tensor:
    """Of the mean loss, float64; `.grad` is left alone."""
    with torch.enable_grad():
        losses = loss(model, *batch)
        if not isinstance(losses, Tensor) or not losses.is_floating_point() or not losses.numel():
            raise UnlearningError(f"loss: expected a tensor of floats, got {shown(losses)}")
        if not losses.requires_grad:
            raise UnlearningError(
                "loss: expected one that depends on the trained parameters, got a constant"
            )
        found = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    whole_gradient = [
        torch.zeros_like(parameter) if each is None else each
        for each, parameter in zip(found, parameters, strict=True)
    ]
    return _flat(whole_gradient)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one vector, float64 on the CPU."""
    return torch.cat([each.detach().reshape(-1).to("cpu", torch.float64) for each in tensors])


def _clipped(vector: Tensor, norm: float) -> Tensor | None:
    """The vector, or where it is longer than `norm` its direction with that length; None if NaN."""
    length = float(torch.linalg.vector_norm(vector)) * (1 + _ROUNDING)
    if not math.isfinite(length):
        return None
    return vector * min(1.0, norm / length) if length else vector


def _like(state: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A vector cut into the shapes of the parameters."""
    parts = torch.split(state, [parameter.numel() for parameter in parameters])
    return [part.view(each.shape) for part, each in zip(parts, parameters, strict=True)]


def _write(parameters: list[nn.Parameter], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a model keeps beside its parameters."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _check_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Refuses statistics of the batches: they are kept without noise, and tell of every step."""
    now = dict(model.named_buffers())
    changed = [name for name in {**now, **before} if not _same(now.get(name), before.get(name))]
    if changed:
        raise UnlearningError(
            f"{', '.join(changed)}: expected a model that keeps nothing of its batches, got a "
            "buffer that changes; put GroupNorm in the place of BatchNorm, or, if its statistics "
            "never saw the people who leave, freeze it: layer.eval()"
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _put_back(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.copy_(buffers[name])
