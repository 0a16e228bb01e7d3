"""What each method does, from the run that people leave to the new one in its folder."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from secure_cnn.checkpoint import model_digest, read_model, write_model
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe import Recipe, Run, run
from secure_cnn.recipe.folder import Journal
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.outcome import judge
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.begun import going_on
from secure_cnn.unlearning.heads import has_sums, head_carried_out, head_task, head_without
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.methods import HEURISTICS, Method
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.sharded import Shards, Work, carried_out, sharded_task
from secure_cnn.unlearning.source import Source, begun_with, leaving
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["WAYS", "Task", "finished", "shards_of"]

_HEURISTIC = (
    "Its weights were changed by {method}, without a guarantee: what is left of those who left is "
    "not known. Epochs and settings are those of the run before."
)
_UNCHANGED = "No weight was changed: what the figures say was found by the run before."
_TWICE = (
    "Who stayed was in the private training before this one too: what both models tell of them "
    "together is the sum of their epsilons."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every way needs; nothing was written yet."""

    source: Source
    request: Request
    method: Method
    data: ImageData
    inventory: Inventory
    files: StageFiles
    note: str


Way = Callable[..., tuple[Run, Work | None]]


def shards_of(task: Task) -> Shards:
    """The training in shards of those who stayed."""
    folder = task.files.run
    return sharded_task(
        _retraining(task),
        task.data,
        inventory=task.inventory,
        folder=folder,
        network=task.files.network,
        sealing=task.files.sealing,
        unlocking=task.files.unlocking,
        sources=(task.source.files,),
    )


def finished(task: Task) -> Run:
    """The new run that an earlier try had finished, but for its certificate."""
    folder = task.files.run
    loaded = read_model(
        folder.model,
        unlocking=task.files.unlocking if folder.sealed else None,
        network=task.files.network,
    )
    record = folder.recorded()
    killed = not task.files.inventory_path.exists()  # between the training and its inventory
    same_data = record.data.fingerprint == task.data.fingerprint
    known = task.inventory if killed and same_data else task.files.read_inventory()
    same = record.model_digest == task.source.record.model_digest
    told, name = loaded.claims.get("unlearned"), task.method.name
    claimed = told.get("method") if isinstance(told, dict) else None
    if (
        not _same(task, known)
        or claimed != (name if name in HEURISTICS else None)
        or record.model_digest != model_digest(loaded.model)
        or same != (name == "group-privacy")
        or _asked_otherwise(task, record, loaded.claims)
        or (task.source.recipe.head == "ridge" and not has_sums(task.files, record))
    ):
        raise RunError(
            f"{folder.root}: holds a run in which others left, or by another method; give the same "
            "command as before, or choose another folder"
        )
    if killed:
        task.files.write_inventory(known)
    return Run(record=record, folder=folder, model=loaded.model)


def _retraining(task: Task) -> Recipe:
    """The recipe of the run, for those who stayed."""
    return replace(task.source.recipe_for(len(task.data.train)), out=task.files.run.root)


def _asked_otherwise(task: Task, record: RunRecord, claims: Mapping[str, Any]) -> bool:
    """Whether a run has other settings than this forgetting gives, or began with other weights."""
    kept = task.method.name in ("group-privacy", *HEURISTICS)
    recipe = task.source.recipe if kept else _retraining(task)
    settings = {**record.settings, "model": record.model.name}
    changed = {*recipe.changed_from(settings)} - {"data", "groups"}
    return bool(changed) or begun_with(claims) != begun_with(task.source.loaded.claims)


def _same(task: Task, known: Inventory) -> bool:
    """Whether an inventory is of those who stay, under whatever key."""
    return known == Inventory.of(task.data, key=known.key)


def _sharded(
    task: Task, *, resume: bool, force: bool, anew: bool = False
) -> tuple[Run, Work | None]:
    """Trains the stages again that had seen somebody, and takes the others as they are."""
    folder, shards = task.files.run, shards_of(task)
    if anew:
        shards = replace(shards, sources=())
    with folder.locked() if resume else folder.begun(force=force):
        record = going_on(shards) if resume else None
        return carried_out(shards, record, notes=[task.note])


