"""`forget`: people leave the data of a run, and a new run is as if they had not been there.

The old run is only read. What is left of it is the controller's to destroy; see `archive.shred`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from torch import Tensor

from secure_cnn.archive import InvalidKey
from secure_cnn.checkpoint import Sealing, Unlocking, check_sealing, check_unlocking
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Run, RunFolder
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.methods import Method, chosen_method
from secure_cnn.unlearning.requests import Request, read_request
from secure_cnn.unlearning.sharded import Work
from secure_cnn.unlearning.shards import stages_of
from secure_cnn.unlearning.source import Source, source_of, staying
from secure_cnn.unlearning.stage_files import StageFiles
from secure_cnn.unlearning.ways import WAYS, Task, finished, shards_of

__all__ = ["Forgetting", "Forgotten", "forget"]

_WITHOUT_IMAGES = ("sharded", "rewind", "retrain", "group-privacy")
"""Methods that look at the images of those who stay alone."""
_NOTE = "{images} of its training images left the data of the run {before}; see certificate.json."


@final
@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Who leaves what, and how.

    Attributes:
        run: The folder of the run that they leave; it must be complete, and is only read.
        ids: A file that names them, see `secure_cnn.unlearning.requests`; None where those alone
            leave whose images are `missing`.
        out: The folder of the new run.
        method: `auto`, or one of `METHODS` or, with `no_guarantee`, of `HEURISTICS`.
        data: Where the run's images are now, if elsewhere than they were.
        largest_epsilon: What a private training promises to all who have left it must be at most
            this, for `group-privacy`.
        no_guarantee: Whether a method without a guarantee may be taken; it must be named.
        unsigned: Whether a sealed run that nobody signed counts.
        missing_leave: Whether training images that are not there any more leave too. Without, they
            do where it was asked for, by the name of their person or of a copy.

    Raises:
        RunError: A value is out of range.
    """

    run: Path
    ids: Path | None
    out: Path
    method: str = "auto"
    data: str | None = None
    largest_epsilon: float = 10.0
    no_guarantee: bool = False
    unsigned: bool = False
    missing_leave: bool = False

    def __post_init__(self) -> None:
        for name in ("run", "ids", "out"):
            if getattr(self, name) is not None:
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
        """The norm of the difference between the old weights and the new.

        A weight that only one of the two has, as of a shard that everybody left, counts as if the
        other had a 0 there.
        """
        if self.run.model is None:
            return 0.0
        before, after = self.source.loaded.model.state_dict(), self.run.model.state_dict()
        return _distance(before, after)

    @property
    def lost_stages(self) -> int:
        """Stages that saw nobody of them and were trained again all the same: no file had them."""
        if self.work is None or self.method.name == "retrain" or self.request.missing:
            return 0  # in which stage a missing image was its digest does not say
        recipe = self.source.recipe
        before, after = stages_of(recipe, self.source.data), stages_of(recipe, self.data)
        touched = sum(
            len(old.rows) != len(new.rows)
            for of_old, of_new in zip(before, after, strict=True)
            for old, new in zip(of_old, of_new, strict=True)
            if len(of_new[-1].rows)  # else it has no stage any more
        )
        return self.work.trained - touched


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
        new = RunFolder(root=wanted.out, sealed=sealing is not None)
        files = StageFiles(run=new, sealing=sealing, unlocking=unlocking, network=network)
        source = source_of(
            wanted.run,
            data=wanted.data,
            unlocking=unlocking,
            network=network,
            key=files.key() if resume else None,
        )
        task = _prepared(wanted, source, files)
        folder, method = task.files.run, task.method
        if resume and folder.root.is_dir() and folder.recorded().status == "complete":
            done = finished(task)
            work = shards_of(task).work() if source.recipe.is_sharded else None
        else:
            done, work = WAYS[method.name](task, resume=resume, force=force)
    return Forgotten(
        run=_following(done, source),
        source=source,
        data=task.data,
        inventory=task.inventory,
        request=task.request,
        method=method,
        work=work,
    )


def _distance(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The norm of the difference; what is in one alone counts by its own."""
    total = 0.0
    for name in {**before, **after}:
        pair = [each[name].double() for each in (before, after) if _has(each, name)]
        if len(pair) == len((before, after)) and pair[0].shape == pair[1].shape:
            pair = [pair[1] - pair[0]]
        total += sum(float(each.square().sum()) for each in pair)
    return float(total**0.5)


def _has(weights: Mapping[str, Tensor], name: str) -> bool:
    return name in weights and weights[name].is_floating_point()


def _following(done: Run, source: Source) -> Run:
    """The new run, with the runs that people left on its record."""
    before = (*source.record.follows, source.record.run_id)
    if done.record.follows == before:
        return done
    record = replace(done.record, follows=before)
    with done.folder.locked():
        record.write(done.folder.record)
    return replace(done, record=record)


def _prepared(wanted: Forgetting, source: Source, files: StageFiles) -> Task:
    """Who leaves and how, once it is sure that it can be done; nothing is written."""
    if source.files.run.sealed and files.sealing is None:
        raise InvalidKey(
            f"{wanted.run}: is sealed, and so is what follows from it; say to whom (recipients)"
        )
    request = read_request(wanted.ids, source.there, missing_leave=wanted.missing_leave)
    method = chosen_method(
        wanted.method,
        source,
        request,
        limit=wanted.largest_epsilon,
        no_guarantee=wanted.no_guarantee,
    )
    if request.missing and method.name not in _WITHOUT_IMAGES:
        raise RunError(
            f"method: expected all images of who leaves for {method.name}, got "
            f"{len(request.missing)} that are not there; bring them back, or take retrain"
        )
    data = staying(source.data, request)
    return Task(
        source=source,
        request=request,
        method=method,
        data=data,
        inventory=source.inventory.some(
            request.without(len(source.data.train)), request.without_tested(len(source.data.test))
        ),
        files=files,
        note=_NOTE.format(images=len(request.left), before=source.record.run_id[:8]),
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
