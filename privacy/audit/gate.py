"""`audit`: runs a real private training with canaries in it and holds it against its plan."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from privacy.audit.bounds import gdp_epsilon
from privacy.audit.canaries import Canaries, CanaryDataset, PlainGradients
from privacy.audit.checks import (
    Check,
    check_clipped_sum,
    check_contribution,
    check_epsilon,
    check_freshness,
    check_noise,
    check_nothing_else,
    check_sampling,
    check_sum,
)
from privacy.audit.observer import Objective, Observation, Observer
from privacy.audit.report import AuditReport, Bound
from privacy.audit.scores import CanaryScoreAuditor
from privacy.clipping.factors import FlatClipping
from privacy.errors import PlanError, StepError
from privacy.plan import DPPlan
from privacy.sampling import MapStyle

__all__ = ["AuditSettings", "PrivateTraining", "audit"]

_DEFAULT_DELTA = 1e-5
_CHECKS = 9
_QUIET = 1e-4
"""Noise multiplier of the few steps in which the sum itself is looked at."""
_QUIET_STEPS = 6
_SMALLEST_BATCH = 16
"""Of at least twice as many fair coins practically never none is heads: an empty sample would look
like one with the first example in it."""
_KEPT = 2**16
"""Coordinates of each step's residual that are kept to compare the noise of steps."""


