"""Measures how robust a model is: `evaluate(model, data, threat)` gives a `RobustnessReport`.

`rerun(report, model, data)` does it again from such a report alone.

Every image must survive every attack. Which images, in which order and from which random starts
follows from the seed. Here the pieces meet: a `trial` attacks, a `journal` remembers, `checks`
judge whether the figures can be believed, and a `report` holds what was found.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from defenses.attacks.adaptive import Adaptive
from defenses.attacks.attack import OWN_WORD, Attack, Setting
from defenses.attacks.by_name import attack, attack_names
from defenses.checks.checks import CheckSettings, in_order, judge, judged_before
from defenses.checks.consistency import copied
from defenses.checks.subject import Subject
from defenses.errors import EvaluationError
from defenses.evaluation.report import RobustnessReport, check_report
from defenses.evaluation.trial import Crafter, Trial, named_attacks
from defenses.measuring.counting import REPEATS
from defenses.measuring.images import ImageSource, ImageTensors, MapDataset, choose_images
from defenses.measuring.journal import Journal, digest_of, digest_of_model
from defenses.measuring.measurement import (
    Measurement,
    check_flag,
    check_question,
    measured,
    versions,
)
from defenses.measuring.verdict import Verdict
from defenses.quantities import shown
from defenses.scope import attack_scope
from defenses.threat import ThreatModel

__all__ = ["evaluate", "rerun"]

_PACKAGES = ("torch", "torchattacks", "numpy")  # on which figures depend


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
    examples: int | None = 8,
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
    or a loss of your own only the name can be compared.

    Args:
        model: Takes images in the threat model's bounds, returns logits [n, classes].
        data: A data set with tensors (or arrays) `images` and `labels`, any map-style one of
            (image, label) that gives the same example for the same index, or a `DataLoader` that
            does not shuffle. Of uint8 images 0 and 255 are the threat model's bounds.
        threat: The ball.
        attacks: Names, configured attacks, or your own `(model, images, labels) -> images`; the
            cheapest first, since what one fools the next need not try. The name `"autoattack"`
            stands for the standard ensemble, `"autoattack-rand"` for the one for models that answer
            at random, `"autoattack-plus"` for the one of more losses and starts, None for the
            quick one.
        samples: Evaluate this many images, drawn without replacement; None takes all.
        batch_size: Images a forward pass, at least 1.
        seed: Chooses the images and every random start, 0 <= seed < 2**63.
        exhaustive: Try every attack on every image that the model gets right, also on those that
            another has fooled.
        verdicts: Check too whether the figures can be believed (`defenses.check`), with
            these settings or with the usual ones.
        examples: How many images to keep with what the attacks made of them, at least 0; None
            keeps every one that was attacked.
        state: A file that is written after every batch, and read at the start if it is there.
        progress: Show a bar on stderr when that is a terminal.

    A model that answers otherwise when it is asked once more is judged over 20 draws, or as many as
    an attack has: clean images and found ones each count with the share of draws that are right,
    the intervals hold the variance of the draws, and an image is attacked while any draw of it is
    right. The default attacks then take as many draws, and as many times longer; give others
    `draws` too, without which they meet one draw at a time: those are the report's `undrawn`.

    The report says all that it rests on, and `rerun` does it again from there. Where an attack, the
    model or Ctrl-C ends the evaluation early, the error goes through, and has the report of what
    the attacks before it found as its attribute `report`.

    Raises:
        ThreatModelError: The images are not in the bounds.
        AttackError: An attack cannot run on this model.
        EvaluationError: The data is empty or does not fit the model, its logits are unusable, an
            attack searches another ball or leaves it, or `state` is of another evaluation.
        OSError: `state` cannot be read or written.

    Example:
        >>> import torch
        >>> data = [(torch.tensor([[[0.9, 0.1]]]), 0), (torch.tensor([[[0.5, 0.6]]]), 1)]
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> report = evaluate(nn.Flatten(), data, threat, attacks=["fgsm"])
        >>> report.clean_accuracy, report.worst_case_accuracy
        (1.0, 0.5)
    """
    check_question(model, threat, batch_size=batch_size, seed=seed)
    named, settings = named_attacks(attacks, threat), _check_settings(verdicts)
    check_flag("exhaustive", exhaustive)
    about = measured(
        model, data, threat, samples=samples, batch_size=batch_size, seed=seed, progress=progress
    )
    with about as measurement, attack_scope(model, seed=seed):
        _check_shapes(named, measurement)
        unasked = None if settings is None else copied(model)
        draws = max(REPEATS, *(each.draws for each in named.values()))
        trial, subject = Trial(measurement, examples=examples, draws=draws), None
        if attacks is None and trial.random:
            named = named_attacks(None, threat, draws=draws)
        if settings is not None:
            subject = Subject(measurement, settings, tuple(named.values()), unasked=unasked)
        run = (
            f"seed {seed}, batches of {batch_size}, exhaustive {exhaustive}, {examples} examples, "
            f"{settings} {digest_of_model(None if settings is None else settings.surrogate)}"
        )
        conditions = {
            "threat": threat,
            "seed": seed,
            "batch_size": batch_size,
            "exhaustive": exhaustive,
            "model": digest_of_model(model),
            "data": str(getattr(data, "name", "")),
            "checks": _as_values(settings),
        }
        journal = Journal(state, _identity(model, trial.images, threat, named, run))
        done = _Done(trial, named, conditions)
        try:
            _work(trial, subject, named, journal, done, exhaustive=exhaustive)
        except BaseException as error:
            done.attach_to(error)
            raise
    return done.report()


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
    checks = _settings_of(report, surrogate)
    samples = _check_images(report, ImageSource(data, report.threat))
    return evaluate(
        model,
        data,
        report.threat,
        attacks=[_attack_of(report, name, own or {}) for name in report.settings],
        samples=samples,
        batch_size=report.batch_size,
        seed=report.seed,
        exhaustive=report.exhaustive,
        verdicts=checks or False,
        progress=progress,
    )


