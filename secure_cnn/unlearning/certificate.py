"""The certificate of a forgetting: what was done for whom, by which promise, and what is left.

Digests are under the key of the run's inventory, which the controller keeps: with it anybody can be
shown that they are in a certificate, and without it nobody be looked up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

import torch
from torch import nn

from privacy.statistics import clopper_pearson
from secure_cnn import archive
from secure_cnn.archive.certificates import (
    NOT_KNOWN,
    Absence,
    Artefact,
    Cumulative,
    DataRoot,
    Evidence,
    MerkleTree,
    RunState,
    whole_inventory,
)
from secure_cnn.data import Split
from secure_cnn.errors import RunError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.printable import printable
from secure_cnn.recipe import RunFolder
from secure_cnn.recipe.seams import make_device
from secure_cnn.record import hardware, versions
from secure_cnn.unlearning.forgetting import Forgotten
from secure_cnn.unlearning.inventory import Entry
from secure_cnn.unlearning.oracles import Beside, evidence_of
from secure_cnn.unlearning.source import leaving

__all__ = ["Case", "certify", "earlier_certificate"]

_ERROR = 0.025
"""On either side of an interval."""
_NAME = "certificate.json"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LONGEST = 4000
_MOST_ASKED = 5000
"""Of who stayed: more say no more, and take longer than the training that is saved."""
_ALONE = (
    "Whose the images are was not said: each image of the request counts as a person of its own."
)
_MISSING = (
    "What {missing} of the {images} images showed: they were deleted before, and are told by their "
    "digests in the inventory of the run that they left."
)
_COPIES = (
    "Whether other images show the same people: a copy was found where every pixel is the same.",
)
_UNCOUNTED = (
    "How many left before: people left this model {before}, and no certificate of the last time "
    "was there, so that they are not counted here."
)
_NEW = "the model without them"
_DESTROY = (
    "the model that they left, and its stages if it has any: the controller's to destroy, by "
    "secure-cnn archive shred where they are sealed"
)
_DIGESTS = (
    "digests of the images and persons of that run, and their key: who has both can tell who was "
    "in it; keep as you keep the images"
)
_FIGURES = "figures and settings; no training image is in it"
_LEFT = "the sums that the last layer is solved from, of the features of who stayed alone"
_TELLS = (
    "the same of all, and keyed digests of each with their key: they tell who was in it as images "
    "do, and are the controller's to destroy with the model that they left"
)


@final
@dataclass(frozen=True, kw_only=True)
class Case:
    """What the controller says of a request: nothing of it is known here.

    Attributes:
        received, identity_confirmed, deadline: UTC times, `2026-11-30T12:00:00Z`, or "".
        ground: Why, in a sentence, or "".
    """

    received: str = ""
    identity_confirmed: str = ""
    deadline: str = ""
    ground: str = ""

    def __post_init__(self) -> None:
        now = datetime.now(UTC).strftime(_TIME)
        for name in ("received", "identity_confirmed", "deadline"):
            text = getattr(self, name)
            if text and not _is_time(text):
                raise RunError(
                    f"{name}: expected a time in UTC as 2026-11-30T12:00:00Z, got "
                    f"{printable(text[:40])}"
                )
            if name != "deadline" and text > now:
                raise RunError(f"{name}: expected a time that has come, got {text}")
        confirmed = self.identity_confirmed or self.received
        if self.received > confirmed or (self.deadline and self.received > self.deadline):
            raise RunError(f"received: expected a time not behind the others, got {self.received}")
        if len(self.ground) > _LONGEST or printable(self.ground) != self.ground:
            raise RunError(f"ground: expected a sentence of at most {_LONGEST} letters")


def earlier_certificate(
    run: Path, *, trusted: Sequence[archive.Verifier]
) -> archive.Verified | None:
    """The certificate of those who left before, if there is one in the folder of a run.

    Raises:
        ArchiveError: It was changed, or made by nobody who is trusted.
        RunError: It is of another model than the run's.
    """
    path = run / _NAME
    if not path.exists():
        return None
    found = archive.verify_certificate(path, trusted=trusted)
    record = RunFolder(root=run, sealed=False).recorded()
    own = (record.run_id, record.model_digest)
    after = found.value.run_after if isinstance(found.value, archive.Erasure) else None
    if after is None or (after.run, after.digest) != own:
        raise RunError(
            f"{path}: expected the certificate of those who left this model before, got another; "
            "put the run's own back"
        )
    return found


def certify(
    found: Forgotten,
    *,
    signer: archive.Signer,
    case: Case,
    earlier: archive.Verified | None,
    beside: Beside | None = None,
) -> Path:
    """Writes what was done into the new run's folder, signed; returns the file.

    Args:
        found: Who left, and how.
        signer: Who did it.
        case: What the controller says.
        earlier: The certificate of those who left before.
        beside: Models that were trained without them, where there are some.

    Raises:
        RunError: The new run is not complete.
        ArchiveError: The certificate is there, cannot be written, or would say what cannot be.
    """
    if found.run.model is None:
        raise RunError(f"{found.run.folder.root}: expected a run that is complete to certify")
    if found.method.guarantee.exact and not found.weight_change:
        raise RunError(
            f"{found.run.folder.root}: expected other weights than before, since the model was "
            "trained without them, got the same: the stages of the run that they left are not "
            "those of its training; take retrain (--method retrain)"
        )
    path = found.run.folder.root / _NAME
    archive.write_certificate(path, _erasure(found, case, earlier, beside), signer=signer)
    return path


def _erasure(
    found: Forgotten, case: Case, earlier: archive.Verified | None, beside: Beside | None
) -> archive.Erasure:
    """All of it, which is checked where it is made."""
    data, promised, old = _data(found), found.method.guarantee, found.source.record
    return archive.Erasure(
        received=case.received,
        identity_confirmed=case.identity_confirmed,
        deadline=case.deadline,
        ground=case.ground,
        done=datetime.now(UTC).strftime(_TIME),
        requests=data.requests,
        people=len(data.requests),
        images=len(found.request.left),
        run_before=_state(old.run_id, old.model_digest, found.source.files.run.root),
        run_after=_state(
            found.run.record.run_id, found.run.record.model_digest, found.run.folder.root
        ),
        data_before=data.before,
        data_after=data.after,
        absence=data.absence,
        artefacts=whole_inventory(tuple(_artefacts(found))),
        method=found.method.name,
        guarantee=promised.says,
        exact=promised.exact,
        epsilon=promised.epsilon,
        delta=promised.delta,
        assumptions=promised.assumptions,
        cumulative=_cumulative(found, len(data.requests), earlier),
        weight_change=found.weight_change,
        evidence=(*_evidence(found), *evidence_of(beside)),
        not_known=(*NOT_KNOWN, *_COPIES, *_not_known(found, earlier)),
        versions=versions(),
        hardware=hardware(make_device(found.source.recipe)),
        previous="" if earlier is None else earlier.digest,
    )


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The data before and after, as digests, with proofs of who is gone."""

    requests: tuple[str, ...]
    before: DataRoot
    after: DataRoot
    absence: tuple[Absence, ...]


