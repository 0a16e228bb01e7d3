"""All that is measured of one target, as one record with its conditions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import final

import torch

import defenses
from secure_cnn.evaluate import batch_for, evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.leakage import arguments
from secure_cnn.leakage.copies import ExtractionSettings, measure_extraction
from secure_cnn.leakage.earlier import earlier, keep_pictures, kept_pictures
from secure_cnn.leakage.gradients import InversionSettings, Picture, measure_inversion
from secure_cnn.leakage.membership import MembershipSettings, measure_membership
from secure_cnn.leakage.pools import FixedPool, GrowingPool, Pool, halves, noise_images
from secure_cnn.leakage.sharing import Sharing
from secure_cnn.leakage.student import StudentTraining
from secure_cnn.leakage.table_file import alone_in
from secure_cnn.leakage.target import Target
from secure_cnn.record import (
    ControlRecord,
    ExtractionRecord,
    InversionRecord,
    LeakageRecord,
    MembershipRecord,
    hardware,
    versions,
)

__all__ = ["LeakageSettings", "Measured", "measure_leakage"]

_FOR_WHOM = (
    "These figures are of the private images themselves, and no ε covers them: they are for who "
    "may see the images."
)

_BUDGETS, _FEW, _ATTACK_STEPS = (100, 1000, 5000), 100, 10
_COPIES = (
    "{count:,} images are in the data more than once. Whom the model has seen is not told by them, "
    "and none is in the pool; images that are nearly alike are, and make leakage look smaller."
)
_UNCERTAIN = (
    "Whether the training images are still those of the run was not checked: the fingerprint of a "
    "private run is keyed, and the key is in its sealed model alone. With other images in their "
    "place members would be none, and nothing would be found. Give the sealed model, with "
    "--checkpoint FILE --identity KEY."
)
_UNBOUND = (
    "That the model is the one of this run was told by what it finds on the test images alone, "
    "which others find too: an earlier version trained it, and kept no digest of its weights."
)


@final
@dataclass(frozen=True, kw_only=True)
class LeakageSettings:
    """What is measured of a target.

    Attributes:
        membership: How it is told who was in its data.
        inversion: Whether images are looked for in gradients, as a client would share them in the
            first step of this training: as they are, and of a private training as they are clipped,
            and as they are noised. They are of test images, so that nobody's image is shown who was
            trained on.
        images: Images that are looked for in gradients of 1, 4 and 8 each, about so many of each,
            and in two gradients at least.
        extraction: Whether copies are made of the model's answers: by one half of the test images,
            by noise, and by images that are made of a few of them; judged on the other half. Copies
            are networks of the same architecture. Where the run has a threat model, attacks on them
            are tried on the model.

    Raises:
        RunError: A value is out of range.
    """

    membership: MembershipSettings = MembershipSettings()  # noqa: RUF009  # it is frozen
    inversion: bool = False
    images: int = 16
    extraction: bool = False

    def __post_init__(self) -> None:
        arguments.instance("membership", self.membership, MembershipSettings)
        for name in ("inversion", "extraction"):
            arguments.instance(name, getattr(self, name), bool)
        arguments.whole("images", self.images, least=1)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What was found, and images from gradients beside those that they were made of."""

    record: LeakageRecord
    pictures: tuple[Picture, ...]