class _Done:
    """What is finished so far; a class, since an interruption asks for the report in the middle."""

    def __init__(
        self, trial: Trial, named: Mapping[str, Attack], conditions: Mapping[str, Any]
    ) -> None:
        self._trial, self._named, self._conditions = trial, named, conditions
        self.attacks: list[str] = []
        self.verdicts: dict[str, Verdict] = {}

    def report(self) -> RobustnessReport:
        trial, outcomes = self._trial, self._trial.outcomes()
        return RobustnessReport(
            classes=trial.classes,
            indices=tuple(trial.indices.tolist()),
            labels=tuple(trial.labels.tolist()),
            predictions=tuple(trial.predictions.tolist()),
            outcomes={name: outcomes[name] for name in self.attacks},
            settings={name: self._named[name].settings for name in self.attacks},
            images=trial.images,
            versions=versions(*_PACKAGES),
            verdicts=in_order(self.verdicts),
            repeats=trial.repeats(self.attacks),
            examples=trial.examples(),
            **self._conditions,
        )

    def attach_to(self, error: BaseException) -> None:
        """Gives what is finished to whoever catches the error, as its attribute `report`."""
        if self.attacks:
            vars(error)["report"] = self.report()
            error.add_note(
                f"what {', '.join(self.attacks)} found is in the `report` of this error; give "
                "`state` to go on from there"
            )


def _work(
    trial: Trial,
    subject: Subject | None,
    named: Mapping[str, Attack],
    journal: Journal,
    done: _Done,
    *,
    exhaustive: bool,
) -> None:
    """Does what the journal does not hold yet, and writes it down piece by piece."""
    if journal.found:
        trial.resume(journal.part("trial", dict), names=list(named), exhaustive=exhaustive)
        done.verdicts |= judged_before(journal.part("verdicts", list))

    def remember() -> None:
        verdicts = [verdict.to_dict() for verdict in in_order(done.verdicts)]
        journal.write({"trial": trial.content(), "verdicts": verdicts})

    for name, search in named.items():
        for _ in trial.attack(name, search, exhaustive=exhaustive):
            remember()
        done.attacks.append(name)
    for verdict in () if subject is None else judge(subject, frozenset(done.verdicts)):
        done.verdicts[verdict.name] = verdict
        remember()


def _check_shapes(named: Mapping[str, Attack], measurement: Measurement) -> None:
    """Refuses attacks that cannot search such images, before the model is asked anything."""
    first = measurement.source.images(measurement.indices[:1])
    for each in named.values():
        each.check_shape(first)


def _check_settings(verdicts: object) -> CheckSettings | None:
    if verdicts is None or verdicts is False:
        return None
    settings = CheckSettings() if verdicts is True else verdicts
    if not isinstance(settings, CheckSettings):
        raise EvaluationError(f"verdicts: expected a bool or CheckSettings, got {shown(verdicts)}")
    return settings


def _as_values(settings: CheckSettings | None) -> dict[str, Setting]:
    """The settings of the checks as plain values; of the surrogate its digest."""
    if settings is None:
        return {}
    plain = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return plain | {"surrogate": digest_of_model(settings.surrogate)}


def _identity(
    model: nn.Module, images: str, threat: ThreatModel, named: Mapping[str, Attack], run: str
) -> dict[str, str]:
    """What must be the same where an interrupted evaluation goes on, part by part.

    Our own version is among it: other checks or attacks may stand behind the same names.
    """
    return {
        "model": digest_of_model(model),
        "images": images,
        "threat model": str(threat),
        "attacks": "; ".join(f"{name}: {_written(search)}" for name, search in named.items()),
        "seed or settings": run,
        "versions": ", ".join(f"{k} {v}" for k, v in versions(*_PACKAGES).items()),
    }


def _written(search: Attack) -> str:
    """The attack with its settings, and what these do not tell apart."""
    kind, told = type(search), repr(search)
    if not kind.__module__.startswith("defenses."):
        told += f" {kind.__module__}.{kind.__qualname__}"
    surrogate = search.surrogate if isinstance(search, Adaptive) else None
    return told if surrogate is None else f"{told} {digest_of_model(surrogate)}"


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


def _attack_of(
    report: RobustnessReport, name: str, own: Mapping[str, Attack | Crafter]
) -> Attack | Crafter:
    """The attack that has this name in a report, configured as it was."""
    if name in own:
        return own[name]
    plain, settings = name.partition(" #")[0], report.settings[name].items()
    brought = [key for key, value in settings if str(value).startswith(OWN_WORD)]
    known = plain in attack_names(report.threat.norm)
    if brought or not known:
        what = f"has a {brought[0]}" if known else "is an attack"
        raise EvaluationError(f"own: {name!r} {what} of your own; give it as own={{{name!r}: ...}}")
    return attack(plain, report.threat, **report.settings[name])  # type: ignore[arg-type]


def _settings_of(report: RobustnessReport, surrogate: nn.Module | None) -> CheckSettings | None:
    if not report.checks:
        return None
    if digest_of_model(surrogate) != report.checks["surrogate"]:
        raise EvaluationError("surrogate: expected the one of the report, or none if it had none")
    return CheckSettings(**{**report.checks, "surrogate": surrogate})  # type: ignore[arg-type]