def _data(found: Forgotten) -> _Data:
    there, requests = found.source.there, found.request.digests
    before, after = _items((*there.inventory.train, *there.missing)), _items(found.inventory.train)
    tree = MerkleTree(after)
    gone = (digest for digest in before if digest not in after)
    return _Data(
        requests=tuple(each.hex() for each in requests),
        before=MerkleTree(before).data,
        after=tree.data,
        absence=tuple(tree.absence(each) for each in dict.fromkeys((*requests, *gone))),
    )


def _not_known(found: Forgotten, earlier: archive.Verified | None) -> Iterator[str]:
    """What of this very request is not known."""
    request, before = found.request, len(found.source.record.follows)
    if before and earlier is None:
        yield _UNCOUNTED.format(before="once" if before == 1 else f"{before} times")
    if not request.persons:
        yield _ALONE
    if request.missing:
        yield _MISSING.format(missing=len(request.missing), images=len(request.left))


def _is_time(text: str) -> bool:
    try:
        return datetime.strptime(text, _TIME).strftime(_TIME) == text  # it ends in Z
    except ValueError:
        return False


def _items(entries: Sequence[Entry]) -> dict[bytes, None]:
    """Every image that is trained on, and every person whose they are, once."""
    return dict.fromkeys(item for entry in entries for item in entry.items)


def _state(run: str, digest: str, folder: Path) -> RunState:
    return RunState(run=run, digest=digest, name=folder.resolve().name)


