"""Private trainings with one line wrong: the audit's planted defects, and how often it finds them.

The tests plant each once. `python tests/audit_plants.py` plants each with ten secrets, runs honest
trainings beside, and writes docs/audit-plants.json; it goes on where it was stopped.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from privacy import DPPlan, PhysicalBatches, PrivateTraining, SecureGenerator, attach
from privacy.audit import AuditReport, AuditSettings, audit
from privacy.sampling import sample_indices
from secure_cnn.record import Measurements, Row, hardware, versions

KEY = bytes(range(32))
SAMPLES, CLASSES = 96, 8
SIGMA, CLIP = 1.0, 0.5
PLAN = DPPlan(
    samples=SAMPLES,
    batch_size=24,
    epochs=2,
    max_grad_norm=CLIP,
    noise_multiplier=SIGMA,
    delta=1e-3,
)
SETTINGS = AuditSettings(canaries=8, steps=50, largest_batch=16)

Losses = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def data_of(samples: int = SAMPLES) -> list[tuple[torch.Tensor, int]]:
    """A data set of drawn images."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(1, 6, 6, generator=generator), i % CLASSES) for i in range(samples)]


def network(norm: nn.Module | None = None) -> nn.Module:
    """A small network with an in-place operation, the same every time."""
    norm = nn.GroupNorm(2, 4) if norm is None else norm
    layers = nn.Conv2d(1, 4, 3), norm, nn.ReLU(inplace=True)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def losses_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss an example."""
    return F.cross_entropy(model(images), labels, reduction="none")


def ours(
    plan: DPPlan,
    dataset: Any,
    *,
    model: nn.Module | None = None,
    key: bytes = KEY,
    batches: PhysicalBatches | None = None,
) -> PrivateTraining:
    """Our own private training, with a secret that the test knows."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    private = attach(plan, model, optimizer, dataset, physical_batches=batches)
    private._generator = SecureGenerator(key)
    return private


def audited(make: Callable[[DPPlan, Any], Any], objective: Losses = losses_of) -> AuditReport:
    """An audit of what `make` puts together."""
    return audit(lambda p, d: (make(p, d), objective), PLAN, data_of(), settings=SETTINGS)


class Naive:
    """Textbook DP-SGD, one example at a time; subclasses have one line wrong."""

    objective: Losses = staticmethod(losses_of)

    def __init__(
        self, plan: DPPlan, dataset: Any, model: nn.Module | None = None, *, key: bytes = KEY
    ) -> None:
        self.model = network() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.plan, self.dataset = plan, dataset
        self.generator = SecureGenerator(key)
        self.parameters = list(self.model.parameters())
        self.size = sum(p.numel() for p in self.parameters)
        self.total = torch.zeros(self.size)
        self.last = True
        self.number = -1

    @property
    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each sample in two physical batches."""
        for number in range(self.plan.steps):
            self.number = number
            sample = self.sample()
            for self.last, indices in zip((False, True), sample.tensor_split(2), strict=True):
                self.rows = len(indices)
                yield self.dataset.batch(indices)

    def sample(self) -> torch.Tensor:
        """A coin for each row."""
        return sample_indices(
            self.generator, samples=self.plan.samples, sampling_rate=self.plan.sampling_rate
        )

    def step(self, losses: torch.Tensor) -> bool:
        """Clips and adds up; noise and a step when the sample is complete."""
        self.total += self.sum_of(losses)
        if self.last:
            noised = (self.total + self.noise()) / self.divisor()
            for p, g in zip(
                self.parameters, noised.split([p.numel() for p in self.parameters]), strict=True
            ):
                p.grad = g.view_as(p)
            self.optimizer.step()
            self.total = torch.zeros(self.size)
        return self.last

    def gradients(self, losses: torch.Tensor) -> torch.Tensor:
        """Per-example gradients [n, d]; a sample may be empty."""
        if not len(losses):
            return torch.zeros(0, self.size)
        rows = torch.autograd.grad(
            losses,
            self.parameters,
            torch.eye(len(losses)),
            is_grads_batched=True,
            retain_graph=True,
        )
        return torch.cat([row.flatten(1) for row in rows], 1)

    def clipped(self, gradients: torch.Tensor) -> torch.Tensor:
        """Each row to at most C."""
        norms = gradients.norm(dim=1, keepdim=True)
        return gradients * (self.plan.max_grad_norm / norms).clamp(max=1)

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        """The clipped sum of one physical batch."""
        return self.clipped(self.gradients(losses)).sum(0)

    def noise(self) -> torch.Tensor:
        """Of the plan."""
        sigma = self.plan.noise_multiplier
        assert sigma is not None
        return sigma * self.plan.max_grad_norm * self.generator.normal(self.size).float()

    def divisor(self) -> float:
        """The logical batch size."""
        return self.plan.batch_size


class Sampler(Naive):
    """Coins of its own chances; subclasses say which."""

    def coins(self, chances: torch.Tensor) -> torch.Tensor:
        """Rows whose coin is heads, at one chance each."""
        return (self.generator.uniform(len(chances)) < chances).nonzero().squeeze(1)

    def shuffled(self) -> torch.Tensor:
        """All rows in a secret order."""
        return self.generator.uniform(self.plan.samples).argsort()

    def even(self) -> torch.Tensor:
        """The plan's chance for every row."""
        return torch.full((self.plan.samples,), self.plan.sampling_rate)


