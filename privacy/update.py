"""The private step: one backward pass, each example clipped, the sum kept, then noise.

Source: Abadi et al. 2016, arXiv 1607.00133. What is done with the noised gradient (the optimizer)
is post-processing, and not here.
"""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import nn

from privacy.clipping import PerExampleGradients, Tape, clip_factors
from privacy.errors import StepError, UnsupportedLayer
from privacy.noise import SecureGenerator

__all__ = ["ClippedSum", "differentiate"]


class ClippedSum:
    """The sum of clipped per-example gradients of one Poisson sample.

    A class because it adds up over the sample's physical batches.

    Guarantee: adding or removing one example changes the sum by at most `max_grad_norm` in L2 norm,
    over all parameters together, up to the rounding of the sum itself.

    Args:
        parameters: The trainable parameters by dotted name, in a fixed order.
        tape: The tape that the model's layers write on.
        max_grad_norm: C, > 0.

    Example:
        >>> from privacy.clipping import install, rule_of
        >>> model, tape = nn.Linear(2, 1, bias=False), Tape()
        >>> installation = install(model, tape, rule_of)
        >>> clipped = ClippedSum(dict(model.named_parameters()), tape, max_grad_norm=1.0)
        >>> clipped.add(model(torch.tensor([[3.0, 4.0]])).squeeze(1), torch.tensor([True]))
        0
        >>> [[round(value, 3) for value in row] for row in clipped.sums[0].tolist()]
        [[0.6, 0.8]]
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], tape: Tape, *, max_grad_norm: float
    ) -> None:
        self._parameters = dict(parameters)
        self._tape = tape
        self._max_grad_norm = max_grad_norm
        # One flat buffer: the noise is added to all parameters at once.
        ordered = list(self._parameters.values())
        self._flat = torch.zeros(
            sum(p.numel() for p in ordered),
            device=ordered[0].device,
            dtype=reduce(torch.promote_types, (p.dtype for p in ordered), torch.float32),
        )
        self.sums = self._split(self._flat)

    def reset(self) -> None:
        """Forgets what was added.

        Example:
            >>> clipped = ClippedSum({"w": nn.Parameter(torch.ones(1))}, Tape(), max_grad_norm=1.0)
            >>> clipped.reset()
        """
        self._flat.zero_()

    def add(self, losses: torch.Tensor, mask: torch.Tensor) -> int:
        """Runs backward from `losses` and adds each example's clipped gradient.

        Guarantee: the batch is added whole, or, where this raises, not at all.

        Args:
            losses: One loss an example, float [rows], with a graph that leads to the model.
            mask: Which rows are examples, bool [rows]; the others count nothing.

        Returns:
            How many examples had a gradient that is not finite: they contribute zero.

        Raises:
            StepError: The losses have the wrong shape, no graph, or lie on another device.
            UnsupportedLayer: A layer saw rows that are not examples.

        Example:
            >>> clipped = ClippedSum({"w": nn.Parameter(torch.ones(1))}, Tape(), max_grad_norm=1.0)
            >>> clipped.add(torch.tensor(1.0), torch.tensor([True]))
            Traceback (most recent call last):
            ...
            privacy.errors.StepError: losses: expected one loss an example, shape [1], got []: ...
        """
        if losses.device != self._flat.device:
            raise StepError(
                f"losses: expected device {self._flat.device}, got {losses.device}; move the model "
                "before attach, not after it"
            )
        parts = differentiate(losses, self._parameters, self._tape, examples=len(mask))
        return self._add_clipped(parts, mask.to(losses.device))

    def noised_mean(
        self, generator: SecureGenerator, *, noise_multiplier: float, batch_size: int
    ) -> list[torch.Tensor]:
        """Adds Gaussian noise, divides by the expected batch size, and starts anew.

        The noise has standard deviation noise_multiplier * max_grad_norm. The division is by the
        plan's public batch size, never by the secret size of the sample.

        Returns:
            One tensor for each parameter, of its shape and dtype.

        Example:
            >>> clipped = ClippedSum({"w": nn.Parameter(torch.ones(3))}, Tape(), max_grad_norm=1.0)
            >>> clipped.noised_mean(SecureGenerator(), noise_multiplier=1.0, batch_size=10)[0].shape
            torch.Size([3])
        """
        noise = generator.normal(self._flat.numel()).to(self._flat.device)
        total = noise.mul_(noise_multiplier * self._max_grad_norm).add_(self._flat).div_(batch_size)
        self.reset()
        return [
            part.to(p.dtype)
            for part, p in zip(self._split(total), self._parameters.values(), strict=True)
        ]

    @torch.no_grad()
    def _add_clipped(
        self, parts: dict[nn.Parameter, PerExampleGradients], mask: torch.Tensor
    ) -> int:
        """Clips what the tape took and adds it; rows that are not finite are left out."""
        squared_norms = torch.stack([part.squared_norms() for part in parts.values()]).sum(0)
        factors = clip_factors(squared_norms, max_grad_norm=self._max_grad_norm) * mask
        finite = squared_norms.isfinite()
        if not bool(finite.all()):
            # A factor of zero does not undo a NaN: these rows must not enter a product at all.
            rows = finite.nonzero().squeeze(1)
            parts = {parameter: part.select(rows) for parameter, part in parts.items()}
            factors = factors[rows]
        # All sums before the first addition: running out of memory must not leave half a batch.
        added = {parameter: part.weighted_sum(factors) for parameter, part in parts.items()}
        for parameter, total in zip(self._parameters.values(), self.sums, strict=True):
            if parameter in added:
                total += added[parameter]
        return int((~finite & mask).sum())

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A flat buffer as one view for each parameter."""
        ordered = list(self._parameters.values())
        parts = torch.split(flat, [p.numel() for p in ordered])
        return [part.view(p.shape) for part, p in zip(parts, ordered, strict=True)]


