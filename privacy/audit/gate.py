"""`audit`: runs a real private training with canaries in it and holds it against its plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from privacy.audit.contributions import (
    CanaryScoreAuditor,
    check_clipped_sum,
    check_contribution,
    check_epsilon,
    check_images,
    check_largest,
    check_objective,
    check_release,
    check_sum,
)
from privacy.audit.noise import Noise, check_deviation, check_freshness, check_noise_battery
from privacy.audit.release import changing
from privacy.audit.report import AuditReport, AuditSettings, Bound, Check
from privacy.audit.sampling import Samples, check_sampling_battery
from privacy.audit.watch import MakeTraining, Watched, half, watch, watch_quietly, watch_samples
from privacy.clipping.factors import FlatClipping
from privacy.errors import PlanError, StepError
from privacy.persons import Persons, persons_of
from privacy.plan import DPPlan
from privacy.sampling import MapStyle
from privacy.statistics import gdp_epsilon
from privacy.validate import check_dataset, probability

__all__ = ["audit"]

_DEFAULT_DELTA = 1e-5
_CHECKS = 22
"""Checks that chance can fail: they share the gate's false alarms equally."""


def audit(
    make_training: MakeTraining,
    plan: DPPlan,
    dataset: MapStyle,
    *,
    delta: float | None = None,
    settings: AuditSettings | None = None,
    groups: object = None,
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
        make_training: Called three times, with other plans and data. The model must be new each
            time, and never be used.
        plan: With its noise. Sampling rate and steps are replaced by the audit's own.
        dataset: Map-style data set of (image, label).
        delta: Of the claim; the plan's own, or 1e-5, by default.
        settings: How much is looked at.
        groups: Whose each example is, where the plan's unit is a person; by default the data set's
            own attribute `groups`. Canaries are persons then, with all images of theirs, and the
            data set that `make_training` is given has such an attribute for `attach`.

    Returns:
        The report; `passed` is the gate.

    Raises:
        PlanError: The plan has no noise or no flat clipping, the data set is too small, or an
            argument is of another type.
        StepError: The training does not go through the model and the optimizer that it names.

    Example:
        >>> import torch
        >>> from torch import nn
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
    settings = AuditSettings() if settings is None else settings
    _check(make_training, plan, dataset, settings)
    delta = (plan.delta or _DEFAULT_DELTA) if delta is None else probability("delta", delta)
    if not isinstance(plan.clipping, FlatClipping):
        raise PlanError(
            f"clipping: expected FlatClipping, got {type(plan.clipping).__name__}: the audit knows "
            "no other rule yet; audit the same training with flat clipping"
        )
    persons = _persons(plan, dataset, groups)
    data, audited = half(plan, dataset, persons, settings)
    quiet = watch_quietly(make_training, audited, data, settings)
    found = watch(make_training, audited, data, settings)
    if len(found.steps) < 2:
        raise StepError(f"audit: expected at least 2 steps, saw {len(found.steps)}")
    own, apart = watch_samples(make_training, plan, dataset, persons, settings)
    seen = _Seen(found, quiet, own, apart)
    population = len(dataset if persons is None else persons)
    return _report(seen, audited, delta, settings, population=population)


def _persons(plan: DPPlan, dataset: MapStyle, groups: object) -> Persons | None:
    """Whose the examples are, where the plan protects persons."""
    if plan.unit == "example":
        return None
    persons = persons_of(dataset, groups, examples=len(dataset))
    if persons.largest == 1 or plan.images_per_person == 1:
        raise PlanError(
            "groups: expected persons of whom several images are in a step, got one image of each: "
            "nothing would be seen of how they are averaged; audit a plan whose unit is an example"
        )
    return persons


def _check(make_training: object, plan: object, dataset: object, settings: object) -> None:
    if not callable(make_training):
        raise PlanError(
            "make_training: expected a function (plan, dataset) -> (training, objective), got "
            f"{type(make_training).__name__}"
        )
    if not isinstance(plan, DPPlan):
        raise PlanError(f"plan: expected a privacy.DPPlan, got {type(plan).__name__}")
    if not isinstance(settings, AuditSettings):
        raise PlanError(f"settings: expected AuditSettings(...), got {type(settings).__name__}")
    plan.event()
    check_dataset(dataset)


@dataclass(frozen=True)
class _Seen:
    """The trainings with the plan's noise, with hardly any, and for its samples.

    `apart` says whether the objective keeps examples apart; None where it could not be asked.
    """

    loud: Watched
    quiet: Watched
    own: Samples
    apart: bool | None

    @property
    def scores(self) -> Tensor:
        """Of every canary in every step, [steps, k]."""
        return torch.stack([step.scores for step in self.loud.steps]).double().cpu()

    @property
    def were_in(self) -> Tensor:
        """Which canaries were in which sample, [steps, k]."""
        return torch.stack([step.was_in for step in self.loud.steps])

    @property
    def samples(self) -> dict[str, Samples]:
        """By their rate."""
        # Never put together: trainings whose secret a test has fixed draw the same coins.
        rate = self.loud.samples.rate
        return {
            f"rate {rate:.3g}": self.loud.samples,
            f"rate {rate:.3g} without noise": self.quiet.samples,
            f"rate {self.own.rate:.3g}": self.own,
        }


def _report(
    seen: _Seen, plan: DPPlan, delta: float, settings: AuditSettings, *, population: int
) -> AuditReport:
    scores, were_in = seen.scores, seen.were_in
    auditor = CanaryScoreAuditor(scores[were_in].numpy(), scores[~were_in].numpy())
    assert plan.noise_multiplier is not None, "the plan has its noise"
    confidence = settings.confidence
    return AuditReport(
        claimed_epsilon=gdp_epsilon(1 / plan.noise_multiplier, delta),
        delta=delta,
        bounds=tuple(
            Bound(method=method, epsilon=epsilon, confidence=confidence)
            for method, epsilon in _bounds(auditor, delta, confidence).items()
        ),
        checks=_checks(seen, auditor, plan, delta, settings),
        unseen=_unseen(seen, plan, settings, population=population),
        false_alarm=settings.false_alarm,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        batch_size=plan.batch_size,
        samples=plan.samples,
        steps=len(seen.loud.steps),
        quiet_steps=len(seen.quiet.mismatches),
        unit=plan.unit,
        sampling_rates=(seen.loud.samples.rate, seen.own.rate),
        canaries=settings.canaries,
        attack_auroc=auditor.attack_auroc,
        in_scores=tuple(scores[were_in].tolist()),
        out_scores=tuple(scores[~were_in].tolist()),
    )


def _bounds(auditor: CanaryScoreAuditor, delta: float, confidence: float) -> dict[str, float]:
    return {
        "gdp": auditor.epsilon_from_gdp(delta, confidence),
        "clopper-pearson": auditor.epsilon_clopper_pearson(delta, confidence),
        "one run": auditor.epsilon_one_run(delta, confidence),
    }


def _checks(
    seen: _Seen, auditor: CanaryScoreAuditor, plan: DPPlan, delta: float, settings: AuditSettings
) -> tuple[Check, ...]:
    """All checks; those that chance can fail share the gate's false alarms."""
    assert plan.noise_multiplier is not None, "the plan has its noise"
    sigma, error = plan.noise_multiplier, settings.false_alarm / _CHECKS
    steps = seen.loud.steps
    residuals = torch.stack([step.residual for step in steps])
    noise = Noise(residuals.double().numpy() / sigma, seen.loud.tensors, seen.loud.rows)
    bounds, claimed = _bounds(auditor, delta, 1 - error), gdp_epsilon(1 / sigma, delta)
    taken = max(len(seen.loud.samples.table), len(seen.own.table))
    return (
        *(check_epsilon(method, bound, claimed=claimed) for method, bound in bounds.items()),
        check_contribution(auditor, error=error),
        check_largest(
            torch.cat([step.beyond for step in steps]).cpu(), noise_multiplier=sigma, error=error
        ),
        check_sum(
            torch.stack([step.sums for step in steps]).cpu(),
            torch.stack([step.excess for step in steps]).cpu(),
            noise_multiplier=sigma,
            error=error,
        ),
        check_clipped_sum(seen.quiet.mismatches),
        check_release(max(seen.quiet.unexplained, seen.loud.unexplained)),
        check_images(seen.quiet.foreign + seen.loud.foreign),
        *(() if seen.apart is None else (check_objective(seen.apart),)),
        *check_deviation(residuals, noise_multiplier=sigma, error=error),
        *check_noise_battery(noise, error=error),
        check_freshness(residuals, error=error),
        *check_sampling_battery(seen.samples, error=error, seed=settings.seed),
        Check(
            name="steps",
            passed=len(steps) == taken <= plan.steps,
            measured=float(taken if len(steps) == taken else len(steps)),
            limit=float(plan.steps),
            says="steps with finite gradients, all that were taken and no more than were planned",
        ),
    )


def _unseen(
    seen: _Seen, plan: DPPlan, settings: AuditSettings, *, population: int
) -> tuple[str, ...]:
    """What an audit of this size cannot see, a sentence each."""
    steps, rows = settings.steps, max(plan.samples, seen.own.table.shape[1])
    kept, parameters = seen.loud.steps[0].residual.numel(), sum(seen.loud.sizes)
    some = [
        f"What happens less often than about once in {steps} steps, or only after them.",
        f"What only some {plan.unit}s do: {rows} of {population} were in the audited trainings; in "
        "samples of other sizes, and at sampling rates other than 1/2 and "
        f"{seen.own.rate:.3g}.",
        "Where noise and coins come from: numbers that somebody can predict look like chance.",
        f"Tails of the noise beyond what {steps * kept:,} numbers reach, and deviations from the "
        "plan's within a percent.",
        "Dependence that shows in no two parameters, rows or steps, but only in three or more "
        "together.",
        "Small favours: a row whose chance differs from others' by less than about "
        f"{4 / (2 * steps) ** 0.5:.2g} at a rate of 1/2.",
        "Examples whose gradient is not finite: there is none in the audit.",
        "What leaves the training elsewhere: what it prints, writes to files or sends, running "
        "times, settings chosen by looking at the data; what it keeps in lists, dictionaries, "
        "numbers and arrays of the model, in attributes of the optimizer, and in tensors that each "
        "forward pass makes anew; and changes of a parameter as small as its rounding.",
        "Losses that use other examples' values only later than at the first parameters, or only "
        "in larger batches.",
        "A training that knows that it is audited, and behaves.",
        "Accounting: the epsilon of many steps is computed, never measured.",
    ]
    if kept < parameters:
        some.append(f"The noise of {parameters - kept:,} of {parameters:,} parameters.")
    some += _unseen_here(seen)
    if not seen.loud.replayed:
        some.append("What the optimizer does with the gradient: its step could not be repeated.")
    return tuple(some)


def _unseen_here(seen: _Seen) -> list[str]:
    """What cannot be seen of a training that behaves as this one did."""
    some = []
    changed, differently = (
        sorted(names) for names in changing(seen.loud.settings, seen.quiet.settings)
    )
    if changed:
        some.append(
            f"What chose the optimizer's {', '.join(changed)}, which changed from step to step."
        )
    if differently:
        some.append(
            f"Why the optimizer's {', '.join(differently)} changed otherwise in two trainings of "
            "one plan: no schedule does that, the released gradients or the examples do."
        )
    if seen.loud.changed > 0:
        some.append(
            "Whether all images are of the rows that were read for them: some in the batches are "
            "not as the data set gave them."
        )
    if seen.apart is None:
        some.append(
            "Whether losses use other examples' values as constants: the objective could not be "
            "asked (it cannot be copied, does not run on few examples, or answers at random)."
        )
    return some