def _retrained(task: Task, *, resume: bool, force: bool) -> tuple[Run, Work | None]:
    """Trains from the first step on those who stayed."""
    if task.source.recipe.is_sharded:
        return _sharded(task, resume=resume, force=force, anew=True)
    if task.source.recipe.head == "ridge":
        return _subtracted(task, resume=resume, force=force, anew=True)
    recipe = _retraining(task)
    done = run(
        recipe,
        data=task.data,
        network=task.files.network,
        sealing=task.files.sealing,
        unlocking=task.files.unlocking,
        resume=resume,
        force=force,
    )
    if done.model is None:
        return done, None
    with done.folder.locked():
        task.files.write_inventory(task.inventory)
        notes = [task.note, *([_TWICE] if recipe.epsilon else [])]
        record = replace(done.record, notes=(*done.record.notes, *notes))
        record.write(done.folder.record)
    return replace(done, record=record), None


def _subtracted(task: Task, *, resume: bool, force: bool, anew: bool = False) -> tuple[Run, None]:
    """Takes who leaves from the sums of a ridge head, and solves for it again."""
    source, files = task.source, task.files
    head = head_task(_retraining(task), task.data, files)
    if not anew:
        head = head_without(head, source, task.request)
    with files.run.locked() if resume else files.run.begun(force=force):
        done = head_carried_out(head, going_on(head) if resume else None, notes=[task.note])
        if done.model is not None:
            files.write_inventory(task.inventory)
        return done, None


def _unchanged(task: Task, *, resume: bool, force: bool) -> tuple[Run, None]:
    """Hands the model on as it is."""
    if resume:
        raise RunError("resume: expected a training, got group-privacy, which has none; begin anew")
    source, folder = task.source, task.files.run
    loaded = source.loaded
    claims = {name: each for name, each in loaded.claims.items() if name != "architecture"}
    data = dict(claims.get("data") or {})
    # Signed where the model is: nobody can take people out of the count by taking a file away.
    claims["data"] = {**data, "left": int(data.get("left", 0)) + len(task.request.left)}
    with folder.begun(force=force):
        journal = _handed_on(task, _UNCHANGED)
        return _completed(task, journal, loaded.model, claims), None


def _heuristically(task: Task, *, resume: bool, force: bool) -> tuple[Run, None]:
    """Changes the weights by a method without a guarantee, and judges what comes of it."""
    method = task.method.name
    if resume:
        raise RunError(
            f"resume: expected a training, got {method}, which keeps nothing; begin anew"
        )
    source, folder, recipe = task.source, task.files.run, task.source.recipe
    loaded, model = source.loaded, copy.deepcopy(source.loaded.model)
    with folder.begun(force=force):
        journal = _handed_on(task, _HEURISTIC.format(method=method))
        HEURISTICS[method]()(model, task.data.train, leaving(source.data, task.request))
        outcome = judge(recipe, recipe.variant, model, task.data, None, StopRequest())
        result = outcome.result
        claims = {
            **{n: v for n, v in loaded.claims.items() if n not in ("architecture", "robustness")},
            "accuracy": result.accuracy,
            "macro_recall": result.macro_recall,
            "unlearned": {"method": method, "guarantee": False},
        }
        journal.record = replace(
            journal.record, results=(), claims=claims, model_digest=model_digest(model)
        )
        journal.add_result(result, outcome.examples, notes=())
        return _completed(task, journal, model, claims), None


def _handed_on(task: Task, note: str) -> Journal:
    """A journal begun with the record of the old run, for a model that was not trained anew."""
    before, folder = task.source.record, task.files.run
    record = replace(
        before,
        status="running",
        settings={**before.settings, "out": str(folder.root)},
        run_id=RunIdentity.draw(private=False).id,
        notes=(*before.notes, task.note, note),
        checkpoints=(folder.model.relative_to(folder.root).as_posix(),),
    )
    journal = Journal(folder, record, task.files.sealing)
    journal.begin()
    journal.write()
    return journal


def _completed(task: Task, journal: Journal, model: nn.Module, claims: Mapping[str, Any]) -> Run:
    """Writes who is left and the model, with what it claims, and closes the record."""
    loaded, folder = task.source.loaded, journal.folder
    task.files.write_inventory(task.inventory)
    write_model(
        folder.model,
        model,
        loaded.architecture,
        claims=claims,
        private_claims=loaded.private_claims or None,
        sealing=task.files.sealing,
        overwrite=True,
    )
    journal.complete()
    return Run(record=journal.record, folder=folder, model=model)


WAYS: dict[str, Way] = {
    "sharded": _sharded,
    "rewind": _sharded,
    "ridge": _subtracted,
    "retrain": _retrained,
    "group-privacy": _unchanged,
    **dict.fromkeys(HEURISTICS, _heuristically),
}