class FixedSize(Sampler):
    """A fixed number of rows, without replacement."""

    def sample(self):
        return self.shuffled()[: self.plan.batch_size]


class ShuffledEpochs(Sampler):
    """One shuffle an epoch, cut in parts."""

    order = torch.empty(0, dtype=torch.int64)

    def sample(self):
        if len(self.order) < self.plan.batch_size:
            self.order = self.shuffled()
        found, self.order = self.order.split(
            [self.plan.batch_size, len(self.order) - self.plan.batch_size]
        )
        return found


class ShuffledInChanceParts(Sampler):
    """One shuffle an epoch, cut at sizes that look like those of coins."""

    order = torch.empty(0, dtype=torch.int64)

    def sample(self):
        size = len(super().sample())
        if len(self.order) < size:
            self.order = torch.cat([self.order, self.shuffled()]).unique_consecutive()
        found, self.order = self.order[:size], self.order[size:]
        return found.unique()


class TakesTurns(Sampler):
    """Even rows in even steps, odd rows in odd ones: no coin at all."""

    def sample(self):
        rows = torch.arange(self.plan.samples)
        return rows[rows % round(1 / self.plan.sampling_rate) == self.number % 2]


class Window(Sampler):
    """A window that moves along the rows."""

    def sample(self):
        rows = torch.arange(self.plan.batch_size) + 5 * self.number
        return rows % self.plan.samples