def _artefacts(found: Forgotten) -> Iterator[Artefact]:
    """What is known here of where data of theirs were."""
    old, new, method = found.source.files.run, found.run.folder, found.method
    trained = "re-trained" if method.guarantee.exact else "changed by the method"
    if method.name == "group-privacy":
        trained = "kept, untouched by the request"
    yield Artefact(
        kind="checkpoints", name=f"{new.model.name}, new run", action=trained, detail=_NEW
    )
    if found.work is not None:
        detail = (
            f"{found.work.trained} of {found.work.stages} stages of the new run; the others never "
            "saw an image of theirs"
        )
        yield Artefact(
            kind="checkpoints", name="stages, new run", action="re-trained", detail=detail
        )
    if new.sums.exists():
        yield Artefact(
            kind="derived caches", name=f"{new.sums.name}, new run", action=trained, detail=_LEFT
        )
    yield _kept("checkpoints", f"{old.model.name}, old run", _DESTROY)
    if old.sums.exists():
        yield _kept("derived caches", f"{old.sums.name}, old run", _TELLS)
    under_way = any(each.training.exists() for each in (old, new))
    for kind in () if under_way else ("averages", "optimizer state"):
        yield Artefact(kind=kind, name="", action="none exist", detail="a complete run keeps none")
    for folder, which in ((old, "old"), (new, "new")):
        yield from _beside_model(folder, which)
    if old.shadows.is_dir():
        yield _kept("shadow models", old.shadows.name, "what they said of the images; delete it")
    else:
        yield Artefact(kind="shadow models", name="", action="none exist", detail="")
    detail = "they are the controller's to delete, where the data of the run are"
    yield Artefact(kind="raw images", name="", action="not known", detail=detail)


def _beside_model(folder: RunFolder, which: str) -> Iterator[Artefact]:
    """What a run keeps beside its model, of what there is."""
    for path in sorted(folder.shards.glob("inventory.*")):
        yield _kept("derived caches", f"{path.name}, {which} run", _DIGESTS)
    for path in (folder.record, folder.page, folder.metrics):
        if path.exists():
            yield _kept("logs", f"{path.name}, {which} run", _FIGURES)


def _kept(kind: str, name: str, detail: str) -> Artefact:
    return Artefact(kind=kind, name=name, action="kept, untouched by the request", detail=detail)


def _evidence(found: Forgotten) -> Iterator[Evidence]:
    """Accuracy on who left, who stayed and the test images, of the model before and after."""
    source, model = found.source, found.run.model
    assert model is not None, "the run is complete"
    left = leaving(source.data, found.request)
    parts = [("test", found.data.test)]
    if source.recipe.epsilon is None:
        # Of private training images epsilon does not cover such figures.
        gone = [("who left", left)] if len(left) else []
        parts = [*gone, ("who stayed", _spread(found.data.train)), *parts]
    for when, judged in (("before", source.loaded.model), ("after", model)):
        for name, split in parts:
            yield _accuracy(f"accuracy {when}, {name}", judged, split, source.data.spec.classes)
    if found.work is not None:
        share = found.work.images / found.work.all_images
        yield Evidence(
            name="share of a full training that was repeated",
            value=share,
            low=None,
            high=None,
            n=found.work.stages,
        )


def _spread(split: Split) -> Split:
    """At most so many of its images, from all over it."""
    if len(split) <= _MOST_ASKED:
        return split
    rows = torch.linspace(0, len(split) - 1, _MOST_ASKED).long()
    return split.some(rows)


def _accuracy(name: str, model: nn.Module, split: Split, classes: Sequence[str]) -> Evidence:
    """With its interval by Clopper and Pearson (1934)."""
    report = evaluate_model(model, split, classes)
    count = len(split)
    right = round(report.accuracy * count)
    low, high = clopper_pearson(right, count, error=_ERROR)
    return Evidence(name=name, value=right / count, low=low, high=high, n=count)


def _cumulative(found: Forgotten, people: int, earlier: archive.Verified | None) -> Cumulative:
    """Everybody so far; a bound of this model is of all who left it."""
    before = 0
    if earlier is not None:
        assert isinstance(earlier.value, archive.Erasure), "earlier_certificate looked"
        before = earlier.value.cumulative.people
    bound = found.method.guarantee
    return Cumulative(people=before + people, epsilon=bound.epsilon, delta=bound.delta)
