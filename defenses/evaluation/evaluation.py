"""Measures how robust a model is: `evaluate(model, data, threat)` gives a `RobustnessReport`.

Every image must survive every attack (worst case per image). Images already misclassified are not
attacked, and fooled ones are by default not attacked again: their verdict is known. Which images,
in which order and from which random starts follows from the seed.

Here the pieces meet: `images` are read, a `trial` attacks them, a `journal` remembers, `checks`
judge whether the figures can be believed, and a `report` holds what was found.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import nn

from defenses.attacks.attack import Attack
from defenses.checks.checks import CheckSettings, judge, judged_before
from defenses.checks.subject import Subject
from defenses.checks.verdict import Verdict
from defenses.errors import EvaluationError
from defenses.evaluation.images import (
    ImageSource,
    ImageTensors,
    MapDataset,
    check_question,
    choose_images,
)
from defenses.evaluation.journal import Journal, digest_of_model
from defenses.evaluation.plans import Crafter, named_attacks
from defenses.evaluation.progress import progress_bar
from defenses.evaluation.report import RobustnessReport
from defenses.evaluation.trial import Trial
from defenses.scope import attack_scope
from defenses.threat import ThreatModel

__all__ = ["ImageTensors", "MapDataset", "evaluate"]


def evaluate(  # noqa: PLR0913  (each is one decision of who evaluates)
    model: nn.Module,
    data: MapDataset | ImageTensors,
    threat: ThreatModel,
    *,
    attacks: Sequence[str | Attack | Crafter] | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    exhaustive: bool = False,
    verdicts: bool | CheckSettings = False,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attacks every image that the model gets right, and reports what survives.

    By default the attacks are the quick ensemble, two of Auto-PGD (Croce & Hein 2020, arXiv
    2003.01690): on the cross-entropy of logits that are brought to one range, and towards the
    three likeliest wrong classes, 50 steps each, at most 204 forward and backward passes an image.
    No factor on the logits changes what they find. `verdicts` says how much the standard AutoAttack
    finds beyond them. The model is left as it was, and so are the global random states.

    With `state`, every finished batch is in that file, and the same call goes on from there after
    a kill; the report is the one that an uninterrupted evaluation would have given. The model's
    weights, the images, the threat model, the attacks and the seed must be the same; of an attack
    of your own only the name can be compared.

    Args:
        model: Takes images in the threat model's bounds, returns logits [n, classes].
        data: A data set with tensors (or arrays) `images` and `labels`, any map-style one of
            (image, label) that gives the same example for the same index, or a `DataLoader` that
            does not shuffle. Of uint8 images 0 and 255 are the threat model's bounds.
        threat: The ball.
        attacks: Names, configured attacks, or your own `(model, images, labels) -> images`; the
            cheapest first, since what one fools the next need not try. The name `"autoattack"`
            stands for the standard ensemble; None for the quick one.
        samples: Evaluate this many images, drawn without replacement; None takes all.
        batch_size: Images a forward pass, at least 1.
        seed: Chooses the images and every random start, 0 <= seed < 2**63.
        exhaustive: Try every attack on every image that the model gets right, also on those that
            another has fooled.
        verdicts: Check too whether the figures can be believed (`defenses.check`), with
            these settings or with the usual ones.
        state: A file that is written after every batch, and read at the start if it is there.
        progress: Show a bar on stderr when that is a terminal.

    Raises:
        ThreatModelError: The images are not in the bounds.
        AttackError: An attack cannot run on this model.
        EvaluationError: The data is empty or does not fit the model, its logits are unusable, an
            attack searches another ball or leaves it, or `state` is of another evaluation.
        OSError: `state` cannot be read or written.

    Example:
        >>> data = [(torch.tensor([[[0.9, 0.1]]]), 0), (torch.tensor([[[0.5, 0.6]]]), 1)]
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> report = evaluate(nn.Flatten(), data, threat, attacks=["fgsm"])
        >>> report.clean_accuracy, report.worst_case_accuracy
        (1.0, 0.5)
    """
    check_question(model, threat, batch_size=batch_size, seed=seed)
    named = named_attacks(attacks, threat)
    checked = CheckSettings() if verdicts is True else verdicts or None
    if not isinstance(checked, CheckSettings | None):
        raise EvaluationError(f"verdicts: expected a bool or CheckSettings, got {verdicts!r}")
    source = ImageSource(data, threat)
    indices = choose_images(len(source), samples, torch.Generator().manual_seed(seed))
    with attack_scope(model, seed=seed), progress_bar(shown=progress) as bar:
        trial = Trial(model, source, indices, threat, batch_size=batch_size, seed=seed, bar=bar)
        subject = None
        if checked is not None:
            subject = Subject(
                model,
                source,
                indices,
                threat,
                checked,
                attacks=tuple(named.values()),
                batch_size=batch_size,
                seed=seed,
                bar=bar,
            )
        run = f"seed {seed}, batches of {batch_size}, exhaustive {exhaustive}, {_told(checked)}"
        journal = Journal(state, _identity(model, trial.images, threat, named, run))
        verdicts_found = _work(trial, subject, named, journal, exhaustive=exhaustive)
    return RobustnessReport(
        threat=threat,
        classes=trial.classes,
        indices=tuple(indices.tolist()),
        labels=tuple(trial.labels.tolist()),
        predictions=tuple(trial.predictions.tolist()),
        outcomes=trial.outcomes(),
        settings={name: each.settings for name, each in named.items()},
        seed=seed,
        images=trial.images,
        versions=_versions(),
        verdicts=verdicts_found,
        examples=trial.examples(),
    )


def _work(
    trial: Trial,
    subject: Subject | None,
    named: Mapping[str, Attack],
    journal: Journal,
    *,
    exhaustive: bool,
) -> tuple[Verdict, ...]:
    """Does what the journal does not hold yet, and writes it down piece by piece."""
    judged: list[Verdict] = []
    if journal.found:
        trial.resume(journal.part("trial", dict), names=list(named), exhaustive=exhaustive)
        judged = judged_before(journal.part("verdicts", list))

    def remember() -> None:
        verdicts = [verdict.to_dict() for verdict in judged]
        journal.write({"trial": trial.content(), "verdicts": verdicts})

    for name, search in named.items():
        for _ in trial.attack(name, search, exhaustive=exhaustive):
            remember()
    for verdict in () if subject is None else judge(subject, tuple(judged)):
        judged.append(verdict)
        remember()
    return tuple(judged)


def _told(settings: CheckSettings | None) -> str:
    """The settings of the checks with the weights of the surrogate, not only its layers."""
    surrogate = None if settings is None else settings.surrogate
    return f"{settings} {'' if surrogate is None else digest_of_model(surrogate)}"


def _identity(
    model: nn.Module, images: str, threat: ThreatModel, named: Mapping[str, Attack], run: str
) -> dict[str, str]:
    """What must be the same where an interrupted evaluation goes on, part by part."""
    return {
        "model": digest_of_model(model),
        "images": images,
        "threat model": str(threat),
        "attacks": "; ".join(f"{name}: {search!r}" for name, search in named.items()),
        "seed or settings": run,
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
    }


def _versions() -> dict[str, str]:
    """What the figures depend on, apart from the model and the data."""
    packages = ("torch", "torchattacks", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