class RowsShareCoins(Sampler):
    """Four rows enter together."""

    def sample(self):
        chosen = self.coins(torch.full((self.plan.samples // 4,), self.plan.sampling_rate))
        return (4 * chosen[:, None] + torch.arange(4)).flatten()


class PairsExclude(Sampler):
    """Of rows i and i + n/2 exactly one is in."""

    def sample(self):
        half = self.plan.samples // 2
        first = self.coins(torch.full((half,), 0.5)) if self.plan.sampling_rate == 0.5 else None
        if first is None:
            return super().sample()
        inside = torch.zeros(half, dtype=torch.bool)
        inside[first] = True
        return torch.cat([inside, ~inside]).nonzero().squeeze(1)


class SeldomTwiceInARow(Sampler):
    """Who was in the last sample is half as likely to be in again; the rate is kept."""

    last_sample = torch.empty(0, dtype=torch.int64)

    def sample(self):
        rate = self.plan.sampling_rate
        chances = torch.full((self.plan.samples,), rate * (1 - rate / 2) / (1 - rate))
        chances[self.last_sample] = rate / 2
        self.last_sample = self.coins(chances)
        return self.last_sample


class SampleTwice(Sampler):
    """Each sample is used for two steps."""

    kept = torch.empty(0, dtype=torch.int64)

    def sample(self):
        if self.number % 2 == 0:
            self.kept = super().sample()
        return self.kept


class SampleAgainOnce(Sampler):
    """Step 30 has the sample of step 11 again."""

    def sample(self):
        found = super().sample()
        if self.number == 11:
            self.kept = found
        return self.kept if self.number == 30 else found


class Antithetic(Sampler):
    """Odd steps take who was left out before, as far as the rate allows."""

    def sample(self):
        if self.number % 2 == 0:
            self.kept = super().sample()
            return self.kept
        rate = self.plan.sampling_rate
        chances = torch.full((self.plan.samples,), rate / (1 - rate))
        chances[self.kept] = 0.0
        return self.coins(chances)


class RateByLabel(Sampler):
    """Half of the labels are twice as likely as the others."""

    def sample(self):
        # Past the audit's own eyes, which would take these for rows of the sample.
        label = torch.tensor([self.dataset._dataset[i][1] for i in self.dataset._indices.tolist()])
        return self.coins(self.even() * torch.where(label < CLASSES // 2, 4 / 3, 2 / 3))


class RateByTime(Sampler):
    """The rate rises from 60 % of the planned one to 140 %."""

    def sample(self):
        return self.coins(self.even() * (0.6 + 0.8 * self.number / (self.plan.steps - 1)))


class FirstRowsFavoured(Sampler):
    """The chance falls from 1.5 times the planned one to half of it."""

    def sample(self):
        return self.coins(self.even() * torch.linspace(1.5, 0.5, self.plan.samples))


class OneRowAlways(Sampler):
    """The last row has no coin."""

    def sample(self):
        return torch.cat([super().sample(), torch.tensor([self.plan.samples - 1])]).unique()


class OneRowNever(Sampler):
    """Row 5 is left out."""

    def sample(self):
        found = super().sample()
        return found[found != 5]


class WithReplacement(Sampler):
    """Rows may come twice in one sample."""

    def sample(self):
        return (self.generator.uniform(self.plan.batch_size) * self.plan.samples).long()


class RateTooHigh(Sampler):
    """Everyone's chance is 15 % above the planned one."""

    def sample(self):
        return self.coins(1.15 * self.even())


class CutToTheMean(Sampler):
    """A sample larger than expected loses its last rows."""

    def sample(self):
        return super().sample()[: self.plan.batch_size]


class FilledToTheMean(Sampler):
    """A sample smaller than expected gets more rows, any that are not in it."""

    def sample(self):
        sample = super().sample()
        others = self.shuffled()
        others = others[~torch.isin(others, sample)]
        missing = max(self.plan.batch_size - len(sample), 0)
        return torch.cat([sample, others[:missing]]).sort().values


class Systematic(Sampler):
    """A secret start, and from there every so many-th row."""

    def sample(self):
        stride = round(1 / self.plan.sampling_rate)
        start = int(self.generator.uniform(1) * stride)
        return torch.arange(start, self.plan.samples, stride)


class Noisy(Naive):
    """Noise with one line wrong: `of` changes a step's standard normal numbers."""

    def noise(self):
        return self.of(super().noise() / self.unit) * self.unit

    @property
    def unit(self) -> float:
        """The planned deviation."""
        return self.plan.noise_multiplier * self.plan.max_grad_norm

    def part(self, name: str) -> slice:
        """The coordinates of one parameter."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        first = sum(list(sizes.values())[: list(sizes).index(name)])
        return slice(first, first + sizes[name])

    def of(self, noise: torch.Tensor) -> torch.Tensor:
        """Wrong noise, of standard normal numbers [d]."""
        return noise


class NoNoiseOnLastBias(Noisy):
    def of(self, noise):
        noise[self.part("4.bias")] = 0
        return noise


class HalfOnFirstConvolution(Noisy):
    def of(self, noise):
        noise[self.part("0.weight")] /= 2
        return noise


class Uniform(Noisy):
    def of(self, noise):
        return (2 * torch.special.ndtr(noise) - 1) * math.sqrt(3)


class UniformOnLastBias(Noisy):
    def of(self, noise):
        part = noise[self.part("4.bias")]
        noise[self.part("4.bias")] = (2 * torch.special.ndtr(part) - 1) * math.sqrt(3)
        return noise


class NoneInOneStepOf25(Noisy):
    def of(self, noise):
        return noise * (self.number % 25 != 24)


class Laplace(Noisy):
    def of(self, noise):
        chance = torch.special.ndtr(noise.double()) - 0.5
        return (-chance.sign() * (1 - 2 * chance.abs()).log() / math.sqrt(2)).float()


class HeavyTails(Noisy):
    """Student's law with five degrees of freedom, of the right variance."""

    def of(self, noise):
        squares = self.generator.normal(5 * self.size).view(5, -1).square().sum(0)
        return (noise / (squares / 5).sqrt() * math.sqrt(3 / 5)).float()


class TailsCut(Noisy):
    """Clamped at 2.5 deviations."""

    def of(self, noise):
        return noise.clamp(-2.5, 2.5)


class TailsRedrawn(Noisy):
    """What lies beyond 2.5 deviations is drawn again, and the variance put right."""

    def of(self, noise):
        fresh = super(Noisy, self).noise() / self.unit
        noise = torch.where(noise.abs() > 2.5, fresh.clamp(-2.5, 2.5), noise)
        return noise / 0.9545


class ScaleMixed(Noisy):
    """Every number has a deviation of 0.6 or of 1.28, by a coin."""

    def of(self, noise):
        wide = self.generator.bernoulli(self.size, 0.5)
        return noise * torch.where(wide, math.sqrt(1.64), 0.6)


class SameInTwoParameters(Noisy):
    """A bias gets the noise of another one of its size again."""

    def of(self, noise):
        noise[self.part("1.bias")] = noise[self.part("1.weight")]
        return noise


class AgainAfterTenSteps(Noisy):
    def of(self, noise):
        self.pool = getattr(self, "pool", [])
        if len(self.pool) < 10:
            self.pool.append(noise.clone())
        return self.pool[self.number % 10]


class OneTensorAgain(Noisy):
    """The last bias gets its first noise in every step."""

    def of(self, noise):
        part = self.part("4.bias")
        self.first = getattr(self, "first", noise[part].clone())
        noise[part] = self.first
        return noise


class Neighbours(Noisy):
    """Each number holds a third of its neighbour."""

    def of(self, noise):
        return (noise + noise.roll(1) / 3) / math.sqrt(1 + 1 / 9)


class Halves(Noisy):
    """The second half is the first one with the other sign."""

    def of(self, noise):
        half = len(noise) // 2
        noise[half : 2 * half] = -noise[:half]
        return noise


class Mirrored(Noisy):
    """The second half is the first one backwards, with fresh signs."""

    def of(self, noise):
        half = len(noise) // 2
        noise[-half:] = noise[:half].flip(0).abs() * noise[-half:].sign()
        return noise


class AntitheticSteps(Noisy):
    """Odd steps take off what even ones put on, in part."""

    def of(self, noise):
        before, self.before = getattr(self, "before", noise), noise.clone()
        return (noise - 0.5 * before) / math.sqrt(1.25) if self.number else noise


class CommonPart(Noisy):
    """A tenth of the variance is the same in all steps."""

    def of(self, noise):
        self.first = getattr(self, "first", super(Noisy, self).noise() / self.unit)
        return math.sqrt(0.9) * noise + math.sqrt(0.1) * self.first


class Shifted(Noisy):
    """Every step has the last one's noise, moved along by one."""

    def of(self, noise):
        self.first = getattr(self, "first", noise.clone())
        return self.first.roll(self.number)


class AnotherOrder(Noisy):
    """The same numbers in another order."""

    def of(self, noise):
        self.first = getattr(self, "first", noise.clone())
        return self.first[noise.argsort()]


class CoarseGrid(Noisy):
    """Rounded to twentieths of the deviation."""

    def of(self, noise):
        return (20 * noise).round() / 20


class LowPrecision(Noisy):
    """Drawn in bfloat16."""

    def of(self, noise):
        return noise.bfloat16().float()


class LowRank(Noisy):
    """The last weight's noise has rank two."""

    def of(self, noise):
        part = self.part("4.weight")
        left, right = noise[part][: 2 * CLASSES], self.generator.normal(128).float()
        noise[part] = (left.view(CLASSES, 2) @ right.view(2, 64) / math.sqrt(2)).flatten()
        return noise


class Drifts(Noisy):
    """The deviation falls from 1.15 times the planned one to 0.85 of it."""

    def of(self, noise):
        return noise * (1.15 - 0.3 * self.number / (self.plan.steps - 1))


class EverySecondNumber(Noisy):
    def of(self, noise):
        noise[::2] = 0
        return noise * math.sqrt(2)


class EverySecondByChance(Noisy):
    def of(self, noise):
        return noise * math.sqrt(2) * self.generator.bernoulli(self.size, 0.5)


class ByTheSample(Noisy):
    """Scaled by the sample's size instead of the expected one."""

    def of(self, noise):
        return noise * max(1, self.in_sample) / self.plan.batch_size

    def sample(self):
        found = super().sample()
        self.in_sample = len(found)
        return found


class WithTheSum(Noisy):
    """Each number has the sign of what it should hide."""

    def of(self, noise):
        return noise.abs() * torch.where(self.total == 0, noise, self.total).sign()


class Clipper(Naive):
    """Clipping with one line wrong."""

    batch = 0

    def factor(self, norms: torch.Tensor) -> torch.Tensor:
        """By which a gradient of this norm is multiplied."""
        return (self.plan.max_grad_norm / norms).clamp(max=1)

    def sum_of(self, losses):
        self.batch += 1
        return super().sum_of(losses)


class OneBatchIn20Unclipped(Clipper):
    def clipped(self, gradients):
        return gradients if self.batch % 20 == 7 else super().clipped(gradients)


class OneBatchIn20ABitMore(Clipper):
    """Clipped at 1.3 C, in one physical batch of twenty."""

    def clipped(self, gradients):
        found = super().clipped(gradients / 1.3)
        return 1.3 * found if self.batch % 20 == 7 else super().clipped(gradients)


class LastExampleUnclipped(Clipper):
    def clipped(self, gradients):
        return torch.cat([super().clipped(gradients[:-1]), gradients[-1:]])


class EachLayerToC(Clipper):
    def clipped(self, gradients):
        parts = gradients.split([p.numel() for p in self.parameters], 1)
        return torch.cat([super(Clipper, self).clipped(part) for part in parts], 1)


class NormWithoutBiases(Clipper):
    def clipped(self, gradients):
        parts = gradients.split([p.numel() for p in self.parameters], 1)
        kept = [g for g, p in zip(parts, self.parameters, strict=True) if p.dim() > 1]
        return gradients * self.factor(torch.cat(kept, 1).norm(dim=1, keepdim=True))


class NormOfTheLastLayer(Clipper):
    def clipped(self, gradients):
        size = sum(p.numel() for p in self.parameters[-2:])
        return gradients * self.factor(gradients[:, -size:].norm(dim=1, keepdim=True))


class FirstLayerUnclipped(Clipper):
    def clipped(self, gradients):
        found = super().clipped(gradients)
        size = self.parameters[0].numel()
        return torch.cat([gradients[:, :size], found[:, size:]], 1)


class ByTheLargestNumber(Clipper):
    """The largest number of a gradient is taken for its norm."""

    def clipped(self, gradients):
        return gradients * self.factor(gradients.abs().amax(dim=1, keepdim=True))


class MeanClipped(Clipper):
    def sum_of(self, losses):
        mean = self.gradients(losses).mean(0, keepdim=True)
        return self.rows * self.clipped(mean).sum(0)


class ByTheTrueSize(Clipper):
    """The threshold is C times the expected by the true number of rows."""

    def clipped(self, gradients):
        share = self.plan.batch_size / 2 / max(1, self.rows)
        return share * super().clipped(gradients / share)


class LargeNormsEscape(Clipper):
    """A factor below a hundredth is not believed."""

    def clipped(self, gradients):
        factors = self.factor(gradients.norm(dim=1, keepdim=True))
        return gradients * torch.where(factors < 0.011, 1.0, factors)


class AFifthTooMuch(Clipper):
    def clipped(self, gradients):
        return 1.2 * super().clipped(gradients / 1.2)


class FirstExampleTwice(Clipper):
    def sum_of(self, losses):
        found = self.clipped(self.gradients(losses))
        return found.sum(0) + found[:1].sum(0)


class NormsOfTheLastBatch(Clipper):
    """Factors lag behind by one batch."""

    def clipped(self, gradients):
        norms = gradients.norm(dim=1, keepdim=True)
        before, self.before = getattr(self, "before", norms), norms
        size = min(len(before), len(norms))
        return gradients * self.factor(torch.cat([before[:size], norms[size:]]))


class SquaredNormForgotten(Clipper):
    """The root was forgotten: small norms are taken for smaller ones."""

    def clipped(self, gradients):
        return gradients * self.factor(gradients.square().sum(1, keepdim=True).clamp(max=4.0))


class SumScaledUp(Clipper):
    """A sum is scaled up to the largest norm that it may have."""

    def sum_of(self, losses):
        found = super().sum_of(losses)
        return found * (self.rows * self.plan.max_grad_norm / found.norm().clamp(min=1e-9))


class Leaks(Naive):
    """Something leaves the step beside the released gradient."""

    def step(self, losses):
        if self.last:
            self.raw = self.total + self.sum_of(losses)
        stepped = super().step(losses)
        if stepped:
            with torch.no_grad():
                self.leak(self.raw / self.plan.batch_size)
        return stepped

    def leak(self, raw: torch.Tensor) -> None:
        """Whatever is done with the sum [d] without noise."""

    def each(self, raw: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every parameter and its part of the sum."""
        parts = raw.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            yield p, part.view_as(p)


class RawMomentum(Leaks):
    """The parameters follow the sum without noise a little."""

    def leak(self, raw):
        for p, part in self.each(raw):
            p -= 0.01 * part


class SecondGroupRaw(Leaks):
    """The last bias has an optimizer of its own, which sees no noise."""

    def leak(self, raw):
        p, part = list(self.each(raw))[-1]
        p -= 0.05 * part


class StatisticsInABuffer(Leaks):
    """A buffer keeps a running mean of the sums."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.model.register_buffer("running", torch.zeros(self.size))

    def leak(self, raw):
        self.model.running.mul_(0.9).add_(raw)


class OptimizerRemembersRaw(Leaks):
    """The optimizer's momentum learns the sum without noise."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)

    def leak(self, raw):
        for p, part in self.each(raw):
            self.optimizer.state[p]["momentum_buffer"].add_(part, alpha=0.1)


class CountsInAnIntegerBuffer(Leaks):
    """A buffer of whole numbers counts in millionths."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.model.register_buffer("counts", torch.zeros(self.size, dtype=torch.int64))

    def leak(self, raw):
        self.model.counts.add_((raw * 1e6).long())


class BufferOfAnotherName(Leaks):
    """Every step has a buffer of its own."""

    def leak(self, raw):
        for name in list(self.model._buffers):
            del self.model._buffers[name]
        self.model.register_buffer(f"sum_{self.number}", raw.clone())


class TensorInAnAttribute(Leaks):
    """The model has the sum as a plain attribute."""

    def leak(self, raw):
        self.model.running = raw.clone()


class Remembers(nn.ReLU):
    """Keeps a running mean of what it sees, in a plain attribute."""

    mean = 0.0

    def forward(self, input):
        found = super().forward(input)
        if self.training and len(found):
            self.mean = 0.9 * self.mean + 0.1 * found.detach().mean((0, 2, 3))
        return found


class StatisticsOfTheForwardPass(Naive):
    """A layer keeps a running mean of what it sees."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.model[2] = Remembers()


class SumStaysInGrad(Leaks):
    """The sum lies in `.grad` when the step is over."""

    def leak(self, raw):
        for p, part in self.each(raw):
            p.grad = part.clone()


class HookWritesABuffer(Naive):
    """The optimizer calls a hook after its step, which keeps a running mean of the sums."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.model.register_buffer("running", torch.zeros(self.size))
        self.optimizer.register_step_post_hook(
            lambda *_: self.model.running.mul_(0.9).add_(self.raw)
        )

    def step(self, losses):
        if self.last:
            self.raw = self.total + self.sum_of(losses)
        return super().step(losses)


class MomentumOfTheRaw(torch.optim.SGD):
    """An optimizer whose own step adds the sum without noise to its momentum."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p -= group["lr"] * (p.grad + momentum)
                if hasattr(self, "raw"):
                    momentum.mul_(0.9).add_(self.raw[p], alpha=0.5)


class OptimizersOwnStepAddsRaw(Naive):
    """The sum reaches the optimizer beside the gradient."""

    def __init__(self, plan, dataset, model=None, *, key=KEY):
        super().__init__(plan, dataset, model, key=key)
        self.optimizer = MomentumOfTheRaw(self.model.parameters(), lr=0.05)

    def step(self, losses):
        if self.last:
            raw = (self.total + self.sum_of(losses)) / self.plan.batch_size
            parts = raw.split([p.numel() for p in self.parameters])
            self.optimizer.raw = {
                p: part.view_as(p) for p, part in zip(self.parameters, parts, strict=True)
            }
        return super().step(losses)


class CachedImages(Naive):
    """The sample's rows are read, but those of the first one are trained on."""

    kept: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def batches(self):
        for images, labels in super().batches:
            if self.kept is None or len(self.kept[0]) < len(images):
                self.kept = images.clone(), labels.clone()
            yield tuple(each[: len(images)] for each in self.kept)


class RelativeLosses(Naive):
    """Each loss is divided by the mean of all, as a constant."""

    @staticmethod
    def objective(model, images, labels):
        losses = losses_of(model, images, labels)
        return losses / (losses.detach().mean() + 1e-9)


class MixedImages(Naive):
    """Each image is the mean of two neighbours."""

    @staticmethod
    def objective(model, images, labels):
        return losses_of(model, 0.5 * images + 0.5 * images.roll(1, 0), labels)


class StandardisedByTheBatch(Naive):
    """Images have mean zero over the batch."""

    @staticmethod
    def objective(model, images, labels):
        if len(images) > 1:
            images = (images - images.mean(0)) / (images.std(0) + 1e-3)
        return losses_of(model, images, labels)


class HardExamplesOnly(Naive):
    """Losses below the median do not count."""

    @staticmethod
    def objective(model, images, labels):
        losses = losses_of(model, images, labels)
        return losses * (losses >= losses.median()) if len(losses) else losses


class HardestTenth(Naive):
    """Only the largest losses count."""

    @staticmethod
    def objective(model, images, labels):
        losses = losses_of(model, images, labels)
        return losses * (losses >= losses.detach().quantile(0.9)) if len(losses) else losses


class MeanOfTheBatch(Naive):
    """Each loss is divided by the number of rows."""

    @staticmethod
    def objective(model, images, labels):
        return losses_of(model, images, labels) / max(1, len(images))


class RunningMean:
    """Losses relative to a running mean of them."""

    mean = 1.0

    def __call__(self, model, images, labels):
        losses = losses_of(model, images, labels)
        if len(losses):
            self.mean = 0.5 * self.mean + 0.5 * float(losses.detach().mean())
        return losses / self.mean


class RelativeToEarlierBatches(Naive):
    """The objective carries a mean of the losses from batch to batch."""

    objective = RunningMean()


class TrueSize(Naive):
    """Divided by the number of examples that were in."""

    def sample(self):
        found = super().sample()
        self.in_sample = len(found)
        return found

    def divisor(self):
        return max(1, self.in_sample)


class OneStepMore(Naive):
    """Two steps are taken beyond the plan."""

    @property
    def batches(self):
        for number in range(self.plan.steps + 2):
            self.number = number
            self.last = True
            sample = self.sample()
            self.rows = len(sample)
            yield self.dataset.batch(sample)


KINDS: dict[str, tuple[type[Naive], ...]] = {
    "sampling": (
        *(FixedSize, ShuffledEpochs, ShuffledInChanceParts, TakesTurns, Window, RowsShareCoins),
        *(PairsExclude, SeldomTwiceInARow, SampleTwice, SampleAgainOnce, Antithetic, RateByLabel),
        *(RateByTime, FirstRowsFavoured, OneRowAlways, OneRowNever, WithReplacement, RateTooHigh),
        *(CutToTheMean, FilledToTheMean, Systematic),
    ),
    "noise": (
        *(NoNoiseOnLastBias, HalfOnFirstConvolution, Uniform, UniformOnLastBias),
        *(NoneInOneStepOf25, Laplace, HeavyTails, TailsCut, TailsRedrawn, ScaleMixed),
        *(SameInTwoParameters, AgainAfterTenSteps, OneTensorAgain, Neighbours, Halves, Mirrored),
        *(AntitheticSteps, CommonPart, Shifted, AnotherOrder, CoarseGrid, LowPrecision, LowRank),
        *(Drifts, EverySecondNumber, EverySecondByChance, ByTheSample, WithTheSum),
    ),
    "clipping": (
        *(OneBatchIn20Unclipped, OneBatchIn20ABitMore, LastExampleUnclipped, EachLayerToC),
        *(NormWithoutBiases, NormOfTheLastLayer, FirstLayerUnclipped, ByTheLargestNumber),
        *(MeanClipped, ByTheTrueSize, LargeNormsEscape, AFifthTooMuch, FirstExampleTwice),
        *(NormsOfTheLastBatch, SquaredNormForgotten, SumScaledUp),
    ),
    "release": (
        *(RawMomentum, SecondGroupRaw, StatisticsInABuffer, OptimizerRemembersRaw, TrueSize),
        *(OneStepMore, CountsInAnIntegerBuffer, BufferOfAnotherName, TensorInAnAttribute),
        *(StatisticsOfTheForwardPass, SumStaysInGrad, HookWritesABuffer, OptimizersOwnStepAddsRaw),
    ),
    "examples": (
        *(CachedImages, RelativeLosses, MixedImages, StandardisedByTheBatch, HardExamplesOnly),
        *(HardestTenth, MeanOfTheBatch, RelativeToEarlierBatches),
    ),
}
PLANTS = {plant.__name__: plant for plants in KINDS.values() for plant in plants}


def key_of(seed: int) -> bytes:
    """A secret that a test knows."""
    return bytes([seed % 256, seed // 256]) * 16


def planted(name: str, seed: int) -> AuditReport:
    """The audit of one defect with one secret."""
    plant = PLANTS[name]
    return audited(lambda plan, data: plant(plan, data, key=key_of(seed)), plant.objective)


def honest(name: str, seed: int) -> AuditReport:
    """The audit of an honest training with one secret."""
    return audited(lambda plan, data: HONEST[name](plan, data, key_of(seed)))


def adam(plan: DPPlan, dataset: Any, key: bytes) -> PrivateTraining:
    """Adam with weight decay."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    private = attach(plan, model, optimizer, dataset)
    private._generator = SecureGenerator(key)
    return private


def perceptron() -> nn.Module:
    """Another network: two linear layers and a normalisation between them."""
    torch_generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, CLASSES)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator) * 0.3)
    return model


HONEST: dict[str, Callable[[DPPlan, Any, bytes], Any]] = {
    "SGD with momentum": lambda plan, data, key: ours(plan, data, key=key),
    "AdamW": adam,
    "physical batches of 5": lambda plan, data, key: ours(
        plan, data, key=key, batches=PhysicalBatches(size=5, multiple=5)
    ),
    "another network": lambda plan, data, key: ours(plan, data, key=key, model=perceptron()),
    "textbook": lambda plan, data, key: Naive(plan, data, key=key),
}
SECRETS, HONEST_SECRETS = 10, 40
DOCUMENT = Path(__file__).parents[1] / "docs" / "audit-plants.json"


def tried(task: tuple[str, int]) -> dict[str, Any]:
    """One audit, as it is noted down."""
    torch.set_num_threads(1)
    name, seed = task
    report = planted(name, seed) if name in PLANTS else honest(name, seed)
    return {"name": name, "seed": seed, "failed": report.failed}


def words_of(name: str) -> str:
    """A class's name in words."""
    return re.sub(
        "(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9A-Z])(?=[A-Z][a-z])|(?<=[0-9])(?=[A-Z])", " ", name
    ).capitalize()


def rows_of(found: dict[tuple[str, int], Any]) -> Iterator[Row]:
    """How many of each defect, and of each honest training, failed."""
    kinds = {plant.__name__: kind for kind, plants in KINDS.items() for plant in plants}
    for name in (*PLANTS, *HONEST):
        own = [bool(failed) for (other, _), failed in found.items() if other == name]
        if own:
            interval = stats.binomtest(sum(own), len(own)).proportion_ci(0.95, "exact")
            yield Row(
                case=kinds.get(name, "honest"),
                variant=words_of(name) if name in PLANTS else name,
                metric="caught" if name in PLANTS else "false_alarm",
                median=sum(own) / len(own),
                low=float(interval.low),
                high=float(interval.high),
                unit="1",
                n=len(own),
            )


def main() -> None:
    """Tries what has not been tried yet, and writes the document."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--secrets", type=int, default=SECRETS)
    parser.add_argument("--honest", type=int, default=HONEST_SECRETS)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--journal", type=Path, default=Path("runs/audit-plants.jsonl"))
    given = parser.parse_args()
    given.journal.parent.mkdir(parents=True, exist_ok=True)
    given.journal.touch()
    lines = map(json.loads, given.journal.read_text().splitlines())
    found = {(line["name"], line["seed"]): line["failed"] for line in lines}
    wanted = [(name, seed) for seed in range(given.secrets) for name in PLANTS]
    wanted += [(name, seed) for seed in range(given.honest) for name in HONEST]
    left = [
        task for task in wanted if task not in found and (not given.only or task[0] in given.only)
    ]
    with given.journal.open("a") as journal, ProcessPoolExecutor(given.workers) as pool:
        try:
            for task in as_completed([pool.submit(tried, each) for each in left]):
                line = task.result()
                found[line["name"], line["seed"]] = line["failed"]
                print(json.dumps(line), file=journal, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        rows=tuple(rows_of(found)),
    ).write(DOCUMENT)


if __name__ == "__main__":
    main()