class PrivateTraining(Protocol):
    """What can be audited: ours, or anybody's that has these four."""

    @property
    def model(self) -> nn.Module:
        """The model under training."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Steps on the released gradients: their noised sum divided by the plan's batch size."""

    @property
    def batches(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Physical batches of Poisson samples, examples first and filling after them."""

    def step(self, losses: torch.Tensor, /) -> bool:
        """Takes the losses of the last batch; True once the optimizer has stepped."""


MakeTraining = Callable[[DPPlan, MapStyle], tuple[PrivateTraining, Objective]]
"""Puts together the training of a plan on a data set, and what it minimises: one loss a row."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How much is looked at, and how sure the result is.

    Attributes:
        canaries: Canaries in the data, at least 2.
        steps: Steps to watch, at least 2.
        largest_batch: The audited sample is no larger than this, for speed: a step's privacy does
            not depend on it.
        confidence: Of each bound that is reported, in (0, 1).
        false_alarm: Chance that the gate fails an honest training, shared by all its checks.
        seed: Chooses the rows and the directions of the canaries; no secret.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> AuditSettings(steps=20).canaries
        32
    """

    canaries: int = 32
    steps: int = 100
    largest_batch: int = 64
    confidence: float = 0.95
    false_alarm: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.canaries < 2 or self.steps < 2 or self.largest_batch < 2:
            raise PlanError(
                "audit: expected canaries, steps and largest_batch of at least 2, got "
                f"{self.canaries}, {self.steps} and {self.largest_batch}"
            )
        if not (0 < self.confidence < 1 and 0 < self.false_alarm < 1):
            raise PlanError(
                "audit: expected confidence and false_alarm in (0, 1), got "
                f"{self.confidence} and {self.false_alarm}"
            )


def audit(
    make_training: MakeTraining,
    plan: DPPlan,
    dataset: MapStyle,
    *,
    delta: float | None = None,
    settings: AuditSettings | None = None,
) -> AuditReport:
    """Audits one real training: lower bounds on epsilon, and a gate of tests with a known error.

    Some examples of `dataset` and some canaries make up the audited data; half of them is expected
    in each sample, and the noise, the clipping norm and all code are those of the training. The
    auditor knows the parameters, every other example and the coins (Nasr et al. 2023, arXiv
    2302.07956), so that even one step gives many nearly tight observations.

    Guarantee: a training that does what its plan says fails with probability at most
    `settings.false_alarm`; a bound exceeds the true epsilon with probability at most 1 -
    confidence. A training that passes may still be wrong where no canary looks.

    Args:
        make_training: Called twice, with the audited plan and data, and with hardly any noise in
            the plan for six steps before it. The model must be new each time, and never be used.
        plan: With its noise. Sampling rate and steps are replaced by the audit's own.
        dataset: Map-style data set of (image, label).
        delta: Of the claim; the plan's own, or 1e-5, by default.
        settings: How much is looked at.

    Returns:
        The report; `passed` is the gate.

    Raises:
        PlanError: The plan has no noise or no flat clipping, or the data set is too small.
        StepError: The training does not go through the model and the optimizer that it names.

    Example:
        >>> from privacy import attach
        >>> def make_training(plan, dataset):
        ...     model = nn.Linear(8, 4)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     def objective(model, images, labels):
        ...         return nn.functional.cross_entropy(model(images), labels, reduction="none")
        ...     return attach(plan, model, optimizer, dataset), objective
        >>> data = [(torch.rand(8), i % 4) for i in range(80)]
        >>> plan = DPPlan(samples=80, batch_size=8, epochs=1, noise_multiplier=1.0)
        >>> report = audit(make_training, plan, data, settings=AuditSettings(canaries=4, steps=20))
        >>> report.passed, round(report.claimed_epsilon, 2)
        (True, 4.38)
    """
    settings = settings or AuditSettings()
    plan.event()
    if not isinstance(plan.clipping, FlatClipping):
        raise PlanError(
            f"clipping: expected FlatClipping, got {type(plan.clipping).__name__}: the audit knows "
            "no other rule yet; audit the same training with flat clipping"
        )
    data, audited = _audited(plan, dataset, settings)
    quiet_plan = replace(audited, noise_multiplier=_QUIET, epochs=_QUIET_STEPS / 2)
    quiet = _watched(make_training, quiet_plan, data, settings)
    found = _watched(make_training, audited, data, settings)
    clipped_sum = check_clipped_sum(
        [o.residual for o in quiet], [o.total for o in quiet], noise_multiplier=_QUIET
    )
    if delta is None:
        delta = plan.delta or _DEFAULT_DELTA
    return _report(found, clipped_sum, audited, delta, settings)


def _audited(
    plan: DPPlan, dataset: MapStyle, settings: AuditSettings
) -> tuple[CanaryDataset, DPPlan]:
    """The audited data, and the plan on it: a fair coin for each row, the plan's noise and C."""
    canaries = settings.canaries
    batch_size = min(plan.batch_size, settings.largest_batch, len(dataset) // 2)
    batch_size = max(batch_size, canaries, _SMALLEST_BATCH)
    if 2 * batch_size > len(dataset):
        raise PlanError(
            f"dataset: expected at least {2 * batch_size} examples for {canaries} canaries, got "
            f"{len(dataset)}; ask for fewer canaries"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randperm(len(dataset), generator=generator)[: 2 * batch_size]
    audited = replace(
        plan,
        samples=2 * batch_size,
        batch_size=batch_size,
        epochs=settings.steps / 2,
        delta=None,
        target_epsilon=None,
    )
    return CanaryDataset(dataset, rows, canaries=canaries), audited


def _watched(
    make_training: MakeTraining, plan: DPPlan, data: CanaryDataset, settings: AuditSettings
) -> list[Observation]:
    """Trains, and gives back what was seen of each step."""
    training, objective = make_training(plan, data)
    gradients = PlainGradients(training.model)
    observer = Observer(
        training.model,
        training.optimizer,
        _canaries(training.model, data, settings),
        gradients,
        max_grad_norm=plan.max_grad_norm,
        batch_size=plan.batch_size,
    )
    data.taken()
    found = []
    try:
        for images, labels in training.batches:
            losses = observer.losses(objective, images, labels, data.taken())
            if training.step(losses):
                found.append(observer.observation())
    finally:
        observer.close()
    return found


def _canaries(model: nn.Module, data: CanaryDataset, settings: AuditSettings) -> Canaries:
    """The canaries on the model's device."""
    device = next(model.parameters()).device
    images = data.canary_images().to(device)
    with torch.no_grad():
        outputs = model(images)
    generator = torch.Generator().manual_seed(settings.seed)
    return Canaries(images, outputs=outputs[0].numel(), generator=generator)


def _report(
    found: list[Observation],
    clipped_sum: Check,
    plan: DPPlan,
    delta: float,
    settings: AuditSettings,
) -> AuditReport:
    """Scores of all steps and canaries together, their bounds, and the checks."""
    if len(found) < 2:
        raise StepError(f"audit: expected at least 2 steps, saw {len(found)}")
    scores = torch.stack([o.scores for o in found]).double().cpu()
    were_in = torch.stack([o.was_in for o in found])
    auditor = CanaryScoreAuditor(scores[were_in].numpy(), scores[~were_in].numpy())
    assert plan.noise_multiplier is not None, "the plan has its noise"
    claimed = gdp_epsilon(1 / plan.noise_multiplier, delta)
    confidence = settings.confidence
    return AuditReport(
        claimed_epsilon=claimed,
        delta=delta,
        bounds=tuple(
            Bound(method=method, epsilon=epsilon, confidence=confidence)
            for method, epsilon in _bounds(auditor, delta, confidence).items()
        ),
        checks=(
            *_checks(found, auditor, were_in, plan, delta, settings.false_alarm / _CHECKS),
            clipped_sum,
        ),
        false_alarm=settings.false_alarm,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        batch_size=plan.batch_size,
        samples=plan.samples,
        steps=len(found),
        canaries=settings.canaries,
        attack_auroc=auditor.attack_auroc,
        in_scores=tuple(scores[were_in].tolist()),
        out_scores=tuple(scores[~were_in].tolist()),
    )


def _bounds(auditor: CanaryScoreAuditor, delta: float, confidence: float) -> dict[str, float]:
    """Every bound at one confidence, by the method's name."""
    return {
        "gdp": auditor.epsilon_from_gdp(delta, confidence),
        "clopper-pearson": auditor.epsilon_clopper_pearson(delta, confidence),
        "one run": auditor.epsilon_one_run(delta, confidence),
    }


def _checks(
    found: list[Observation],
    auditor: CanaryScoreAuditor,
    were_in: torch.Tensor,
    plan: DPPlan,
    delta: float,
    error: float,
) -> tuple[Check, ...]:
    """All checks, each failing an honest training with probability at most `error`."""
    assert plan.noise_multiplier is not None, "the plan has its noise"
    sigma = plan.noise_multiplier
    claimed = gdp_epsilon(1 / sigma, delta)
    residuals = torch.stack([_thinned(o.residual) for o in found]).cpu()
    bounds = _bounds(auditor, delta, 1 - error)
    return (
        *(check_epsilon(method, bound, claimed=claimed) for method, bound in bounds.items()),
        check_contribution(auditor, error=error),
        check_sum(
            torch.stack([o.sums for o in found]).cpu(),
            torch.stack([o.excess for o in found]).cpu(),
            noise_multiplier=sigma,
            error=error,
        ),
        check_noise(residuals, noise_multiplier=sigma, error=error),
        check_nothing_else(residuals, noise_multiplier=sigma, error=error),
        check_freshness(residuals, error=error),
        check_sampling(were_in.flatten().tolist(), sampling_rate=plan.sampling_rate, error=error),
    )


def _thinned(residual: torch.Tensor) -> torch.Tensor:
    """Evenly spaced coordinates, few enough to keep those of all steps."""
    return residual[:: -(-len(residual) // _KEPT)]
