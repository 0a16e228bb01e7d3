"""The audit as a gate: it opens for our step, and for no step with a defect planted in it."""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audit_plants import (
    CLASSES,
    CLIP,
    HONEST,
    KEY,
    KINDS,
    PLAN,
    PLANTS,
    SAMPLES,
    SETTINGS,
    SIGMA,
    Losses,
    Naive,
    audited,
    data_of,
    honest,
    losses_of,
    network,
    ours,
    planted,
)
from torch import nn

from privacy import (
    AutomaticClipping,
    DPPlan,
    PhysicalBatches,
    PlanError,
    PrivacyError,
    PrivateTraining,
    SecureGenerator,
    StepError,
    UnsupportedLayer,
)
from privacy.audit import AuditReport, AuditSettings, audit, gdp_epsilon
from privacy.audit.canaries import CanaryDataset
from privacy.summation import Reduce

# The harness, for whoever plants defects of their own.
__all__ = ["CLASSES", "CLIP", "KEY", "SAMPLES", "SETTINGS", "Losses", "Naive", "audited", "ours"]

# The module: the package has a function of the same name.
GATE = importlib.import_module("privacy.audit.gate")


@pytest.fixture(scope="module")
def report() -> AuditReport:
    """The report of our step."""
    return audited(ours)


def test_our_step_passes(report: AuditReport) -> None:
    """Every check, and the noise is measured to a percent."""
    assert report.passed, report.verdict
    assert report.verdict.startswith("passed")
    assert report.failed == ()
    checks = {check.name: check for check in report.checks}
    assert checks["noise"].measured == pytest.approx(SIGMA, rel=0.01)
    assert report.steps == 50
    assert len(report.in_scores) + len(report.out_scores) == 50 * 8


def test_the_claim_is_that_of_one_step_with_its_coin_opened(report: AuditReport) -> None:
    """1/sigma-GDP at the plan's delta; bounds lie below it and are not vacuous."""
    assert report.claimed_epsilon == gdp_epsilon(1 / SIGMA, 1e-3)
    bounds = {bound.method: bound for bound in report.bounds}
    assert set(bounds) == {"gdp", "clopper-pearson", "one run"}
    assert all(b.epsilon <= report.claimed_epsilon for b in report.bounds)
    assert all(b.confidence == 0.95 for b in report.bounds)
    assert bounds["gdp"].epsilon > 0.5 * report.claimed_epsilon
    assert bounds["one run"].epsilon >= 0


