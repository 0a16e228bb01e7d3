"""`forget`: people leave the data of a run, and a new run is as if they had not been there.

The old run is only read. What is left of it is the controller's to destroy; see `archive.shred`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    check_sealing,
    check_unlocking,
    model_digest,
    read_model,
    write_model,
)
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Run, RunFolder, run
from secure_cnn.recipe.folder import Journal
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.outcome import judge
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.methods import HEURISTICS, Method, chosen_method
from secure_cnn.unlearning.requests import Request, read_request
from secure_cnn.unlearning.sharded import Shards, Work, carried_out, going_on, sharded_task
from secure_cnn.unlearning.source import Source, leaving, source_of, staying
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["Forgetting", "Forgotten", "forget"]

_NOTE = "{images} of its training images left the data of the run {before}; see certificate.json."
_HEURISTIC = (
    "Its weights were changed by {method}, without a guarantee: what is left of those who left is "
    "not known. Epochs and settings are those of the run before."
)
_UNCHANGED = "No weight was changed: what the figures say was found by the run before."
_TWICE = (
    "Who stayed was in the private training before this one too: what both models tell of them "
    "together is the sum of their epsilons."
)


@final
@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Who leaves what, and how.

    Attributes:
        run: The folder of the run that they leave; it must be complete, and is only read.
        ids: A file that names them, see `secure_cnn.unlearning.requests`.
        out: The folder of the new run.
        method: `auto`, or one of `METHODS` or, with `no_guarantee`, of `HEURISTICS`.
        data: Where the run's images are now, if elsewhere than they were.
        largest_epsilon: What a private training promises to all who have left it must be at most
            this, for `group-privacy`.
        no_guarantee: Whether a method without a guarantee may be taken; it must be named.
        unsigned: Whether a sealed run that nobody signed counts.

    Raises:
        RunError: A value is out of range.
    """

    run: Path
    ids: Path
    out: Path
    method: str = "auto"
    data: str | None = None
    largest_epsilon: float = 10.0
    no_guarantee: bool = False
    unsigned: bool = False

    def __post_init__(self) -> None:
        for name in ("run", "ids", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        if not 0 < self.largest_epsilon < float("inf"):
            raise RunError(
                f"largest_epsilon: expected a number above 0, got {self.largest_epsilon!r}"
            )
        if self.out.resolve().is_relative_to(self.run.resolve()):
            raise RunError(f"out: expected a folder outside of the run's own, got {self.out}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Forgotten:
    """People have left.

    Attributes:
        run: The new run; its model is None where it was interrupted.
        source: The run that they left.
        data: The images of those who stayed.
        inventory: The same as digests.
        request: Who left.
        method: How, and what that promises.
        work: What a training in shards had to do; None by another method.
    """

    run: Run
    source: Source
    data: ImageData
    inventory: Inventory
    request: Request
    method: Method
    work: Work | None = None

    @property
    def weight_change(self) -> float:
        """The norm of the difference between the old weights and the new."""
        if self.run.model is None:
            return 0.0
        before, after = self.source.loaded.model.state_dict(), self.run.model.state_dict()
        return float(
            sum(
                float((after[name].double() - tensor.double()).square().sum())
                for name, tensor in before.items()
                if tensor.is_floating_point()
            )
            ** 0.5
        )


def forget(
    wanted: Forgetting,
    *,
    network: OwnNetwork | None = None,
    sealing: Sealing | None = None,
    unlocking: Unlocking | None = None,
    resume: bool = False,
    force: bool = False,
) -> Forgotten:
    """Takes people out of a run, by a method whose guarantee holds, into a new one.

    Guarantee: everything that can be refused is refused before anything is written; the old run is
    not touched, whatever happens. Ctrl-C or SIGTERM ends with what was finished kept.

    Args:
        wanted: Who leaves what, and how.
        network: Makes the network, if it is one of your own.
        sealing: To whom the new run is encrypted, which it must be if the old one is, and who
            signs it.
        unlocking: Opens the old run, and says whose signatures count there.
        resume: Go on with an interrupted one in `out`.
        force: Replace a run that is in `out`.

    Raises:
        SecureCNNError: The run, the ids, the data or the folder is at fault.
        ArchiveError: What is sealed cannot be opened or believed.
    """
    check_sealing(sealing)
    check_unlocking(unlocking)
    with RunFolder(root=wanted.run, sealed=False).locked():
        unlocking = _trusting(wanted, unlocking, sealing)
        source = source_of(wanted.run, data=wanted.data, unlocking=unlocking, network=network)
        task = _prepared(wanted, source, network, sealing, unlocking)
        folder, method = task.files.run, task.method
        if resume and folder.root.is_dir() and folder.recorded().status == "complete":
            done = _finished(task)
            work = _shards(task).work() if source.recipe.is_sharded else None
        else:
            done, work = _WAYS[method.name](task, resume=resume, force=force)
    return Forgotten(
        run=done,
        source=source,
        data=task.data,
        inventory=task.inventory,
        request=task.request,
        method=method,
        work=work,
    )


def _prepared(
    wanted: Forgetting,
    source: Source,
    network: OwnNetwork | None,
    sealing: Sealing | None,
    unlocking: Unlocking | None,
) -> "_Task":
    """Who leaves and how, once it is sure that it can be done; nothing is written."""
    if source.files.run.sealed and sealing is None:
        raise RunError(
            f"{wanted.run}: is sealed, and so is what follows from it; say to whom (recipients)"
        )
    request = read_request(wanted.ids, source.data)
    method = chosen_method(
        wanted.method,
        source,
        request,
        limit=wanted.largest_epsilon,
        no_guarantee=wanted.no_guarantee,
    )
    data = staying(source.data, request)
    folder = RunFolder(root=wanted.out, sealed=sealing is not None)
    return _Task(
        source=source,
        request=request,
        method=method,
        data=data,
        left=leaving(source.data, request),
        inventory=Inventory.of(data, key=source.inventory.key),
        files=StageFiles(run=folder, sealing=sealing, unlocking=unlocking, network=network),
        note=_NOTE.format(images=len(request.rows), before=source.record.run_id[:8]),
    )


def _trusting(
    wanted: Forgetting, unlocking: Unlocking | None, sealing: Sealing | None
) -> Unlocking | None:
    """Whose signatures count: those who are named, and who signs now.

    Whether the old run was signed its record says, which nobody signed: a run that was not is said
    to be so by whoever asks.
    """
    signer = None if sealing is None else sealing.signer
    if unlocking is None or signer is None:
        return unlocking
    if unlocking.trusted is None and wanted.unsigned:
        return unlocking
    return replace(unlocking, trusted=(*(unlocking.trusted or ()), signer.verifier))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What every way needs; nothing was written yet."""

    source: Source
    request: Request
    method: Method
    data: ImageData
    left: Split
    inventory: Inventory
    files: StageFiles
    note: str


_Way = Callable[..., tuple[Run, Work | None]]


def _shards(task: _Task) -> Shards:
    """The training in shards of those who stayed."""
    folder = task.files.run
    return sharded_task(
        replace(task.source.recipe, out=folder.root),
        task.data,
        inventory=task.inventory,
        folder=folder,
        network=task.files.network,
        sealing=task.files.sealing,
        unlocking=task.files.unlocking,
        sources=(task.source.files,),
    )


def _finished(task: _Task) -> Run:
    """The new run that an earlier try had finished, but for its certificate."""
    folder = task.files.run
    loaded = read_model(
        folder.model,
        unlocking=task.files.unlocking if folder.sealed else None,
        network=task.files.network,
    )
    record = folder.recorded()
    if not task.files.inventory_path.exists() and record.data.fingerprint == task.data.fingerprint:
        task.files.write_inventory(task.inventory)  # killed between the training and this
    known = task.files.read_inventory()
    same = record.model_digest == task.source.record.model_digest
    told, name = loaded.claims.get("unlearned"), task.method.name
    claimed = told.get("method") if isinstance(told, dict) else None
    if (
        not _same(task, known)
        or claimed != (name if name in HEURISTICS else None)
        or record.model_digest != model_digest(loaded.model)
        or same != (name == "group-privacy")
    ):
        raise RunError(
            f"{folder.root}: holds a run in which others left, or by another method; give the same "
            "command as before, or choose another folder"
        )
    return Run(record=record, folder=folder, model=loaded.model)


def _same(task: _Task, known: Inventory) -> bool:
    """Whether an inventory is of those who stay, under whatever key."""
    return known == Inventory.of(task.data, key=known.key)


def _sharded(
    task: _Task, *, resume: bool, force: bool, anew: bool = False
) -> tuple[Run, Work | None]:
    """Trains the stages again that had seen somebody, and takes the others as they are."""
    folder, shards = task.files.run, _shards(task)
    if anew:
        shards = replace(shards, sources=())
    with folder.locked() if resume else folder.begun(force=force):
        record = going_on(shards) if resume else None
        return carried_out(shards, record, notes=[task.note])


def _retrained(task: _Task, *, resume: bool, force: bool) -> tuple[Run, Work | None]:
    """Trains from the first step on those who stayed."""
    if task.source.recipe.is_sharded:
        return _sharded(task, resume=resume, force=force, anew=True)
    recipe, left = task.source.recipe, len(task.data.train)
    # A step on all images is one on all that are left.
    size = recipe.batch_size and min(recipe.batch_size, left)
    done = run(
        replace(recipe, out=task.files.run.root, batch_size=size),
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


def _unchanged(task: _Task, *, resume: bool, force: bool) -> tuple[Run, None]:
    """Hands the model on as it is."""
    if resume:
        raise RunError("resume: expected a training, got group-privacy, which has none; begin anew")
    source, folder = task.source, task.files.run
    loaded = source.loaded
    claims = {name: each for name, each in loaded.claims.items() if name != "architecture"}
    data = dict(claims.get("data") or {})
    # Signed where the model is: nobody can take people out of the count by taking a file away.
    claims["data"] = {**data, "left": int(data.get("left", 0)) + len(task.request.rows)}
    with folder.begun(force=force):
        journal = Journal(folder, _handed_on(task, _UNCHANGED), task.files.sealing)
        journal.begin()
        journal.write()
        task.files.write_inventory(task.inventory)
        write_model(
            folder.model,
            loaded.model,
            loaded.architecture,
            claims=claims,
            private_claims=loaded.private_claims or None,
            sealing=task.files.sealing,
            overwrite=True,
        )
        journal.complete()
    return Run(record=journal.record, folder=folder, model=loaded.model), None


def _heuristically(task: _Task, *, resume: bool, force: bool) -> tuple[Run, None]:
    """Changes the weights by a method without a guarantee, and judges what comes of it."""
    method = task.method.name
    if resume:
        raise RunError(
            f"resume: expected a training, got {method}, which keeps nothing; begin anew"
        )
    source, folder, recipe = task.source, task.files.run, task.source.recipe
    loaded, model = source.loaded, copy.deepcopy(source.loaded.model)
    with folder.begun(force=force):
        record = _handed_on(task, _HEURISTIC.format(method=method))
        journal = Journal(folder, record, task.files.sealing)
        journal.begin()
        journal.write()
        HEURISTICS[method]()(model, task.data.train, task.left)
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
        task.files.write_inventory(task.inventory)
        write_model(
            folder.model,
            model,
            loaded.architecture,
            claims=claims,
            sealing=task.files.sealing,
            overwrite=True,
        )
        journal.complete()
    return Run(record=journal.record, folder=folder, model=model), None


def _handed_on(task: _Task, note: str) -> RunRecord:
    """The record of the old run, for a model that was not trained anew."""
    before, folder = task.source.record, task.files.run
    return replace(
        before,
        status="running",
        settings={**before.settings, "out": str(folder.root)},
        run_id=RunIdentity.draw(private=False).id,
        notes=(*before.notes, task.note, note),
        checkpoints=(folder.model.relative_to(folder.root).as_posix(),),
    )


_WAYS: dict[str, _Way] = {
    "sharded": _sharded,
    "retrain": _retrained,
    "group-privacy": _unchanged,
    **dict.fromkeys(HEURISTICS, _heuristically),
}
