"""The record of a run that is about to begin: what is known of it before its first step."""

from collections.abc import Sequence
from datetime import UTC, datetime

import torch

import privacy
from secure_cnn.checkpoint import Sealing
from secure_cnn.data import ImageData
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.initial import InitialModel
from secure_cnn.recipe.notes import notes_before
from secure_cnn.recipe.outcome import privacy_record
from secure_cnn.recipe.settings import Recipe
from secure_cnn.record import DataRecord, RunRecord, ThreatRecord, hardware, versions

__all__ = ["new_record"]


def new_record(
    recipe: Recipe,
    data: ImageData,
    initial: InitialModel,
    identity: RunIdentity,
    *,
    plan: privacy.DPPlan | None,
    device: torch.device,
    sealing: Sealing | None,
    notes: Sequence[str] = (),
) -> RunRecord:
    """The record of a run of this number, on these images, with what else is to be noted."""
    signer = None if sealing is None else sealing.signer
    return RunRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=DataRecord(
            name=data.name,
            fingerprint=identity.fingerprint(data),
            train=len(data.train),
            test=len(data.test),
            shape=data.spec.shape,
            classes=data.spec.classes,
        ),
        model=initial.record,
        settings=recipe.to_dict(),
        versions=versions(),
        hardware=hardware(device),
        privacy=privacy_record(recipe, plan),
        threat=recipe.threat and ThreatRecord(**recipe.threat.to_dict()),
        notes=(*notes_before(recipe), *initial.notes, *notes),
        run_id=identity.id,
        signer="" if signer is None else signer.verifier.to_text(),
    )