def differentiate(
    losses: torch.Tensor, parameters: Mapping[str, nn.Parameter], tape: Tape, *, examples: int
) -> dict[nn.Parameter, PerExampleGradients]:
    """Runs backward from `losses`; every `.grad` stays as it was.

    Args:
        losses: One loss an example, float [examples], with a graph that leads to the model.
        parameters: The trainable parameters by dotted name.
        tape: The tape that the model's layers write on.
        examples: How many losses are expected.

    Returns:
        The per-example gradients of every parameter that the losses depend on.

    Raises:
        StepError: The losses have the wrong shape, or no graph that leads to the model.
        UnsupportedLayer: A layer saw rows that are not examples, or a parameter is used outside of
            the layer that owns it.

    Example:
        >>> from privacy.clipping import install, rule_of
        >>> model, tape = nn.Linear(2, 1), Tape()
        >>> installation = install(model, tape, rule_of)
        >>> losses = model(torch.ones(3, 2)).squeeze(1)
        >>> parts = differentiate(losses, dict(model.named_parameters()), tape, examples=3)
        >>> parts[model.weight].instantiate().shape
        torch.Size([3, 1, 2])
    """
    _check_losses(losses, examples)
    kept = [(parameter, parameter.grad) for parameter in parameters.values()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        with tape.record(examples=examples):
            _run_backward(losses)
        bypassed = [name for name, p in parameters.items() if p.grad is not None]
    finally:
        parts = tape.take()
        for parameter, gradient in kept:
            parameter.grad = gradient
    if bypassed:
        raise UnsupportedLayer(
            f"{', '.join(bypassed)}: the gradient did not come through the forward of the layer "
            "that owns the parameter, so it cannot be clipped example by example; call that layer "
            "instead of using its parameter, and attach a model that was detached again"
        )
    if not parts:
        raise StepError(
            "losses: their graph reaches no trainable layer of the attached model; compute them "
            "with private.model, outside torch.no_grad()"
        )
    return parts


def _run_backward(losses: torch.Tensor) -> None:
    """One backward pass from every loss at once."""
    try:
        torch.autograd.backward(losses, torch.ones_like(losses))
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise StepError(
            "losses: they were differentiated before; give the losses of the batch that "
            "private.batches gave last, fresh from the model"
        ) from error


def _check_losses(losses: torch.Tensor, rows: int) -> None:
    """Refuses losses that were averaged, belong to another batch, or have no graph."""
    if losses.shape != (rows,):
        raise StepError(
            f"losses: expected one loss an example, shape [{rows}], got {list(losses.shape)}: "
            'do not average them (reduction="none"), and give the losses of the batch that '
            "private.batches gave last"
        )
    if not losses.requires_grad:
        raise StepError(
            "losses: they carry no graph; compute them with private.model, outside torch.no_grad()"
        )
