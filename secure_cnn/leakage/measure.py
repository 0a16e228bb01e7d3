"""All that is measured of one target, as one record with its conditions."""

from datetime import UTC, datetime
from pathlib import Path

from secure_cnn.evaluate import batch_for, evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.leakage.membership import MembershipSettings, measure_membership
from secure_cnn.leakage.target import Target
from secure_cnn.record import LeakageRecord, hardware, versions

__all__ = ["measure_leakage"]

_FOR_WHOM = (
    "These figures are of the private images themselves, and no ε covers them: they are for who "
    "may see the images."
)


def measure_leakage(
    target: Target,
    settings: MembershipSettings,
    out: Path,
    *,
    stop: StopRequest,
    force: bool = False,
) -> LeakageRecord:
    """What a target leaks: who was in its data.

    Guarantee: an interrupted call goes on where it was, from what is in `out/leakage`.

    Args:
        target: Whom it is about.
        settings: How membership is measured.
        out: The folder that has, or gets, the folder `leakage` of the score table.
        stop: Looked at after every step.
        force: Begin anew where another table is there.

    Raises:
        Stopped: A stop was requested.
        SecureCNNError: The folder holds another table, or cannot be written to.
        LeakageError: There are too few examples, or a model says no numbers.
    """
    folder = out / "leakage"
    membership, controls = measure_membership(target, settings, folder, stop=stop, force=force)
    train, record, promise = target.data.train, target.record, target.promise
    on_members = evaluate_model(
        target.model,
        train,
        target.data.spec.classes,
        batch_size=batch_for(target.model, train),
    )
    return LeakageRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        model=target.recipe.model,
        variant=target.recipe.variant.name,
        data=target.data.name,
        classes=target.data.spec.classes,
        run=record.run_id,
        recipe=target.digest,
        settings={
            "shadows": settings.shadows,
            "pool": settings.pool,
            "attacks": list(settings.chosen),
            "seed": settings.seed,
        },
        accuracy=target.found.accuracy,
        train_accuracy=on_members.accuracy,
        epsilon=None if promise is None else promise.pairs[0][0],
        delta=None if promise is None else promise.pairs[0][1],
        promised=() if promise is None else promise.pairs,
        controls=controls,
        membership=membership,
        notes=(_FOR_WHOM,) if promise else (),
    )
