"""Does an evaluation again from its report alone: `rerun(report, model, data)`."""

from collections.abc import Mapping

import torch
from torch import nn

from defenses.attacks.attack import Attack
from defenses.attacks.by_name import attack, attack_names
from defenses.checks.subject import CheckSettings
from defenses.errors import EvaluationError
from defenses.evaluation.evaluation import Crafter, evaluate
from defenses.evaluation.report import RobustnessReport, check_report
from defenses.measuring.images import ImageSource, ImageTensors, MapDataset, choose_images
from defenses.measuring.journal import digest_of, digest_of_model
from defenses.measuring.measurement import check_question
from defenses.quantities import shown

__all__ = ["rerun"]


def rerun(
    report: RobustnessReport,
    model: nn.Module,
    data: MapDataset | ImageTensors,
    *,
    own: Mapping[str, Attack | Crafter] | None = None,
    surrogate: nn.Module | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Evaluates once more, with the settings that a report holds, and on the same images.

    With the same versions on the same kind of machine the new report equals the old one. With
    others, compare the figures: rounding may turn an image that lies on the edge.

    Args:
        report: What is to be done again, perhaps from `RobustnessReport.load`.
        model: The model that was evaluated.
        data: The data set that it was evaluated on.
        own: By their names in the report, the attacks that are not of this package.
        surrogate: That of the checks, if they had one.
        progress: Show a bar on stderr when that is a terminal.

    Raises:
        EvaluationError: The model, the surrogate or the images are others, or an attack of one's
            own is not given.
        AttackError: An attack has no such settings.

    Example:
        >>> from defenses import ThreatModel
        >>> data = [(torch.tensor([[[0.9, 0.1]]]), 0), (torch.tensor([[[0.5, 0.6]]]), 1)]
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> report = evaluate(nn.Flatten(), data, threat, attacks=["fgsm"])
        >>> rerun(RobustnessReport.from_dict(report.to_dict()), nn.Flatten(), data) == report
        True
    """
    check_report(report)
    if not isinstance(own, Mapping | None):
        raise EvaluationError(f"own: expected attacks by name, got {shown(own)}")
    check_question(model, report.threat, batch_size=report.batch_size, seed=report.seed)
    if report.model != digest_of_model(model):
        raise EvaluationError(
            "model: it is not the one of the report: its layers or weights are others"
        )
    checks = _checks(report, surrogate)
    samples = _check_images(report, ImageSource(data, report.threat))
    return evaluate(
        model,
        data,
        report.threat,
        attacks=[_attack(report, name, own or {}) for name in report.settings],
        samples=samples,
        batch_size=report.batch_size,
        seed=report.seed,
        exhaustive=report.exhaustive,
        verdicts=checks or False,
        progress=progress,
    )


def _check_images(report: RobustnessReport, source: ImageSource) -> int | None:
    """Refuses other images before any is attacked; how many to draw, None for all."""
    count = len(source)
    samples = None if report.samples == count else report.samples
    if report.samples <= count:
        indices = choose_images(count, samples, torch.Generator().manual_seed(report.seed))
        parts = torch.split(indices, report.batch_size)
        # As a trial digests what it reads, batch by batch.
        digests = [digest_of(source.images(part).float()) for part in parts]
        same = digest_of(*digests, source.labels(indices)) == report.images
        if same and indices.tolist() == list(report.indices):
            return samples
    raise EvaluationError("data: its images, their order or their labels are not the report's")


def _attack(
    report: RobustnessReport, name: str, own: Mapping[str, Attack | Crafter]
) -> Attack | Crafter:
    """The attack that has this name in a report, configured as it was."""
    if name in own:
        return own[name]
    plain = name.partition(" #")[0]
    if plain not in attack_names(report.threat.norm):
        raise EvaluationError(
            f"own: {name!r} is an attack of your own; give it as own={{{name!r}: ...}}"
        )
    brought = [
        key for key, value in report.settings[name].items() if str(value).startswith("own: ")
    ]
    if brought:
        raise EvaluationError(
            f"own: {name!r} has a {brought[0]} of your own; give it as own={{{name!r}: ...}}"
        )
    return attack(plain, report.threat, **report.settings[name])  # type: ignore[arg-type]


def _checks(report: RobustnessReport, surrogate: nn.Module | None) -> CheckSettings | None:
    """The settings of the checks, with the surrogate that they had."""
    if not report.checks:
        return None
    if digest_of_model(surrogate) != report.checks["surrogate"]:
        raise EvaluationError("surrogate: expected the one of the report, or none if it had none")
    return CheckSettings(**{**report.checks, "surrogate": surrogate})  # type: ignore[arg-type]
