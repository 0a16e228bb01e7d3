"""Which protections a training has, as values of its seams, and how it saves while it runs.

A saver is asked at the start of a stretch of steps and waited for at its end: in a long training
the next save would wait for what a background save has not finished by then.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast, final

from secure_cnn import archive
from secure_cnn.engine import CrossEntropy, Objective
from secure_cnn.errors import RunError
from secure_cnn.record import variant_name

__all__ = [
    "BackgroundSaver",
    "MakeSaver",
    "Protection",
    "Saver",
    "SealedSaver",
    "bytes_in",
    "combinations",
    "protections",
]

_DECAY = 0.99


class Saver(ABC):
    """Saves the states of one training into one folder."""

    @abstractmethod
    def save(self, state: Mapping[str, object]) -> None:
        """Begins a save, or makes it; the state may change once this returns."""

    def wait(self) -> None:  # noqa: B027  most have nothing under way
        """Returns once what was begun is on the disk."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Lets go of what is held open."""


MakeSaver: TypeAlias = Callable[[Path], Saver]
"""Makes a saver for an empty folder."""


@final
@dataclass(frozen=True, kw_only=True)
class Protection:
    """The protections of one training.

    `average_decay` is that of the moving average of the weights, in [0, 1), None without one;
    `saver` makes what saves the checkpoints, None where nothing is saved.
    """

    objective: Objective
    private: bool
    average_decay: float | None = None
    saver: MakeSaver | None = None

    def __post_init__(self) -> None:
        decay = self.average_decay
        if decay is not None and not 0 <= decay < 1:
            raise RunError(f"average_decay: expected 0 up to 1, got {decay}")


def protections(
    objectives: Mapping[str, Objective], *, private: bool = True
) -> dict[str, Protection]:
    """The plain training and every combination of the protections that can be, by variant.

    With `private`, each objective whose losses are one example's is combined with DP-SGD too.

    Example:
        >>> list(protections({"pgd": CrossEntropy()}))
        ['plain', 'private', 'pgd', 'private+pgd']
    """
    return {variant_name(on): one for on, one in _combined(objectives, private=private).items()}


def combinations(
    objectives: Mapping[str, Objective],
    *,
    private: bool = True,
    average: bool = True,
    sealed: bool = True,
) -> dict[str, Protection]:
    """Each protection alone, each objective with privacy, and the most of them together.

    The last one joins averaged weights and background saves to the first of those with most
    protections; where there are neither, it is missing.

    Example:
        >>> list(combinations({}, sealed=False))
        ['plain', 'private', 'average', 'private+average']
    """
    found = _combined(objectives, private=private)
    plain, most = found[()], max(found, key=len)
    whole = found[most]
    if average:
        found["average",] = replace(plain, average_decay=_DECAY)
        most, whole = (*most, "average"), replace(whole, average_decay=_DECAY)
    if sealed:
        found["sealed",] = replace(plain, saver=SealedSaver)
        found["sealed-background",] = replace(plain, saver=BackgroundSaver)
        most, whole = (*most, "sealed-background"), replace(whole, saver=BackgroundSaver)
    return {variant_name(on): one for on, one in (found | {most: whole}).items()}


def _combined(
    objectives: Mapping[str, Objective], *, private: bool
) -> dict[tuple[str, ...], Protection]:
    """By the protections that are on; none where the training is plain."""
    found: dict[tuple[str, ...], Protection] = {}
    every: list[tuple[tuple[str, ...], Objective]] = [((), CrossEntropy())]
    for on, objective in [*every, *(((name,), each) for name, each in objectives.items())]:
        found[on] = Protection(objective=objective, private=False)
        if private and objective.per_example:
            found["private", *on] = Protection(objective=objective, private=True)
    return found


@final
class SealedSaver(Saver):
    """Seals and signs in the loop, over the file before."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "training.sealed"
        self._recipient = archive.generate_identity().recipient
        self._signer = archive.generate_signer()

    def save(self, state: Mapping[str, object]) -> None:
        """Is on the disk when this returns."""
        archive.save(
            self._path,
            cast(archive.State, state),
            recipients=[self._recipient],
            signer=self._signer,
            overwrite=True,
        )


@final
class BackgroundSaver(Saver):
    """Copies in the loop, seals beside it, in a `CheckpointStore` that keeps the last one."""

    def __init__(self, folder: Path) -> None:
        self._saves = 0
        self._store = archive.CheckpointStore(
            folder,
            recipients=[archive.generate_identity().recipient],
            signer=archive.generate_signer(),
            keep_last=1,
        )

    def save(self, state: Mapping[str, object]) -> None:
        """Returns once the tensors are copied."""
        self._store.save(cast(archive.State, state), step=self._saves)
        self._saves += 1

    def wait(self) -> None:
        """Waits for the seal and the commit."""
        self._store.wait()

    def close(self) -> None:
        """Waits, and lets others write to the folder."""
        self._store.close()


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
