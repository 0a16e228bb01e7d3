"""The private step: one backward pass, each example clipped, the sum kept, then noise.

Source: Abadi et al. 2016, arXiv 1607.00133. What is done with the noised gradient (the optimizer)
is post-processing, and not here.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from privacy.clipping.factors import Clipping, FlatClipping, clip_factors
from privacy.clipping.tape import Tape
from privacy.differentiation import Parts, differentiate
from privacy.errors import StepError
from privacy.noise import SecureGenerator
from privacy.summation import FloatSum, GridSum, Reduce, Summation, alone

__all__ = ["ClippedSum"]


class ClippedSum:
    """The sum of clipped per-example gradients of one Poisson sample.

    A class because it adds up over the sample's physical batches, and because an adaptive clipping
    norm follows what it saw; `max_grad_norm`, its one owner here, is that of the first sample.

    Guarantee: adding or removing one example changes the sum by at most `max_grad_norm` in L2 norm,
    over all parameters together: exactly where `float_safe`, else up to the rounding of the sum
    itself. Clipping and noise of one sample use the same norm.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tape: Tape,
        *,
        max_grad_norm: float,
        clipping: Clipping | None = None,
        float_safe: bool = False,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self._parameters = dict(parameters)
        self._tape = tape
        self._clipping = clipping or FlatClipping()
        layers = list(dict.fromkeys(_layer_of(name) for name in self._parameters))
        self._shares = self._clipping.shares(layers)
        self._part_of = {
            parameter: layers.index(_layer_of(name)) if len(self._shares) > 1 else 0
            for name, parameter in self._parameters.items()
        }
        self._count = 0.0
        self._process = os.getpid()
        # Not an except clause: a second Ctrl-C would interrupt that too.
        self._interrupted = False
        ordered = list(self._parameters.values())
        self._device = ordered[0].device
        self._total: Summation = GridSum(ordered) if float_safe else FloatSum(ordered)

    @property
    def sums(self) -> list[Tensor]:
        """What was added so far, one tensor for each parameter; secret."""
        return self._total.sums()

    def check_range(self, *, examples: int, noise_multiplier: float) -> None:
        """Refuses, before training, what a `float_safe` sum could not hold exactly."""
        noise_multiplier = self._clipping.gradient_noise_multiplier(noise_multiplier)
        self._total.check_range(examples=examples, noise_multiplier=noise_multiplier)

    def reset(self) -> None:
        """Forgets what was added; the clipping norm stays."""
        self._interrupted = True
        self._tape.reset()
        self._total.reset()
        self._count = 0.0
        self._interrupted = False

    def add(self, losses: Tensor, mask: Tensor) -> int:
        """Runs backward from `losses` and adds each example's clipped gradient.

        Guarantee: the batch is added whole, or not at all, or the sample cannot be released. `mask`
        says which rows are examples, bool [rows]; the others count nothing. Returns how many
        examples had a gradient that is not finite: they contribute zero.
        """
        return self.keep(self.gradients_of(losses, mask), mask)

    def gradients_of(
        self,
        losses: Tensor,
        mask: Tensor,
        images: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Parts:
        """The gradients of a batch that may be added; the sum stays as it was.

        Every refusal is here: after one, or after an interruption, the same batch may be tried
        again. Copies are compared with the `images` that were given, where these are known. Where
        units are persons, `shares` says what each of their rows counts in their mean.
        """
        self._refuse_interrupted()
        if not isinstance(losses, Tensor):
            raise StepError(
                f"losses: expected a tensor with one loss an example, got {type(losses).__name__}"
            )
        if losses.device != self._device:
            raise StepError(
                f"losses: expected device {self._device}, got {losses.device}; move the model "
                "before attach, not after it"
            )
        return differentiate(
            losses,
            self._parameters,
            self._tape,
            examples=len(mask),
            images=images,
            shares=shares,
        )

    def keep(self, parts: Parts, mask: Tensor) -> int:
        """Clips what `gradients_of` gave and adds it; how many examples were not finite.

        Whatever interrupts it, a Ctrl-C among other things, may leave half a batch in the sum: the
        sample is then lost, and only `reset` goes on.
        """
        self._refuse_interrupted()
        if not parts:
            raise StepError("losses: expected a gradient of some parameter, got none")
        self._interrupted = True
        non_finite = self._add_clipped(parts, mask.to(self._device))
        self._interrupted = False
        return non_finite

    def noised_mean(
        self,
        generator: SecureGenerator,
        *,
        noise_multiplier: float,
        batch_size: int,
        reduce: Reduce = alone,
    ) -> list[Tensor]:
        """Adds Gaussian noise, divides by the plan's public batch size, and starts anew.

        The noise has standard deviation noise_multiplier * max_grad_norm, and a little more where
        the clipping releases a count besides. `reduce` comes before the noise.
        """
        self._refuse_interrupted()
        self._interrupted = True
        means = self._total.noised_mean(
            generator,
            noise_multiplier=self._clipping.gradient_noise_multiplier(noise_multiplier),
            max_grad_norm=self.max_grad_norm,
            batch_size=batch_size,
            reduce=reduce,
        )
        count = float(reduce(torch.tensor(self._count, dtype=torch.float64)))
        self.max_grad_norm = self._clipping.next_norm(
            self.max_grad_norm, count, batch_size, generator
        )
        self.reset()
        released = zip(means, self._parameters.values(), strict=True)
        return [mean.to(parameter.dtype) for mean, parameter in released]

    def _refuse_interrupted(self) -> None:
        """Refuses a sample that may hold half a batch, or that another process may release too."""
        if os.getpid() != self._process:
            raise StepError(
                "the process was forked since the model was attached: parent and child would "
                "release the same sample, each by itself; step in the process that attached, or "
                "attach in the one that trains"
            )
        if self._interrupted:
            raise StepError(
                "the sample was interrupted while it was added up or released, so it is lost; "
                "begin the next one: iterate private.batches anew"
            )

    @torch.no_grad()
    def _add_clipped(self, parts: Parts, mask: Tensor) -> int:
        """Clips what the tape took and adds it; rows that are not finite are left out."""
        squares = self._squared_norms(parts)
        whole = squares.sum(0)
        bound = self._total.clip_to(self.max_grad_norm)
        shares = torch.tensor(self._shares, dtype=squares.dtype, device=squares.device)
        factors = mask * clip_factors(
            squares, max_grad_norm=bound * shares[:, None], clipping=self._clipping
        )
        finite = whole.isfinite()
        if not bool(finite.all()):
            # A factor of zero does not undo a NaN: these rows must not enter a product at all.
            rows = finite.nonzero().squeeze(1)
            parts = {parameter: part.select(rows) for parameter, part in parts.items()}
            factors = factors[:, rows]
        of_share = factors.unbind()
        self._total.add(parts, {p: of_share[self._part_of[p]] for p in parts})
        self._count += self._clipping.count(whole[mask].sqrt(), self.max_grad_norm)
        return int((~finite & mask).sum())

    def _squared_norms(self, parts: Parts) -> Tensor:
        """Squared norms of what is clipped apart, float64 [shares, n]."""
        of_parameters = torch.stack([part.squared_norms() for part in parts.values()])
        if len(self._shares) == 1:
            return of_parameters.sum(0, keepdim=True)
        of_shares = of_parameters.new_zeros(len(self._shares), of_parameters.shape[1])
        where = torch.tensor([self._part_of[p] for p in parts], device=of_parameters.device)
        return of_shares.index_add_(0, where, of_parameters)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]