def measure_leakage(
    target: Target,
    settings: LeakageSettings,
    out: Path,
    *,
    stop: StopRequest,
    force: bool = False,
    keep: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """What a target leaks: who was in its data, and what its gradients show.

    Guarantee: an interrupted call goes on where it was, from what is in `out/leakage`; what is
    found in gradients, and by copies, is looked for anew where it is asked for. What is not, and
    stands in `out/leakage.json` of the same run and weights, stays. No other measurement uses that
    folder meanwhile, and that `out` can be written to is seen to before a model is trained.

    Args:
        target: Whom it is about.
        settings: What is measured, and how.
        out: The folder that has, or gets, the folder `leakage` of the score table.
        stop: Looked at after every step.
        force: Begin anew where another table is there.
        keep: Called with what is known, once membership is measured and after every further part.

    Raises:
        Stopped: A stop was requested.
        SecureCNNError: The folder holds another table, is in use, or cannot be written to.
        LeakageError: There are too few examples, or a model says no numbers.
    """
    with alone_in(out) as folder:
        told = settings.membership
        membership, controls = measure_membership(target, told, folder, stop=stop, force=force)
        found = _with_earlier(_record(target, told, membership, controls), out)
        if not target.record.model_digest:
            found = replace(found, notes=(*found.notes, _UNBOUND))
        kept = kept_pictures(folder, found.inversion, target.data.spec.shape)
        measured = Measured(record=found, pictures=kept)
        keep(measured)
        if settings.inversion:
            rows, pictures = _inverted(target, settings, stop)
            keep_pictures(folder, rows, pictures)
            found = replace(found, inversion=rows, measured={**found.measured, "inversion": _now()})
            measured = Measured(record=found, pictures=pictures)
            keep(measured)
        if settings.extraction:
            copies, left_out = _copied(target, told.seed, stop)
            dates = {**found.measured, "extraction": _now()}
            found = replace(found, extraction=copies, left_out=left_out, measured=dates)
            measured = Measured(record=found, pictures=measured.pictures)
            keep(measured)
        return measured


def _with_earlier(found: LeakageRecord, out: Path) -> LeakageRecord:
    """With what was found of the same model in gradients and by copies, as far as it is there."""
    before = earlier(out, run=found.run, weights=found.weights).record
    if before is None:
        return found
    parts = {n: before.measured[n] for n in ("inversion", "extraction") if n in before.measured}
    return replace(
        found,
        inversion=before.inversion,
        extraction=before.extraction,
        left_out=before.left_out,
        measured={**found.measured, **parts},
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _record(
    target: Target,
    told: MembershipSettings,
    membership: MembershipRecord,
    controls: tuple[ControlRecord, ...],
) -> LeakageRecord:
    """Of membership alone, with its conditions."""
    train, record, promise = target.data.train, target.record, target.promise
    on_members = evaluate_model(
        target.model,
        train,
        target.data.spec.classes,
        batch_size=batch_for(target.model, train),
    )
    return LeakageRecord(
        created=_now(),
        hardware=hardware("cpu"),
        versions=versions(),
        model=target.recipe.model,
        variant=target.recipe.variant.name,
        data=target.data.name,
        classes=target.data.spec.classes,
        run=record.run_id,
        recipe=target.digest,
        settings={
            "shadows": told.shadows,
            "pool": told.pool,
            "attacks": list(told.chosen),
            "seed": told.seed,
        },
        accuracy=target.found.accuracy,
        train_accuracy=on_members.accuracy,
        epsilon=None if promise is None else promise.pairs[0][0],
        delta=None if promise is None else promise.pairs[0][1],
        promised=() if promise is None else promise.pairs,
        controls=controls,
        membership=membership,
        notes=_notes(target),
        weights=target.weights,
        measured={"membership": _now()},
    )


def _inverted(
    target: Target, settings: LeakageSettings, stop: StopRequest
) -> tuple[tuple[InversionRecord, ...], tuple[Picture, ...]]:
    """What the first step of the training shows, under each of its own protections."""
    recipe = target.recipe
    protections: tuple[Sharing, ...] = (Sharing(),)
    plan = target.plan
    if plan is not None:
        norm = recipe.max_grad_norm
        noised = Sharing(max_grad_norm=norm, noise_multiplier=plan.noise_multiplier or 0.0)
        protections = (*protections, Sharing(max_grad_norm=norm), noised)
    return measure_inversion(
        target.initial.build(),
        target.data.test,
        InversionSettings(
            protections=protections, images=settings.images, seed=settings.membership.seed
        ),
        stop=stop,
    )


def _copied(
    target: Target, seed: int, stop: StopRequest
) -> tuple[tuple[ExtractionRecord, ...], tuple[str, ...]]:
    """What copies are worth that are made of the model's answers about images not trained on.

    And what was left out, in words.
    """
    asked, judged = halves(target.data.test, seed=seed)
    images, labels = asked.batch(torch.arange(len(asked)))
    few = min(_FEW, len(images))
    noise = noise_images(target.data.spec.shape, len(images), seed=seed)
    begin, threat = target.initial, target.recipe.threat
    attack = None if threat is None else defenses.attacks.PGD(threat, steps=_ATTACK_STEPS)
    budgets = [budget for budget in _BUDGETS if budget <= len(images)] or [few]
    pools: tuple[Pool, ...] = (
        FixedPool(name="unseen images", images=images, labels=labels),
        FixedPool(name="noise", images=noise),
    )
    if max(budgets) > few:
        grows = GrowingPool(name="adaptive", images=images[:few], labels=labels[:few])
        pools = (*pools, grows)
    copies = measure_extraction(
        target.model,
        judged,
        pools,
        StudentTraining(
            build=lambda seed: begin.architecture.build(generator_seed=seed, network=begin.network),
            stop=stop,
        ),
        ExtractionSettings(budgets=tuple(budgets), attack=attack, seed=seed),
    )
    return copies, _left_out(len(images), few, budgets)


def _left_out(images: int, few: int, budgets: list[int]) -> tuple[str, ...]:
    """Budgets and pools for which there are too few images, a sentence each."""
    words = []
    if above := [f"{budget:,}" for budget in _BUDGETS if budget not in budgets]:
        words.append(
            f"{' and '.join(above)} questions were not asked: one half of the test images is asked "
            f"about, and has {images:,}."
        )
    asked = f"{few:,} questions of the adaptive pool are those of its {few:,} images, as unseen"
    if max(budgets) <= few:
        words.append(f"{asked} images have them: without a larger budget it is left out.")
    elif min(budgets) <= few:
        words.append(f"{asked} images have them, and are asked once alone.")
    return tuple(words)


def _notes(target: Target) -> tuple[str, ...]:
    """What must be known to read the figures."""
    notes: tuple[str, ...] = () if target.promise is None else (_FOR_WHOM,)
    if len(target.copies):
        notes += (_COPIES.format(count=len(target.copies)),)
    return notes if target.certain else (*notes, _UNCERTAIN)
