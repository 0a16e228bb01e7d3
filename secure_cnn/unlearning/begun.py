"""What trainings outside of `secure_cnn.recipe.run` have in common: how they go on, and report."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import nn

from secure_cnn.checkpoint import model_digest, write_model
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest, stop_here
from secure_cnn.recipe import Recipe
from secure_cnn.recipe.folder import Journal
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.initial import InitialModel
from secure_cnn.recipe.new_record import new_record
from secure_cnn.recipe.outcome import claims_of, judge
from secure_cnn.recipe.seams import make_device
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["Beginning", "begun", "going_on", "reported"]


class Beginning(Protocol):
    """A training that may begin: everything is loaded and checked, and no file was touched."""

    @property
    def recipe(self) -> Recipe:
        """What to do."""

    @property
    def data(self) -> ImageData:
        """The images, all of them."""

    @property
    def initial(self) -> InitialModel:
        """How each network of it begins."""

    @property
    def files(self) -> StageFiles:
        """Where it is kept."""


def begun(
    task: Beginning, record: RunRecord | None, *, notes: Sequence[str], stage_epochs: int = 0
) -> tuple[RunIdentity, Journal]:
    """The journal of a folder that is begun, with a new record, or the one that goes on.

    Of a training in stages `stage_epochs` are the epochs of each.
    """
    identity = RunIdentity.draw(private=False)
    if record is not None:
        identity = RunIdentity(id=record.run_id)
    else:
        fresh = new_record(
            task.recipe,
            task.data,
            task.initial,
            identity,
            plan=None,
            device=make_device(task.recipe),
            sealing=task.files.sealing,
            notes=notes,
        )
        record = replace(fresh, stage_epochs=stage_epochs)
    journal = Journal(task.files.run, record, task.files.sealing)
    journal.begin()
    journal.write()
    return identity, journal


def reported(
    task: Beginning,
    model: nn.Module,
    identity: RunIdentity,
    journal: Journal,
    stop: StopRequest,
    *,
    members: int = 1,
) -> None:
    """Judges the finished model of so many networks, writes it and closes the record.

    Raises:
        Stopped: A stop was requested.
    """
    recipe, folder = task.recipe, task.files.run
    outcome = judge(recipe, recipe.variant, model, task.data, None, stop)
    journal.add_result(outcome.result, outcome.examples, notes=())
    claims = claims_of(recipe, None, outcome, task.data, identity) | task.initial.claims
    write_model(
        folder.model,
        model,
        replace(task.initial.architecture, members=members),
        claims=claims,
        sealing=task.files.sealing,
        overwrite=True,
    )
    place = folder.model.relative_to(folder.root).as_posix()
    journal.record = replace(
        journal.record, claims=claims, checkpoints=(place,), model_digest=model_digest(model)
    )
    journal.write()
    stop_here(stop)
    journal.complete()


def going_on(task: Beginning) -> RunRecord:
    """The record of the run that is resumed, once it is sure that it is this one.

    Raises:
        RunError: It is complete, or another one, or was sealed or signed otherwise.
    """
    folder = task.files.run
    record = folder.recorded()
    if record.status == "complete":
        raise RunError(f"{folder.root}: the run is complete; there is nothing to resume")
    changed = task.recipe.changed_from(record.settings)
    if changed:
        raise RunError(
            f"{folder.root}: the run has other settings: {', '.join(changed)}; resume with its own"
        )
    if record.data.fingerprint != task.data.fingerprint:
        raise RunError(f"{folder.root}: the data changed since the run began: {task.recipe.data}")
    signer = None if task.files.sealing is None else task.files.sealing.signer
    if record.signer and (signer is None or signer.verifier.to_text() != record.signer):
        raise RunError(
            f"{folder.root}: the run is signed, and it goes on as it began; name its signer again"
        )
    others = "*." + ("safetensors" if folder.sealed else "sealed")
    if any(any(place.glob(others)) for place in (folder.shards, folder.model.parent)):
        raise RunError(
            f"{folder.root}: the run's checkpoints are {'plain' if folder.sealed else 'sealed'}, "
            "and it goes on as it began; "
            + ("name no recipient" if folder.sealed else "name its recipients and signer again")
        )
    return replace(record, status="running")