def test_the_report_is_plain_json(report: AuditReport) -> None:
    """With the verdict in it."""
    values = json.loads(json.dumps(report.to_dict()))
    assert values["passed"] is True
    assert len(values["unseen"]) >= 10
    assert [check["name"] for check in values["checks"]][:1] == ["epsilon (gdp)"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", [bytes([n]) * 32 for n in range(1, 7)])
def test_honest_steps_pass_whatever_the_secret(key: bytes) -> None:
    """Control: the gate does not fail by chance."""
    report = audited(lambda plan, data: ours(plan, data, key=key))
    assert report.passed, report.verdict


def test_physical_batches_and_attacked_images_pass() -> None:
    """A sample cut into many batches; images moved by an attack that draws random numbers."""

    def objective(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        start = (images + 0.2 * torch.rand_like(images)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(losses_of(model, start, labels).sum(), start)
        moved = (start + 0.2 * gradient.sign()).clamp(0, 1).detach()
        clean, adversarial = model(images), model(moved)
        robust = F.kl_div(clean.log_softmax(1), adversarial.softmax(1), reduction="none").sum(1)
        return F.cross_entropy(clean, labels, reduction="none") + 0.5 * robust

    cut = PhysicalBatches(size=5, multiple=5)
    report = audited(lambda plan, data: ours(plan, data, batches=cut), objective)
    assert report.passed, report.verdict


class NoiseOff(Naive):
    def noise(self) -> torch.Tensor:
        return torch.zeros(self.size)


class NoiseHalved(Naive):
    def noise(self) -> torch.Tensor:
        return super().noise() / 2


class NoiseABitLess(Naive):
    def noise(self) -> torch.Tensor:
        return 0.94 * super().noise()


class NoiseRepeated(Naive):
    def noise(self) -> torch.Tensor:
        self.generator, kept = SecureGenerator(bytes(32)), self.generator
        noise = super().noise()
        self.generator = kept
        return noise


class NoiseOfTwoSeeds(Naive):
    """Every other step draws the noise of the first again."""

    turn = 0

    def noise(self) -> torch.Tensor:
        self.turn = (self.turn + 1) % 25
        self.generator, kept = SecureGenerator(bytes([self.turn]) * 32), self.generator
        noise = super().noise()
        self.generator = kept
        return noise


class ClipOff(Naive):
    def clipped(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients


class CopiesClippedApart(Naive):
    """K augmented copies must be averaged before clipping; here each is clipped and added."""

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        return sum(super(CopiesClippedApart, self).sum_of(losses) for _ in range(4))


class AttackCounted(Naive):
    """The gradients of three attack steps count beside that of the training loss."""

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        gradients = self.gradients(losses)
        steps = [gradients + 0.1 * gradients.roll(k, 1) for k in range(1, 4)]
        return sum(self.clipped(g).sum(0) for g in (gradients, *steps))


class LossSummed(Naive):
    """The loss was a mean, and the clipped gradients are multiplied back by the batch size."""

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        return self.rows * super().sum_of(losses)


class LossAveraged(Naive):
    """The mean loss is clipped as if it were one example, and multiplied by the batch size."""

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        return self.rows * self.clipped(self.gradients(losses.mean().reshape(1))).sum(0)


class NoClipPerExample(Naive):
    """Ghost clipping with an adaptive threshold whose criterion was already reduced."""

    def sum_of(self, losses: torch.Tensor) -> torch.Tensor:
        coefficients = self.plan.max_grad_norm / self.gradients(losses).norm(dim=1)
        return coefficients.clamp(max=1).sum() * self.gradients(losses.mean().reshape(1)).sum(0)


class PhysicalBatchSize(Naive):
    """The noise is divided by the logical batch size, the sum by a physical one."""

    def noise(self) -> torch.Tensor:
        return super().noise() / 2

    def divisor(self) -> float:
        return self.plan.batch_size / 2


class ThresholdsDiffer(Naive):
    """A scheduler lowered the noise's threshold; clipping still uses the old one."""

    def noise(self) -> torch.Tensor:
        return 0.5 * super().noise()


class ClipThresholdTooLarge(Naive):
    """Clipping at 1.5 C, with the noise for 1.5 C: the sum moves further than the plan says."""

    def clipped(self, gradients: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().clipped(gradients / 1.5)

    def noise(self) -> torch.Tensor:
        return 1.5 * super().noise()


class SamplesTooOften(Naive):
    """Every example has twice its chance."""

    @property
    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.plan.steps):
            first, second = (
                self.generator.bernoulli(self.plan.samples, self.plan.sampling_rate)
                for _ in range(2)
            )
            self.last = True
            indices = (first | second).nonzero().squeeze(1)
            self.rows = len(indices)
            yield self.dataset.batch(indices)


class FirstExampleUnclipped(Naive):
    """One row of each batch escapes clipping, and seldom is it a canary."""

    def clipped(self, gradients: torch.Tensor) -> torch.Tensor:
        found = super().clipped(gradients)
        found[0] = 8 * found[0]
        return found


DEFECTS: dict[type[Naive], set[str]] = {
    NoiseOff: {"epsilon (gdp)", "noise"},
    NoiseHalved: {"epsilon (gdp)", "noise"},
    NoiseABitLess: {"noise"},
    NoiseRepeated: {"freshness"},
    NoiseOfTwoSeeds: {"freshness"},
    ClipOff: {"epsilon (gdp)", "contribution", "sum"},
    CopiesClippedApart: {"contribution", "nothing else"},
    AttackCounted: {"contribution", "nothing else"},
    LossSummed: {"contribution"},
    LossAveraged: {"nothing else"},
    NoClipPerExample: {"clipped sum"},
    PhysicalBatchSize: {"contribution", "sum"},
    ThresholdsDiffer: {"epsilon (gdp)", "noise"},
    ClipThresholdTooLarge: {"nothing else", "sum"},
    SamplesTooOften: {"sampling"},
    FirstExampleUnclipped: {"nothing else"},
}


def test_the_textbook_passes() -> None:
    """Control: without a defect the naive step passes the same gate as ours."""
    report = audited(Naive)
    assert report.passed, report.verdict


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_caught(defect: type[Naive]) -> None:
    """The gate fails, and by the check that names the defect."""
    report = audited(defect)
    assert not report.passed
    assert report.verdict.startswith("FAILED")
    assert DEFECTS[defect] <= set(report.failed)
    json.dumps(report.to_dict())


# Those that were reported, and of clipping and release what the checks beside the canaries see.
QUICK = {
    "FixedSize": "sample sizes",
    "ShuffledEpochs": "samples apart",
    "TakesTurns": "rows together",
    "WithReplacement": "rows once",
    "NoNoiseOnLastBias": "noise by tensor",
    "HalfOnFirstConvolution": "noise by tensor",
    "Uniform": "noise law",
    "NoneInOneStepOf25": "noise by step",
    "OneBatchIn20Unclipped": "clipped sum",
    "SecondGroupRaw": "release",
    "OneStepMore": "steps",
    "CountsInAnIntegerBuffer": "release",
    "TensorInAnAttribute": "release",
    "StatisticsOfTheForwardPass": "release",
    "OptimizersOwnStepAddsRaw": "release",
    "CachedImages": "images",
    "RelativeLosses": "objective",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_defect_beside_the_canaries_is_caught(name: str) -> None:
    """The gate fails, and by the check that names the defect; the secret is fixed, so is chance."""
    assert QUICK[name] in planted(name, 0).failed


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PLANTS.keys() - QUICK.keys()))
def test_every_other_defect_is_caught_too(name: str) -> None:
    """In all kinds; docs/audit-plants.json counts ten secrets of each."""
    assert not planted(name, 0).passed


def test_there_are_defects_of_every_kind() -> None:
    """The seven that were reported and at least twenty more, in all kinds."""
    assert set(KINDS) == {"sampling", "noise", "clipping", "release", "examples"}
    assert len(PLANTS) >= 27
    assert min(len(plants) for plants in KINDS.values()) >= 6


@pytest.mark.parametrize("name", sorted(HONEST.keys() - {"SGD with momentum", "textbook"}))
def test_other_honest_trainings_pass(name: str) -> None:
    """Control: other optimizers, batches and networks."""
    report = honest(name, 1)
    assert report.passed, report.verdict


def test_checks_that_chance_can_fail_share_the_false_alarms(report: AuditReport) -> None:
    """Each has its part of the gate's level; the others are facts."""
    facts = {"clipped sum", "release", "images", "objective", "rows once", "steps"}
    assert len({check.name for check in report.checks}) == len(report.checks)
    assert len({check.name for check in report.checks} - facts) == GATE._CHECKS


class Counted(list[Any]):
    """A data set with an attribute of a name that ours have as a method."""

    batch = 16


def test_an_empty_sample_is_one_like_others() -> None:
    """Independent coins leave everybody out once in a while; it has the images' shape all the same.

    The data set may have a `batch` of its own that is no method to read it by.
    """
    data = CanaryDataset(Counted(data_of(8)), torch.arange(6), canaries=2)
    images, labels = data.batch(torch.tensor([], dtype=torch.int64))
    assert (images.shape, labels.shape) == ((0, 1, 6, 6), (0,))
    assert data.canary_images().shape == (2, 1, 6, 6)


def test_what_diverges_fails_instead_of_raising() -> None:
    """A gradient that is not finite ends the audit with a report."""

    class Diverges(Naive):
        def noise(self) -> torch.Tensor:
            return super().noise() / (0.0 if self.number == 5 else 1.0)

    report = audited(Diverges)
    assert report.failed
    assert report.steps == 5


def test_an_optimizer_that_cannot_be_repeated_is_told() -> None:
    """Nothing is held against it, and the report says what was not looked at."""

    class Foreign(torch.optim.SGD):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    def make(plan: DPPlan, dataset: Any) -> Naive:
        training = Naive(plan, dataset)
        training.optimizer = Foreign(training.model.parameters(), lr=0.05)
        return training

    report = audited(make)
    assert report.passed, report.verdict
    assert "could not be repeated" in report.unseen[-1]


def test_what_comes_after_the_gradient_is_not_held_against_a_training() -> None:
    """Weights that a hook keeps small, an optimizer that draws: both work on what is released."""

    class Langevin(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    drawn = torch.randn_like(parameter)
                    parameter.sub_(0.05 * parameter.grad).add_(drawn, alpha=1e-3)

    def hooked(plan: DPPlan, dataset: Any) -> Naive:
        training = Naive(plan, dataset)

        def project(*_: Any) -> None:
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.div_(parameter.norm().clamp(min=1.0))

        training.optimizer.register_step_post_hook(project)
        return training

    def drawn(plan: DPPlan, dataset: Any) -> Naive:
        training = Naive(plan, dataset)
        training.optimizer = Langevin(training.model.parameters())
        return training

    for make in (hooked, drawn):
        report = audited(make)
        assert report.passed, report.verdict
        assert "could not be repeated" in report.unseen[-1]


def our_noise_off(private: PrivateTraining, patch: pytest.MonkeyPatch) -> None:
    perturb = private._generator.perturb
    patch.setattr(
        private._generator,
        "perturb",
        lambda values, *, deviation, scale: perturb(values, deviation=0 * deviation, scale=scale),
    )


def our_noise_halved(private: PrivateTraining, patch: pytest.MonkeyPatch) -> None:
    perturb = private._generator.perturb
    patch.setattr(
        private._generator,
        "perturb",
        lambda values, *, deviation, scale: perturb(values, deviation=deviation / 2, scale=scale),
    )


def our_noise_reseeded(private: PrivateTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        private._generator,
        "perturb",
        lambda values, **of_step: SecureGenerator(bytes(32)).perturb(values, **of_step),
    )


def our_clip_off(_: PrivateTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("privacy.update.clip_factors", lambda squares, **_: torch.ones_like(squares))


def our_threshold_forgotten(private: PrivateTraining, _: pytest.MonkeyPatch) -> None:
    release_by(private, noise=1 / 3)


def our_batch_size_physical(private: PrivateTraining, _: pytest.MonkeyPatch) -> None:
    release_by(private, size=1 / 3)


def release_by(private: PrivateTraining, *, noise: float = 1, size: float = 1) -> None:
    """Another noise and batch size where they are used: the ledger refuses them in the plan."""
    noised = private._clipped.noised_mean

    def wrong(generator: Any, *, noise_multiplier: float, batch_size: int, reduce: Reduce) -> Any:
        return noised(
            generator,
            noise_multiplier=noise * noise_multiplier,
            batch_size=round(size * batch_size),
            reduce=reduce,
        )

    private._clipped.noised_mean = wrong  # type: ignore[method-assign]


def our_batches_counted_twice(private: PrivateTraining, _: pytest.MonkeyPatch) -> None:
    keep = private._clipped.keep

    def twice(parts: Any, mask: torch.Tensor) -> int:
        keep(parts, mask)
        return keep(parts, mask)

    private._clipped.keep = twice  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (our_noise_off, "noise"),
        (our_noise_halved, "noise"),
        (our_noise_reseeded, "freshness"),
        (our_clip_off, "contribution"),
        (our_threshold_forgotten, "noise"),
        (our_batch_size_physical, "contribution"),
        (our_batches_counted_twice, "contribution"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defect_planted_in_our_own_path_is_caught(
    plant: Callable[[PrivateTraining, pytest.MonkeyPatch], None],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The audit goes through the real path: what is broken there shows."""

    def broken(plan: DPPlan, dataset: Any) -> PrivateTraining:
        private = ours(plan, dataset)
        plant(private, monkeypatch)
        return private

    report = audited(broken)
    assert expected in report.failed


BATCH_NORMS: dict[str, Callable[[], nn.Module]] = {
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "with frozen affine": lambda: nn.BatchNorm2d(4).requires_grad_(False),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_in_training_mode_is_refused_and_caught_behind_the_refusal(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal stops it; with every refusal bypassed the audit sees what leaks across rows."""
    with pytest.raises(UnsupportedLayer, match=r"^1: BatchNorm2d mixes examples"):
        audited(lambda plan, data: ours(plan, data, model=network(BATCH_NORMS[kind]())))
    monkeypatch.setattr("privacy.step.check_layers", lambda model: None)
    with pytest.raises(UnsupportedLayer, match=r"writes to|moved the output"):
        audited(lambda plan, data: ours(plan, data, model=network(BATCH_NORMS[kind]())))
    monkeypatch.setattr("privacy.step.probe", lambda trial: None)
    with pytest.raises(UnsupportedLayer, match=r"the loss of an example reached rows of others"):
        audited(lambda plan, data: ours(plan, data, model=network(BATCH_NORMS[kind]())))
    monkeypatch.setattr("privacy.probe.check_rows", lambda *_: None)
    monkeypatch.setattr("privacy.differentiation.check_rows", lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=r"running_mean.*: a buffer was written since"):
        audited(lambda plan, data: ours(plan, data, model=network(BATCH_NORMS[kind]())))
    monkeypatch.setattr("privacy.clipping.tape.Tape.watched", lambda *_: None)
    report = audited(lambda plan, data: ours(plan, data, model=network(BATCH_NORMS[kind]())))
    assert "clipped sum" in report.failed


def test_a_frozen_batch_norm_in_eval_mode_passes() -> None:
    """Control: what is legal is not refused."""

    def frozen() -> nn.Module:
        model = network(nn.BatchNorm2d(4).requires_grad_(False))
        model[1].eval()
        return model

    report = audited(lambda plan, data: ours(plan, data, model=frozen()))
    assert report.passed, report.verdict


def test_the_model_and_the_optimizer_are_left_without_hooks() -> None:
    """Also where the training breaks off."""
    made: list[PrivateTraining] = []

    def make(plan: DPPlan, dataset: Any) -> PrivateTraining:
        made.append(ours(plan, dataset))
        return made[-1]

    def failing(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if made[-1].steps == 1:
            raise RuntimeError("broken off")
        return losses_of(model, images, labels)

    audited(make)
    with pytest.raises(RuntimeError, match="broken off"):
        audited(make, failing)
    for private in made:
        model = private.model
        private.detach()  # which takes its own hook off
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert not private.optimizer._optimizer_step_pre_hooks


def test_what_cannot_be_audited_is_refused() -> None:
    """Too little data, no noise, another model, dropout, a model that is blind."""
    with pytest.raises(PlanError, match="expected at least 200 examples for 100 canaries, got 96"):
        audit(
            lambda p, d: (ours(p, d), losses_of),
            PLAN,
            data_of(),
            settings=AuditSettings(canaries=100),
        )
    plan = dataclasses.replace(PLAN, noise_multiplier=None)
    with pytest.raises(PlanError, match="no noise yet"):
        audit(lambda p, d: (ours(p, d), losses_of), plan, data_of())
    other = network()
    with pytest.raises(StepError, match="did not run the model that is audited"):
        audited(ours, lambda model, images, labels: losses_of(other, images, labels))
    with pytest.raises(StepError, match=r"^1: a network that draws random numbers"):
        audited(lambda plan, data: Naive(plan, data, network(nn.Dropout(0.5))))


@pytest.mark.parametrize("copies", [1, 2])
def test_losses_of_copies_are_refused_not_failed(copies: int) -> None:
    """An honest training with copies would be called wrong: nobody knows their gradients here."""

    def objective(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, targets = (x.repeat_interleave(copies, 0) for x in (images, labels))
        return losses_of(model, rows, targets).view(-1, copies)

    with pytest.raises(StepError, match=rf"shape \[\d+\], got \[\d+, {copies}\]: the audit"):
        audited(ours, objective)


@pytest.mark.parametrize(
    "wrong",
    [{"canaries": 1}, {"steps": 1}, {"largest_batch": 0}, {"confidence": 1.0}, {"false_alarm": 0}],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    """Out of range is refused by name."""
    with pytest.raises(PlanError, match=f"^{next(iter(wrong))}: expected"):
        AuditSettings(**wrong)


def test_noise_off_is_told_as_infinite() -> None:
    """Control of the figures: no noise, no finite epsilon worth the name."""
    report = audited(NoiseOff)
    bounds = {bound.method: bound.epsilon for bound in report.bounds}
    assert bounds["gdp"] > 100
    assert report.attack_auroc == 1.0
    assert math.isfinite(report.claimed_epsilon)


def test_a_plan_with_another_clipping_is_refused_not_failed() -> None:
    """The oracle clips flat; an honest training that clips otherwise must not be called broken."""
    plan = DPPlan(
        samples=80,
        batch_size=8,
        epochs=1,
        noise_multiplier=1.0,
        clipping=AutomaticClipping(),
    )
    with pytest.raises(PlanError, match=r"^clipping: expected FlatClipping"):
        audit(ours, plan, [(torch.rand(1, 8, 8), 0)] * 80)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((None, PLAN), {}, "^make_training: expected a function"),
        ((honest, None), {}, "^plan: expected a privacy.DPPlan"),
        ((honest, PLAN, None), {}, "^dataset: expected"),
        ((honest, PLAN), {"settings": 5}, "^settings: expected AuditSettings"),
        ((honest, PLAN), {"delta": "x"}, "^delta: expected a probability"),
        ((honest, PLAN), {"delta": 2}, "^delta: expected a probability"),
        ((lambda plan, data: None, PLAN), {}, "^make_training: expected a pair"),
        ((lambda plan, data: (None, losses_of), PLAN), {}, "^make_training: expected a pair"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments: Any, settings: Any, message: str) -> None:
    """Before anything is trained."""
    with pytest.raises(PrivacyError, match=message):
        audit(*arguments, *[data_of()][: 3 - len(arguments)], **settings)


@pytest.mark.parametrize("name", ["canaries", "steps", "largest_batch", "confidence", "seed"])
@pytest.mark.parametrize("wrong", ["x", None, -1, math.nan])
def test_settings_of_other_types_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}: expected"):
        AuditSettings(**{name: wrong})
